"""The card of a corpus for a reader, CORPUS.md; for programs there is card.json."""

from stages.data.file_tokenizer import FileTokenizer
from stages.data.shards import END_OF_TEXT


def corpus_card(card, knobs):
    """The card for a reader."""
    corpus = card["corpus"]
    rows = []
    for split, part in card["splits"].items():
        counts = f"{part['documents']:,} | {part['bytes']:,} | {part['tokens']:,}"
        rows.append(f"| {split} | {counts} | {part['bytes_per_token']:.3f} |")
    left_out = [
        f"{card['duplicates_dropped']:,} exact duplicates",
        f"{corpus['empty_documents_skipped']:,} empty documents",
        f"{corpus['undecodable_files_skipped']:,} files that are not UTF-8",
    ]
    if corpus.get("rows_without_field_skipped"):
        left_out.append(f"{corpus['rows_without_field_skipped']:,} rows without the field `{corpus['text_field']}`")
    if corpus.get("broken_links_skipped"):
        left_out.append(f"{corpus['broken_links_skipped']:,} broken symbolic links")
    notes = [
        f"Source: {corpus['name']} (`corpus.source: {corpus['source']}`), {corpus['bytes_read']:,} bytes.",
        f"Left out: {', '.join(left_out)}.",
    ]
    if corpus.get("text_files_cut"):
        notes.append(f"{corpus['text_files_cut']:,} text files were cut into pieces, which are the documents.")
    if corpus.get("separators_kept_as_text"):
        count = corpus["separators_kept_as_text"]
        notes.append(f"`{END_OF_TEXT}` stands {count:,} times in the text files: `corpus.separator` would split there.")
    if near := card.get("near_duplicates"):
        done = f"{near['dropped']:,} were dropped" if near["handling"] == "drop" else "each group is in one split"
        notes += [
            f"Near-duplicates: {near['documents']:,} documents in {near['groups']:,} groups share more than "
            f"{knobs.near_duplicate_similarity:g} of their sets of {knobs.near_duplicate_words} words; {done}. "
            f"{near['share_of_test_seen_in_training']:.1%} of the test split's sequences of "
            f"{knobs.near_duplicate_words} words stand in the training split."
        ]
    if corpus["reached_max_bytes"]:
        notes.append("Reading stopped at `corpus.max_bytes`: the source holds more.")
    if knobs.max_documents:
        limit = f"`prepare.max_documents` ({knobs.max_documents})"
        notes.append(f"Of the rest, each split took its share of {limit} by checksum.")
    count = card["documents_moved_to_fill_splits"]
    filled = f" So that each split has enough, {count:,} went to the one next to theirs." if count else ""
    given = card["tokenizer"] == FileTokenizer.kind
    origin = "the teacher's own, from text that is not known here" if given else "from the training split only"
    if trimmed := card.get("trimmed"):
        origin += f"; {trimmed['vocab_size'] - card['vocab_size']:,} others of it, in no text here, were left out"
    end = "a token " if given else f"`{END_OF_TEXT}` "
    return "\n".join(
        [
            "# Corpus card",
            "",
            *notes,
            "",
            "| split | documents | bytes | tokens | bytes per token |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            "The split is the SHA-256 of a document's text, read as a number from 0 to 1: test below",
            f"{knobs.test_share:g}, validation below {knobs.test_share + knobs.val_share:g}, else training.",
            f"No document is in two splits.{filled}",
            "",
            f"Tokenizer: {card['tokenizer']}, {card['vocab_size']:,} tokens, {origin};",
            f"{end}({card['end_of_text']}) ends every document and counts no byte.",
            "",
        ]
    )

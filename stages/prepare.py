"""prepare: a corpus becomes a tokenizer and checked token shards, split by document.

    dvc repro prepare
    python -m stages.prepare corpus=files 'corpus.paths=[texts/*.txt]'
    python -m stages.prepare teacher=folder teacher.path=models/mine      # with that model's own tokenizer
    python -m stages.prepare scale=tiny prepare.tokenizer=bytes

A document's split is a function of its own text (SHA-256), so no document is in two splits, none moves when
others come or go (but in a corpus so small that a split would else be empty), and the order on disk is that of
the checksums: any first n tokens are a fair sample. Near-duplicates are dropped, or all fall into one split.
"""

import hashlib
import json
import sys
import tempfile
import time
from contextlib import contextmanager

from tqdm import tqdm

from stages.data.corpus import Corpus
from stages.data.corpus_card import corpus_card
from stages.data.fingerprints import refuse_changed, teacher_fingerprint
from stages.data.near_duplicates import NearDuplicates, share_seen
from stages.data.shards import (
    END_OF_TEXT,
    SPLITS,
    TOKENIZER,
    BpeTokenizer,
    BytesTokenizer,
    Written,
    token_dtype,
    write_card,
    write_split,
)
from stages.data.splits import (
    Document,
    choose,
    leaders,
    moved,
    refuse_few,
    refuse_short,
    split_documents,
    with_followers,
)
from stages.data.teacher_folder import refuse_longer, refuse_untrimmable, teacher_folder, teacher_tokenizer
from stages.data.vocabulary import KEPT, closed, trimmed, write_kept
from stages.files.artifacts import Refusal, link_or_copy, rounded, sha256_of, write_atomically, write_json
from stages.files.resuming import Interruption, ResumeState, resume_key
from stages.run.entry import run_stage
from stages.settings.models import TEACHER_FOLDER
from stages.tracking.identity import machine

SECTIONS = ("corpus", "prepare", "sequence_tokens", *TEACHER_FOLDER)
DATA = "data"  # of the resume state: the folder that becomes artifacts/data
BATCH_BYTES = 1 << 22  # of text, tokenized at once


def main(settings, place, run):
    knobs, watch = settings.prepare, Stopwatch()
    corpus = Corpus(**settings.corpus.model_dump(), root=place.root)
    if settings.teacher.source == "folder":
        teacher_is_at = teacher_folder(settings.teacher.path, place.root)
        refuse_longer(settings.sequence_tokens, teacher_is_at)
        refuse_untrimmable(settings.teacher, teacher_is_at)
    folder = empty_folder(place.write("artifacts/data"))

    # The source is read once. Its texts wait in a file without a name, which a killed process cannot leave. A
    # resumed run reads it again: that is how it knows that it is the same.
    with Interruption("prepare") as interruption, corpus, tempfile.TemporaryFile(dir=folder) as spool:
        with watch.phase("read"):
            handling, n = knobs.near_duplicates, knobs.near_duplicate_words
            near = None if handling == "keep" else NearDuplicates(n, knobs.near_duplicate_similarity)
            documents, duplicates = gather(corpus, spool, interruption, near)
            if place.out == place.root:
                refuse_changed(settings, place.root)
        with watch.phase("split"):
            alone, followers = leaders(documents, groups_of(near, documents, spool, interruption))
            copies = sum(map(len, followers.values()))
            besides = {"exact duplicates": duplicates, "near-duplicates": copies}
            told = [f"{count:,} {what}" for what, count in besides.items() if count]
            refuse_few(alone, corpus.left_out() + told)
            splits = split_documents(alone, knobs.val_share, knobs.test_share)
            moved_documents = moved(splits, knobs.val_share, knobs.test_share)
            if handling == "group":
                splits = with_followers(splits, followers)
            available = sum(map(len, splits.values()))
            splits = choose(splits, knobs.max_documents, knobs.val_share, knobs.test_share)
            unused = available - sum(map(len, splits.values()))

        teacher = teacher_fingerprint(settings.teacher, place.root)
        with ResumeState(place.root, "prepare", state_key(knobs, settings.teacher, teacher, splits)) as state:
            with watch.phase("train_tokenizer"):
                whole = None
                if teacher:
                    tokenizer = teacher_tokenizer(teacher_is_at, settings.teacher.end_of_text)
                    if settings.teacher.trim_vocabulary:
                        whole, kept = tokenizer, kept_ids(tokenizer, spool, splits, state, interruption)
                        tokenizer = trimmed(whole, kept)
                else:
                    tokenizer = tokenizer_of(knobs, texts(spool, splits["train"]), state)

            with watch.phase("encode"):
                parts = {}
                for split in SPLITS:
                    interruption.check(f"encoding {split}")
                    parts[split] = encode_split(tokenizer, spool, splits[split], split, knobs, state, interruption)
                    refuse_short(split, parts, splits, unused, knobs, settings.sequence_tokens)

            for path in (state.folder / DATA).glob("[!.]*"):
                link_or_copy(path, folder / path.name)
            write_atomically(folder / TOKENIZER, tokenizer.to_json())
            card = {
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "tokenizer": tokenizer.kind,
                "tokenizer_sha256": sha256_of(folder / TOKENIZER),
                "dtype": token_dtype(tokenizer.vocab_size),
                "splits": parts,
                "duplicates_dropped": duplicates,
                "documents_moved_to_fill_splits": moved_documents,
                "corpus": corpus.describe(),
            }
            if teacher:
                card["teacher"] = teacher  # so that other weights behind the same path reach `pretrain`
            if whole:
                card["trimmed"] = write_kept(folder, kept, whole)
            if near is not None:
                with watch.phase("compare_splits"):
                    card["near_duplicates"] = {
                        "handling": handling,
                        "groups": len(followers),
                        "documents": len(followers) + copies,
                        "dropped": copies * (handling == "drop"),
                        "share_of_test_seen_in_training": seen_in_training(spool, splits, n),
                    }
            write_atomically(folder / "CORPUS.md", corpus_card(card, knobs))
            write_card(folder, rounded(card))

            metrics = metrics_of(card, splits)
            write_json(place.write("metrics/prepare.json"), rounded(metrics))
            write_json(place.write("measurements/prepare.json"), rounded(measurements_of(watch, corpus.bytes, parts)))
    run.metrics(metrics)
    run.artifact(folder / "CORPUS.md")
    print(f"prepare: {summary(card, unused, knobs.max_documents)}", file=sys.stderr)
    digests = sorted(document.digest for document in documents)
    return {"inputs": {"corpus": hashlib.sha256(b"".join(digests)).hexdigest()}}


def empty_folder(folder):
    """The folder without a former run's files, card first: what a kill leaves is never taken for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("card.json", "CORPUS.md", TOKENIZER, KEPT, "*-?????.bin", "*-documents.npy", ".*.partial"):
        for path in folder.glob(pattern):
            path.unlink()
    return folder


# ---- reading


def gather(corpus, spool, interruption, near):
    """Copy every text once into the spool; returns the documents and the number of duplicates dropped.

    `near`, if any, receives each document that is kept.
    """
    documents, seen, position, duplicates = [], set(), 0, 0
    with progress("reading", unit="B", unit_scale=True) as bar:
        for text in corpus:
            interruption.check("reading the corpus")
            data = text.encode("utf-8")
            bar.update(len(data))
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            spool.write(data)
            documents.append(Document(digest, position, len(data)))
            if near is not None:
                near.add(data)
            position += len(data)
    spool.flush()
    return documents, duplicates


def groups_of(near, documents, spool, interruption):
    """Groups of near-duplicates, as numbers of documents; none where nobody asked (`near` is None)."""
    if near is None:
        return []
    return near.groups(
        lambda number: bytes_of(spool, documents[number]), lambda: interruption.check("comparing documents")
    )


def seen_in_training(spool, splits, words_per_gram):
    """The share of the test split's n-grams of words that stand in the training split too."""
    test, train = ((bytes_of(spool, document) for document in splits[split]) for split in ("test", "train"))
    return share_seen(test, train, words_per_gram)


def texts(spool, documents):
    """The texts of these documents, from the spool."""
    for document in documents:
        yield bytes_of(spool, document).decode("utf-8")


def bytes_of(spool, document):
    spool.seek(document.start)
    return spool.read(document.size)


def progress(title, **how):
    """A bar on a terminal, nothing in a log."""
    quiet = not sys.stderr.isatty()
    return tqdm(desc=f"prepare: {title}", file=sys.stderr, disable=quiet, leave=False, **how)


# ---- tokens


def train_tokenizer(kind, vocab_size, training_texts):
    """Byte-level BPE with GPT-2's word pattern, from the training texts alone; or plain bytes, from none."""
    if kind == "bytes":
        return BytesTokenizer()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise Refusal(
            f"prepare.vocab_size ({vocab_size}) must be at least 257: every byte and the text's end"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair met once is no pattern: a small corpus ends with fewer tokens than asked
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes, so nothing is unknown
        show_progress=False,
    )
    with progress("training the tokenizer", unit=" documents") as bar:
        tokenizer.train_from_iterator(_counted(training_texts, bar), trainer)
    return BpeTokenizer(tokenizer)


def _counted(items, bar):
    for item in items:
        bar.update(1)
        yield item


def encode(tokenizer, spool, documents, split, interruption):
    """(token ids, utf-8 bytes) of each document in order, tokenized a few megabytes at a time."""
    batch, held = [], 0
    with progress(f"encoding {split}", total=len(documents), unit=" documents") as bar:
        for document, text in zip(documents, texts(spool, documents), strict=True):
            batch.append((text, document.size))
            held += document.size
            if held >= BATCH_BYTES:
                interruption.check(f"encoding {split}")
                yield from _encoded(tokenizer, batch)
                bar.update(len(batch))
                batch, held = [], 0
        yield from _encoded(tokenizer, batch)
        bar.update(len(batch))


def _encoded(tokenizer, batch):
    ids = tokenizer.encode_batch([text for text, _ in batch])
    return zip(ids, [size for _, size in batch], strict=True)


# ---- what is kept of unfinished work


def state_key(knobs, teacher, files, splits):
    """Of what the tokens depend on: the texts, wherever they came from, and a teacher's own tokenizer."""
    digest = hashlib.sha256()
    for documents in splits.values():
        digest.update(b"".join(document.digest for document in documents) + b"\n")
    own = [teacher.end_of_text, files, teacher.trim_vocabulary] if files else []
    return resume_key("prepare", [knobs.model_dump(), *own, digest.hexdigest()])


def tokenizer_of(knobs, training_texts, state):
    """The tokenizer that an interrupted run had trained, else a fresh one."""
    kept = state.load(TOKENIZER) if knobs.tokenizer == "bpe" else None
    if kept is not None:
        from tokenizers import Tokenizer

        print("prepare: continuing with the tokenizer of the interrupted run", file=sys.stderr)
        return BpeTokenizer(Tokenizer.from_str(kept.decode()))
    tokenizer = train_tokenizer(knobs.tokenizer, knobs.vocab_size, training_texts)
    state.save(TOKENIZER, tokenizer.to_json().encode())
    return tokenizer


def kept_ids(tokenizer, spool, splits, state, interruption):
    """The ids of a teacher's tokens that the texts of all splits need; an interrupted run may have found them."""
    if (kept := state.load(KEPT)) is None:
        encoded = (encode(tokenizer, spool, splits[split], split, interruption) for split in SPLITS)
        used = {id for documents in encoded for ids, _ in documents for id in ids}
        state.save(KEPT, kept := json.dumps(closed(tokenizer, used)).encode())
    return json.loads(kept)


def encode_split(tokenizer, spool, documents, split, knobs, state, interruption):
    """Encodes and writes a split into the state, from the shard on that an interrupted run had come to."""
    folder, written = state.folder / DATA, shards_kept(state, split)
    if written.shards:
        print(f"prepare: continuing {split} after {len(written.shards)} shards", file=sys.stderr)
    rows, shards = len(written.table), len(written.shards)

    def keep(now):
        nonlocal rows, shards
        step = {"table": now.table[rows:], "shards": now.shards[shards:]}
        state.save(step_name(split, shards), json.dumps(step).encode())
        rows, shards = len(now.table), len(now.shards)

    rest = documents[max(0, len(written.table) - 1) :]  # the last one may have ended in the next shard
    encoded = encode(tokenizer, spool, rest, split, interruption)
    return write_split(folder, split, encoded, tokenizer, knobs.shard_tokens, written, keep)


def shards_kept(state, split):
    """The shards of an interrupted run, up to the first that is not there as it was recorded."""
    table, shards = [], []
    while (kept := state.load(step_name(split, len(shards)))) is not None:
        step = json.loads(kept)
        for shard in step["shards"]:
            path = state.folder / DATA / shard["file"]
            if not path.is_file() or sha256_of(path) != shard["sha256"]:
                state.say_damaged(f"{DATA}/{shard['file']}")
                return Written(table, shards)
        table += step["table"]
        shards += step["shards"]
    return Written(table, shards)


def step_name(split, shard):
    return f"{split}-{shard:05d}"


# ---- telling


def metrics_of(card, splits):
    """What `dvc metrics` compares."""
    digests = [document.digest for documents in splits.values() for document in documents]
    numbers = ("documents", "bytes", "tokens", "bytes_per_token")
    near = card.get("near_duplicates", {})
    return {split: {key: card["splits"][split][key] for key in numbers} for split in SPLITS} | {
        "vocab_size": card["vocab_size"],
        "duplicates_dropped": card["duplicates_dropped"],
        "documents_in_two_splits": len(digests) - len(set(digests)),
        **{f"near_duplicates_{key}": value for key, value in near.items() if key == "dropped"},
        **{key: value for key, value in near.items() if key == "share_of_test_seen_in_training"},
    }


def measurements_of(watch, bytes_read, parts):
    """What depends on the machine and its clock, and therefore is no DVC out."""
    tokens = sum(part["tokens"] for part in parts.values())
    encoded = sum(part["bytes"] for part in parts.values())
    return {
        "seconds": watch.seconds,
        "megabytes_per_second_read": bytes_read / 1e6 / watch.seconds["read"],
        "megabytes_per_second_encoded": encoded / 1e6 / watch.seconds["encode"],
        "tokens_per_second_encoded": tokens / watch.seconds["encode"],
        "machine": machine(),
    }


class Stopwatch:
    """Seconds of each phase."""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def phase(self, name):
        begun = time.perf_counter()
        yield
        self.seconds[name] = max(time.perf_counter() - begun, 1e-9)


def summary(card, unused, max_documents):
    train = card["splits"]["train"]
    documents = sum(part["documents"] for part in card["splits"].values())
    limit = f" (prepare.max_documents = {max_documents} left out {unused:,})" if unused else ""
    return (
        f"{documents:,} documents{limit} from {card['corpus']['name']}, {train['tokens']:,} training tokens of "
        f"{train['bytes_per_token']:.2f} bytes, vocabulary {card['vocab_size']:,}"
    )


if __name__ == "__main__":
    run_stage(main, "prepare", SECTIONS)

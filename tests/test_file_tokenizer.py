"""Tokenizers of other people's models: every text comes back byte by byte, and what would lose text is refused."""

import copy
import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.data.file_tokenizer import FileTokenizer, byte_tokens
from stages.data.hub_tokenizer import load_hub_tokenizer, tokenizer_files
from stages.data.shards import Tokens, byte_alphabet, load_tokenizer, read_card, write_card
from stages.files.artifacts import Refusal
from stages.measure import scoring

ROWS = 600
MERGED = ["de", "def", "fi", "fir", "re", "in", "▁re", "Ġre", "on", "▁▁", "ĠĠ", "12", "Ã¼", "ü"]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BARE = LEVEL | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def added(id, content, special=True, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, "special": special} | plain | flags


def bpe(alphabet, special, **model):
    """A small tokenizer.json: special tokens, the alphabet, and what merges give."""
    vocab = {token: id for id, token in enumerate([*special, *alphabet])}
    merges = []
    for whole in MERGED:
        if known := [cut for cut in range(1, len(whole)) if whole[:cut] in vocab and whole[cut:] in vocab]:
            merges.append([whole[: known[0]], whole[known[0] :]])
            vocab.setdefault(whole, len(vocab))
    tokens = [added(id, token) for id, token in enumerate(special)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges} | model}  # fmt: skip


SPACED = ["▁", *"abcdefghinorst12ü", *byte_tokens()]
SPECIAL = ["<unk>", "<s>", "</s>"]
FALLBACK = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
LEVELLED = bpe(byte_alphabet(), ["<|endoftext|>", "<|im_end|>"])
LLAMA = bpe(SPACED, SPECIAL, **FALLBACK)
NEXT, NEXT_SPACED = len(LEVELLED["model"]["vocab"]), len(LLAMA["model"]["vocab"])
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
       {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens":
       {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}  # fmt: skip
PIECES = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0]] + [[token, -float(5 + at)] for at, token in enumerate(SPACED)]
KINDS = {
    "gpt2": LEVELLED | {"pre_tokenizer": LEVEL},
    "smollm": LEVELLED | {"pre_tokenizer": sequence("pretokenizers", DIGITS, LEVEL), "post_processor": LEVEL},
    "qwen2": LEVELLED | {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence("pretokenizers", {"type": "Split", "pattern": {"Regex": WORDS},
                                                    "behavior": "Isolated", "invert": False}, BARE),
        "added_tokens": [*LEVELLED["added_tokens"], added(NEXT, "<tool>", special=False, rstrip=True)]},
    "falcon": LEVELLED | {"pre_tokenizer": LEVEL | {"add_prefix_space": True}},
    "llama2": LLAMA | {"normalizer": sequence("normalizers", PREPEND, TO_SPACE), "post_processor": BOS},
    "trained": LLAMA | {"normalizer": sequence("normalizers", PREPEND, TO_SPACE), "added_tokens": [
        *LLAMA["added_tokens"], *(added(LLAMA["model"]["vocab"][token], token) for token in byte_tokens())]},
    "mistral": LLAMA | {"pre_tokenizer": METASPACE, "post_processor": BOS},
    "old": LLAMA | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
    "gemma": LLAMA | {"normalizer": TO_SPACE,
                      "added_tokens": [*LLAMA["added_tokens"], added(NEXT_SPACED, "\n\n", False)]},
    "unigram": LLAMA | {"pre_tokenizer": METASPACE,
                        "model": {"type": "Unigram", "unk_id": 0, "vocab": PIECES, "byte_fallback": True}},
}  # fmt: skip
PREFIXED = ("falcon", "llama2", "trained", "mistral", "old", "unigram")
SPELT = ["<|endoftext|>", "</s>", "<s>", "<tool> ", "\n\n", "▁", "<0x41>", "def first", "  re", "12", "ü", "e\u0301",
         "中", " ", "\r\n", "\0", "'ll"]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(SPELT), st.text(max_size=5)), max_size=8).map("".join)


def written(folder, content, name="tokenizer.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_hub_tokenizer(written(root / kind, content), ROWS) for kind, content in KINDS.items()}


@example(text="a <0x41><0x4", kind="unigram")
@given(text=TEXTS, kind=st.sampled_from(sorted(KINDS)))
def test_every_text_comes_back_byte_by_byte_and_spells_no_special_token(read, kind, text):
    tokenizer = read[kind]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.prefix_bytes == (kind in PREFIXED)
    assert tokenizer.bytes_of(ids)[tokenizer.prefix_bytes :] == text.encode()
    assert tokenizer.encode(text) == ids
    special = {token["id"] for token in KINDS[kind]["added_tokens"] if token["special"]}
    assert not set(ids) & (special - {LLAMA["model"]["vocab"][token] for token in byte_tokens() if kind == "trained"})


@given(data=st.binary(max_size=30), kind=st.sampled_from(sorted(KINDS)))
def test_so_do_bytes_that_are_no_text(read, kind, data):
    tokenizer = read[kind]
    ids = tokenizer.encode(data.decode("utf-8", errors="surrogateescape"))
    assert tokenizer.bytes_of(ids)[tokenizer.prefix_bytes :] == data


def test_words_are_split_as_the_library_splits_them(read, tmp_path):
    from tokenizers import Tokenizer

    for kind, content in KINDS.items():
        theirs = Tokenizer.from_str(json.dumps(content))
        theirs.encode_special_tokens = True  # a text that spells one is text
        spelt = "" if kind == "unigram" else "<0x41>"  # that takes its pieces from wherever a text spells them
        for text in ("def first(12): return 'll\n", "a  re", f"中12 fi{spelt}", "x\n\n\ny ü"):
            assert read[kind].encode(text) == theirs.encode(text, add_special_tokens=False).ids, (kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_folder_keeps_it_and_transformers_reads_it_the_same(read, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    from test_shards import folder_of

    tokenizer, texts = read[kind], ["def first(12):", "ü 中 <s></s><|endoftext|>", "re in\n\non", "e\u0301"]
    data = folder_of(tmp_path / "data", tokenizer, texts)
    assert read_card(data)["vocab_size"] == ROWS
    again = load_tokenizer(data)
    assert again.to_json() == tokenizer.to_json() and again.end_of_text == tokenizer.end_of_text
    for name, content in tokenizer_files(data, 64).items():
        (tmp_path / name).write_text(content)
    theirs, drawn = transformers.AutoTokenizer.from_pretrained(tmp_path), random.Random(kind)
    ours = load_hub_tokenizer(tmp_path, ROWS)
    # theirs reads ▁ as a space, and with Unigram special pieces and bytes; the module tells where a text begins
    pieces = [piece for piece in SPELT if piece != "▁" and (kind != "unigram" or piece not in [*SPECIAL, "<0x41>"])]
    for text in ["x" + "".join(drawn.choices(pieces, k=drawn.randrange(20))) for _ in range(112)]:
        assert ours.encode(text) == theirs(text)["input_ids"] == again.encode(text), text
    assert theirs.eos_token_id == again.end_of_text


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "mistral", "gemma"])
def test_bytes_of_documents_that_are_cut_add_up_with_those_that_were_cut_away(read, kind, tmp_path):
    from test_shards import folder_of

    texts = [" def first(12):\n" * 3, "ü", "▁▁re in on" * 4, ""]
    data = folder_of(tmp_path, read[kind], texts)
    tokens, tokenizer = Tokens(data, "test"), load_tokenizer(data)
    stream = scoring.read_stream(tokens, tokenizer, 40)
    for document, text in enumerate(texts):
        ids = stream.tokens[1:][stream.document_of == document].tolist()
        whole = [id for id in ids if id != tokenizer.end_of_text]
        scored = tokenizer.bytes_of(whole)[tokenizer.prefix_bytes if text else 0 :]
        assert text.encode().startswith(scored) and stream.document_bytes[document] == len(scored)


def test_a_texts_end_is_the_given_token_else_one_that_ends_texts_and_never_a_chat_mark(tmp_path):
    chat = bpe(byte_alphabet(), ["<|im_end|>", "<eos>", "</s>"]) | {"pre_tokenizer": LEVEL}
    folder = written(tmp_path, chat)
    written(tmp_path, {"eos_token": "<|im_end|>"}, "tokenizer_config.json")
    assert load_hub_tokenizer(folder, ROWS).end_token() == "</s>"
    assert load_hub_tokenizer(folder, ROWS, "<|im_end|>").end_of_text == 0
    assert FileTokenizer(folder / "tokenizer.json", ROWS, 1).end_token() == "<eos>"
    from test_shards import folder_of

    data = folder_of(tmp_path / "data", load_hub_tokenizer(folder, ROWS, "<|im_end|>"))
    for name, content in tokenizer_files(data, 64).items():
        (tmp_path / name).write_text(content)
    assert load_hub_tokenizer(folder, ROWS).end_token() == "<|im_end|>", "a folder of ours says which it is"


def test_rows_beyond_the_tokenizer_and_special_tokens_beyond_the_rows_do_no_harm(read, tmp_path):
    content = copy.deepcopy(KINDS["gpt2"])
    most = max(content["model"]["vocab"].values())
    content["added_tokens"].append(added(most + 1, "<image>"))
    tokenizer = load_hub_tokenizer(written(tmp_path, content), most + 1)
    assert tokenizer.encode("<image>") == read["gpt2"].encode("<image>")
    assert read["gpt2"].vocab_size == ROWS and read["gpt2"].bytes_of([ROWS - 1]) == b""


def without(content, token):
    vocab = {key: id for key, id in content["model"]["vocab"].items() if key != token}
    return content | {"model": content["model"] | {"vocab": vocab, "merges": []}}


REFUSED = {
    "WordPiece loses text": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a",
                                       "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}},
    "no byte fallback": LLAMA | {"model": LLAMA["model"] | {"byte_fallback": False}},
    "normalizer Lowercase changes text": KINDS["gpt2"] | {"normalizer": {"type": "Lowercase"}},
    "normalizer NFKC changes text": KINDS["gpt2"] | {"normalizer": sequence("normalizers", {"type": "NFKC"})},
    "pre-tokenizer WhitespaceSplit removes": LLAMA | {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    "end_of_word_suffix '</w>'": LLAMA | {"model": LLAMA["model"] | {"end_of_word_suffix": "</w>"}},
    "no token for the byte 0x0A": without(KINDS["gpt2"], byte_alphabet()[10]),
    "has none of": bpe(byte_alphabet(), ["<|im_end|>"]) | {"pre_tokenizer": LEVEL},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_lose_text_is_refused_by_name(reason, tmp_path):
    folder = written(tmp_path, bpe([], []) | REFUSED[reason])
    with pytest.raises(Refusal, match=reason) as caught:
        load_hub_tokenizer(folder, ROWS)
    assert "\n" not in str(caught.value) and str(folder / "tokenizer.json") in str(caught.value)


def test_ids_beyond_the_embedding_and_an_end_that_is_no_token_are_refused(tmp_path):
    folder = written(tmp_path, KINDS["gpt2"])
    most = max(KINDS["gpt2"]["model"]["vocab"].values())
    with pytest.raises(Refusal, match=f"ids up to {most}, the model's embedding {most} rows"):
        load_hub_tokenizer(folder, most)
    with pytest.raises(Refusal, match="no token '</s>': set teacher.end_of_text"):
        load_hub_tokenizer(folder, ROWS, "</s>")


def test_a_text_that_does_not_come_back_is_refused(read, tmp_path, monkeypatch):
    tokenizer = load_hub_tokenizer(written(tmp_path, KINDS["gpt2"]), ROWS)
    tokenizer._bytes[tokenizer.encode("x")[0]] = b"y"
    with pytest.raises(Refusal, match="loses text: b'a x b' comes back as b'a y b'"):
        tokenizer.encode_batch(["fine", "a x b"])


def test_a_byte_that_is_rare_in_text_may_lack_a_token_until_a_text_has_it(tmp_path):
    tokenizer = load_hub_tokenizer(written(tmp_path, without(KINDS["gpt2"], byte_alphabet()[4])), ROWS)
    assert tokenizer.decode(tokenizer.encode_batch(["fine"])[0]) == "fine"
    with pytest.raises(Refusal, match=r"loses text: b'a\\x04b' comes back as b'ab'; leave the text"):
        tokenizer.encode_batch(["fine", "a\x04b"])


def test_a_card_that_names_an_own_tokenizer_is_read_as_before(tmp_path):
    from test_shards import BPE, folder_of

    data = folder_of(tmp_path, BPE)
    card = {key: value for key, value in read_card(data).items() if key != "sha256"}
    write_card(data, card | {"tokenizer": "file", "vocab_size": 400})
    assert load_tokenizer(data).encode("def first") == BPE.encode("def first")

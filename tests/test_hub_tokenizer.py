"""The tokenizer files of a model folder: transformers splits every text as the stages do."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_shards import BPE, folder_of

from stages.data.hub_tokenizer import load_hub_tokenizer, tokenizer_files
from stages.data.shards import BytesTokenizer
from stages.files.artifacts import Refusal

PIECES = ["<|endoftext|>", "<|endoftext|", "|>", "def ", " return", "\n    ", "\t", "kürzer", "中文", "🙂", "e\u0301",
          "\0", "\ufeff", "x = 41", "  ", "'ll", "</s>", "<s>", "[UNK]", "ı", "ß", "\r\n", "a", "Ġ", "Ċ"]  # fmt: skip
KINDS = {"bpe": BPE, "bytes": BytesTokenizer()}


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """A tokenizer of ours, and the folder with its files."""
    tokenizer, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    for name, content in tokenizer_files(folder_of(folder / "data", tokenizer), 64).items():
        (folder / name).write_text(content)
    return tokenizer, folder


def test_transformers_gives_the_same_ids_on_a_thousand_texts(written):
    transformers = pytest.importorskip("transformers")
    tokenizer, folder = written
    theirs, drawn = transformers.AutoTokenizer.from_pretrained(folder), random.Random(1)
    for _ in range(1000):
        text = "".join(drawn.choices(PIECES, k=drawn.randrange(40)))
        ids = list(tokenizer.encode(text))
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_of_text
    assert theirs.model_max_length == 64


@pytest.fixture(scope="module")
def read(written):
    return load_hub_tokenizer(written[1], written[0].vocab_size)


@given(text=st.text())
def test_it_is_read_back_as_the_tokenizer_that_it_was(written, read, text):
    tokenizer = written[0]
    assert read.encode(text) == list(tokenizer.encode(text))
    assert read.bytes_of([*read.encode(text), read.end_of_text]) == text.encode() + b"<|endoftext|>"


def test_rows_of_the_embedding_beyond_the_tokenizer_stand_for_nothing(written):
    tokenizer, folder = written
    read = load_hub_tokenizer(folder, tokenizer.vocab_size + 3)
    assert read.decode([*read.encode("ab"), tokenizer.vocab_size + 2]) == "ab"


def refusal(folder, vocab_size):
    with pytest.raises(Refusal) as caught:
        load_hub_tokenizer(folder, vocab_size)
    assert "\n" not in str(caught.value) and str(folder / "tokenizer.json") in str(caught.value)
    return str(caught.value)


def test_a_tokenizer_that_does_not_fit_is_refused(written, tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer, folder = written
    assert "they do not belong together" in refusal(folder, tokenizer.vocab_size - 1)
    assert "is missing" in refusal(tmp_path, 5)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    assert "is no tokenizer" in refusal(tmp_path, 5)
    Tokenizer(models.BPE(vocab={"▁the": 0}, merges=[])).save(str(file))
    assert "not byte-level" in refusal(tmp_path, 1)

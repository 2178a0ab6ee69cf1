"""Shards give back what was written, damage is named, and the sampler shows every window exactly once."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.shards import (
    END_OF_TEXT,
    SPLITS,
    BytesTokenizer,
    Tokens,
    Windows,
    load_tokenizer,
    shuffled,
    token_dtype,
    write_card,
    write_split,
)
from stages.files.artifacts import Refusal, sha256_of, write_atomically
from stages.prepare import train_tokenizer

TEXTS = ["def first():\n    return 1\n", "zweiter Text, kürzer", "", "x = 3\n" * 40, "x = 4\n" * 40]
BPE = train_tokenizer("bpe", 300, TEXTS)


def folder_of(folder, tokenizer, texts=TEXTS, shard_tokens=64):
    """A data folder with the same texts in every split."""
    write_atomically(folder / "tokenizer.json", tokenizer.to_json())
    parts = {}
    for split in SPLITS:
        documents = [(tokenizer.encode(text), len(text.encode())) for text in texts]
        parts[split] = write_split(folder, split, documents, tokenizer, shard_tokens)
    card = {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "tokenizer": tokenizer.kind,
    }
    card |= {
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "dtype": token_dtype(tokenizer.vocab_size),
    }
    write_card(folder, card | {"splits": parts})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data"), BytesTokenizer())


@pytest.mark.parametrize("shard_tokens", [19, 64, 10_000])
def test_documents_follow_each_other_through_all_shards(tmp_path, shard_tokens):
    tokens = Tokens(folder_of(tmp_path, BytesTokenizer(), shard_tokens=shard_tokens), "train")
    written = [token for text in TEXTS for token in [*text.encode(), 256]]
    assert len(tokens) == len(written) and tokens.window(0, len(tokens)).tolist() == written
    assert tokens.window(5, 100).tolist() == written[5:105] and tokens.window(3, 0).tolist() == []
    assert tokens.window(0, 1).dtype == np.int64
    for (start, count, size), text in zip(tokens.documents, TEXTS, strict=True):
        assert bytes(tokens.window(start, count)[:-1].tolist()).decode() == text
        assert size == len(text.encode()) == count - 1
    assert tokens.bytes_per_token == sum(len(text.encode()) for text in TEXTS) / len(written)
    with pytest.raises(IndexError):
        tokens.window(len(tokens) - 1, 2)


def test_vocabulary_beyond_two_bytes_is_written_in_four(tmp_path):
    class Wide(BytesTokenizer):
        vocab_size, end_of_text = 70_000, 69_999

    assert token_dtype(65535) == "uint16"
    tokens = Tokens(folder_of(tmp_path, Wide()), "val")
    assert tokens.window(len(tokens) - 1, 1).tolist() == [69_999]


# ---- damage


@pytest.mark.parametrize("name", ["train-00001.bin", "train-documents.npy", "card.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damaged_file_is_refused_by_name(folder, tmp_path, name, how):
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy" / name, how)
    with pytest.raises(Refusal, match=name):
        Tokens(tmp_path / "copy", "train")
    if name != "card.json":
        Tokens(tmp_path / "copy", "val")  # its own files are whole


def damage(path, how):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content if how == "flip" else content[:-3])


def test_altered_tokenizer_is_refused_by_name(tmp_path):
    folder_of(tmp_path, BPE)
    damage(tmp_path / "tokenizer.json", "flip")
    with pytest.raises(Refusal, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_change_of_any_file_is_refused_or_changes_nothing(folder, tmp_path_factory, data):
    before = Tokens(folder, "train").window(0, 200)
    copy = tmp_path_factory.mktemp("fuzz") / "copy"
    shutil.copytree(folder, copy)
    path = copy / data.draw(
        st.sampled_from(sorted(p.name for p in folder.iterdir() if p.name[:3] in ("tra", "car")))
    )
    content = path.read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[end:])
    try:
        after = Tokens(copy, "train").window(0, 200)
    except Refusal as refusal:
        assert path.name in str(refusal) and "\n" not in str(refusal)
    else:
        assert (after == before).all()  # such as another blank in the card
    shutil.rmtree(copy)


# ---- the sampler


class Row:
    """A split of n tokens that are their own positions."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def window(self, start, count):
        assert 0 <= start and start + count <= self.count
        return np.arange(start, start + count)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 16),
    windows=st.integers(1, 90),
    rest=st.integers(0, 15),
    world_size=st.integers(1, 5),
    local=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_every_window_comes_exactly_once_per_epoch_at_any_world_size(
    length, windows, rest, world_size, local, seed
):
    sampler = Windows(Row(windows * length + 1 + rest % length), length, seed)
    assert len(sampler) == windows
    batch = world_size * local
    epochs = 3 * windows
    seen = [
        int(row[0]) // length
        for step in range(-(-epochs // batch))
        for rank in range(world_size)
        for row in sampler.batch(step, rank, world_size, batch)
    ]
    for epoch in range(3):
        assert Counter(seen[epoch * windows : (epoch + 1) * windows]) == Counter(range(windows))


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 10**9), seed=st.integers(0, 2**32), windows=st.integers(1, 10**6))
def test_global_batch_does_not_depend_on_the_number_of_ranks(step, seed, windows):
    import torch

    sampler = Windows(Row(windows * 8 + 1), 8, seed)
    whole = sampler.batch(step, 0, 1, 12)
    assert whole.shape == (12, 9) and whole.dtype == torch.int64
    for world_size in (2, 3, 4, 6, 12):
        parts = [sampler.batch(step, rank, world_size, 12) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)


def test_every_token_but_the_first_is_a_target_exactly_once_per_epoch():
    sampler = Windows(Row(8 * 10 + 1), 8, seed=3)
    targets = sorted(sampler.batch(0, 0, 1, 10)[:, 1:].flatten().tolist())
    assert targets == list(range(1, 81))


def test_epochs_and_seeds_differ_in_order_and_seed_none_keeps_that_on_disk():
    def order(seed, epoch):
        return Windows(Row(801), 8, seed).indices(epoch, 0, 1, 100)

    assert order(None, 0) == order(None, 5) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_validation_windows_lie_all_over_the_split_and_none_comes_twice():
    windows = Windows(Row(8 * 10 + 1), 8, seed=None)
    assert windows.spread(4)[:, 0].tolist() == [0, 16, 40, 56]
    assert windows.spread(99)[:, 0].tolist() == list(range(0, 80, 8))  # all there are
    assert windows.spread(1).shape == (1, 9)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000])
def test_shuffle_reaches_every_element_and_looks_uniform(count):
    assert sorted(shuffled(i, count, "key") for i in range(count)) == list(range(count))
    if count == 5:
        firsts = Counter(shuffled(0, 5, key) for key in range(5000))
        assert all(abs(firsts[element] - 1000) < 150 for element in range(5))  # five standard deviations


def test_shuffle_is_pinned_because_resuming_after_an_update_must_go_on_in_the_same_order():
    assert [shuffled(i, 10, "1/0") for i in range(10)] == [1, 6, 9, 0, 5, 3, 8, 7, 4, 2]


def test_batch_that_ranks_cannot_share_and_split_shorter_than_a_sequence_are_refused():
    with pytest.raises(
        Refusal, match=r"batch_sequences \(8\) must be divisible by the number of ranks \(3\)"
    ):
        Windows(Row(100), 8, 1).batch(0, 0, 3, 8)
    with pytest.raises(Refusal, match="shorter than one sequence"):
        Windows(Row(8), 8, 1)


# ---- tokenizers


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), BPE], ids=["bytes", "bpe"])
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(
        0 <= id < tokenizer.vocab_size and id != tokenizer.end_of_text for id in tokenizer.encode(text)
    )
    (batched,) = tokenizer.encode_batch([text])
    assert list(batched) == tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(data=st.binary())
@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), BPE], ids=["bytes", "bpe"])
def test_any_bytes_survive_encoding_and_decoding(tokenizer, data):
    assert tokenizer.bytes_of(tokenizer.encode(data.decode("utf-8", errors="surrogateescape"))) == data


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), BPE], ids=["bytes", "bpe"])
def test_text_that_spells_the_end_of_text_is_text(tokenizer):
    text = f"before {END_OF_TEXT} after"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), BPE], ids=["bytes", "bpe"])
def test_tokenizer_is_the_same_after_loading(tmp_path, tokenizer):
    loaded = load_tokenizer(folder_of(tmp_path, tokenizer))
    text = f"def second(): {END_OF_TEXT} ünd\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_any_tokens_decode_to_text(ids):
    assert isinstance(BPE.decode(ids), str)
    assert len(hashlib.sha256(BPE.bytes_of(ids)).digest()) == 32

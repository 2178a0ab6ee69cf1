"""Every split gets the documents it needs, and a corpus that has enough is split by checksum alone."""

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.splits import FEWEST, Document, choose, moved, refuse_few, refuse_short, split_documents
from stages.files.artifacts import Refusal
from stages.settings.compose import compose
from stages.settings.schema import validate

SHARES = (0.04, 0.10)


def documents_of(count, seed=1, size=100):
    return [Document(hashlib.sha256(f"{seed}/{n}".encode()).digest(), n * size, size) for n in range(count)]


def by_checksum(documents, val_share, test_share):
    """The rule for a large corpus, document by document."""
    splits = {"train": [], "val": [], "test": []}
    for document in sorted(documents):
        fraction = int.from_bytes(document.digest[:8], "big") / 2**64
        split = "test" if fraction < test_share else "val" if fraction < test_share + val_share else "train"
        splits[split].append(document)
    return splits


@given(st.integers(4, 200), st.integers(0, 10**6), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_each_split_has_enough_no_document_is_lost_or_twice_and_enough_is_left_alone(count, seed, val, test):
    documents = documents_of(count, seed)
    splits, plain = split_documents(documents, val, test), by_checksum(documents, val, test)
    assert all(len(splits[split]) >= fewest for split, fewest in FEWEST.items())
    assert splits["test"] + splits["val"] + splits["train"] == sorted(documents)
    if all(len(plain[split]) >= fewest for split, fewest in FEWEST.items()):
        assert splits == plain and moved(splits, val, test) == 0
    else:
        assert splits != plain and moved(splits, val, test) > 0
    shuffled = random.Random(seed).sample(documents, count)
    assert split_documents(shuffled, val, test) == splits


@given(st.integers(4, 120), st.integers(0, 10**6), st.integers(1, 150))
def test_a_limit_on_documents_leaves_none_out_of_a_corpus_that_has_no_more(count, seed, most):
    splits = split_documents(documents_of(count, seed), *SHARES)
    chosen = choose(splits, most, *SHARES)
    if count <= most:
        assert chosen == splits
    else:
        assert all(chosen[name] == splits[name][: len(chosen[name])] and chosen[name] for name in splits)


@pytest.mark.parametrize("count", [4, 10, 56])
def test_small_corpora_of_any_content_can_be_split(count):
    for seed in range(300):
        splits = split_documents(documents_of(count, seed), *SHARES)
        assert all(len(splits[split]) >= fewest for split, fewest in FEWEST.items())


def test_too_few_documents_are_told_with_what_was_left_out():
    with pytest.raises(Refusal) as caught:
        refuse_few(documents_of(1), ["3 empty documents", "99 exact duplicates"])
    besides = "(left out: 3 empty documents, 99 exact duplicates)"
    assert f"it has 1 document {besides} and the splits need 4; give more" in str(caught.value)


def short(count, size, unused=0, tokens=20, split="val", max_documents=0):
    splits = split_documents(documents_of(count, size=size), *SHARES)
    parts = {
        "train": {"tokens": size * len(splits["train"]), "documents": len(splits["train"]), "bytes_per_token": 1.0},
        split: {"tokens": tokens, "documents": len(splits[split]), "bytes_per_token": 1.0},
    }
    plain = compose(["scale=tiny", "corpus=stdlib", f"prepare.max_documents={max_documents}"])
    with pytest.raises(Refusal) as caught:
        refuse_short(split, parts, splits, unused, validate(plain).prepare, sequence=64)
    assert f"its {split} split has {tokens} tokens" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_limit_that_left_documents_out_is_named_with_its_value():
    message = short(60, 20, unused=4940, max_documents=60)
    assert "prepare.max_documents is 60 and left out 4,940 documents" in message
    assert "write prepare: {max_documents: 0} (all) into params.yaml" in message
    assert "give more text" not in message and "share" not in message


def test_a_share_is_proposed_only_where_it_helps():
    assert "set prepare.val_share=0.1" in short(100, 20)
    assert "share" not in short(4, 20), "there is not enough text for any share"
    assert "share" not in short(100, 0, split="train"), "training has no share of its own"

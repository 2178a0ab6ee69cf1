"""Near-duplicates are found as a comparison of all pairs finds them, and never stand on both sides of a split."""

import json
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import prepare, texts_of

from stages.data import near_duplicates
from stages.data.near_duplicates import NearDuplicates, grams, same_band, share_seen, similarity
from stages.data.shards import SPLITS
from stages.files.artifacts import Refusal

N = 8


def sentences(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(f"w{chance.randrange(5000)}" for _ in range(12)) + "." for _ in range(count)]


def edited(lines: list[str], changes: int, seed: int) -> list[str]:
    chance, lines = random.Random(seed), list(lines)
    for number in chance.sample(range(len(lines)), changes):
        lines[number] = sentences(1, seed * 1000 + number)[0]
    return lines


def corpus_of_copies() -> list[bytes]:
    """Twelve families of a text and its edits, from light ones to none in common, and 40 texts of their own."""
    texts = []
    for family in range(12):
        lines = sentences(40, family)
        texts += ["\n".join(edited(lines, changes, changes + 1)) for changes in (0, 2, 6, 25)]
    texts += ["\n".join(sentences(40, 100 + number)) for number in range(40)]
    random.Random(5).shuffle(texts)
    return [text.encode() for text in texts]


def all_pairs(texts: list[bytes], above: float) -> set[frozenset[int]]:
    """The groups that comparing each with each gives."""
    group = {number: {number} for number in range(len(texts))}
    for one, other in combinations(range(len(texts)), 2):
        if word_similarity(texts[one], texts[other]) > above:
            joined = group[one] | group[other]
            group |= dict.fromkeys(joined, joined)
    return {frozenset(members) for members in group.values() if len(members) > 1}


def word_similarity(one: bytes, other: bytes) -> float:
    """By sets of tuples of words, without a hash of ours."""
    first, second = (
        {tuple(words[i : i + N]) for i in range(max(1, len(words) - N + 1))} for words in (one.split(), other.split())
    )
    return len(first & second) / len(first | second)


def groups(texts: list[bytes], above: float) -> set[frozenset[int]]:
    near = NearDuplicates(N, above)
    for text in texts:
        near.add(text)
    return set(map(frozenset, near.groups(lambda number: texts[number], lambda: None)))


@pytest.mark.parametrize("above", [0.5, 0.8])
def test_groups_are_those_of_comparing_all_pairs(above):
    texts = corpus_of_copies()
    expected = all_pairs(texts, above)
    assert len(expected) == 12 and groups(texts, above) == expected


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcd"), max_size=40))
def test_similarity_is_that_of_sets_of_words(one, other):
    one, other = " ".join(one).encode(), "\n ".join(other).encode()
    assert similarity(grams(one, N), grams(other, N)) == pytest.approx(word_similarity(one, other))


def test_white_space_is_no_difference_and_a_short_text_is_one_gram():
    assert (grams(b"a  b\n\tc d", 2) == grams(b"a b c d", 2)).all()
    assert len(grams(b"a b c", 8)) == len(grams(b"", 8)) == 1
    assert len(grams(b"a b c", 3)) == 1 and len(grams(b"a b c", 2)) == 2


def test_documents_that_share_a_band_are_compared_in_linear_time():
    rows = np.array([[1, 1], [2, 2], [1, 1], [3, 3], [1, 1], [2, 2], [1, 1]])
    pairs = list(same_band(rows))
    assert {frozenset(pair) for pair in pairs} >= {frozenset(pair) for pair in [(0, 2), (2, 4), (4, 6), (1, 5)]}
    assert len(list(same_band(np.zeros((1000, 3))))) < 2000, "not half a million"
    assert not list(same_band(np.arange(12).reshape(4, 3)))


def test_the_share_seen_counts_each_gram_as_often_as_it_occurs(monkeypatch):
    assert share_seen([b"a b c a b"], [b"x a b y"], 2) == pytest.approx(2 / 4)
    assert share_seen([b"a b"], [b"c d"], 2) == 0 and share_seen([b"a b"], [b"a  b"], 2) == 1
    lines = sentences(400, 1)
    test, train = "\n".join(lines).encode(), "\n".join(lines[:200]).encode()
    exact = share_seen([test], [train], N)
    monkeypatch.setattr(near_duplicates, "MOST_PROBES", 1000)
    assert share_seen([test, test], [train], N) == pytest.approx(exact, abs=0.05), "a sample of the grams"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "texts").mkdir()
    for number, text in enumerate(corpus_of_copies()):
        (root / f"texts/{number:03d}.txt").write_bytes(text)
    return root


def near_pairs_across(folder) -> int:
    texts = {split: [text.encode() for text in texts_of(folder, split)] for split in SPLITS}
    return sum(
        word_similarity(one, other) > 0.5
        for first, second in combinations(SPLITS, 2)
        for one in texts[first]
        for other in texts[second]
    )


def read_card(folder):
    return json.loads((folder / "card.json").read_text())


def test_near_duplicates_are_dropped_grouped_or_kept(root, tmp_path):
    words = ("keep", "group", "drop")
    folders = {word: prepare(root, tmp_path / word, f"prepare.near_duplicates={word}") for word in words}
    cards = {word: read_card(folder) for word, folder in folders.items()}
    counts = {word: sum(part["documents"] for part in card["splits"].values()) for word, card in cards.items()}
    assert counts == {"keep": 88, "group": 88, "drop": 64}
    assert near_pairs_across(folders["keep"]) > 0, "else this test shows nothing"
    assert near_pairs_across(folders["group"]) == near_pairs_across(folders["drop"]) == 0
    assert "near_duplicates" not in cards["keep"]
    for word, dropped in (("group", 0), ("drop", 24)):
        near = cards[word]["near_duplicates"]
        assert (near["groups"], near["documents"], near["dropped"], near["handling"]) == (12, 36, dropped, word)
    said = (folders["drop"] / "CORPUS.md").read_text()
    assert "36 documents in 12 groups share more than 0.5 of their sets of 8 words; 24 were dropped" in said
    assert read_card(folders["drop"])["near_duplicates"]["share_of_test_seen_in_training"] < 0.5


def test_a_document_without_near_duplicates_keeps_its_split(root, tmp_path):
    kept, dropped = (prepare(root, tmp_path / word, f"prepare.near_duplicates={word}") for word in ("keep", "drop"))
    for split in SPLITS:
        assert set(texts_of(dropped, split)) <= set(texts_of(kept, split))


def test_nothing_but_copies_of_one_text_cannot_be_split(tmp_path):
    (tmp_path / "texts").mkdir()
    lines = sentences(100, 1)
    for number in range(9):
        (tmp_path / f"texts/{number}.txt").write_text("\n".join(edited(lines, 3, number)))
    with pytest.raises(Refusal, match=r"has 1 document \(left out: 8 near-duplicates\) and the splits need 4"):
        prepare(tmp_path, tmp_path / "out")

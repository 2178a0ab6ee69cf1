"""Near-duplicates among documents, by MinHash: found while a corpus is read, told by their n-grams of words.

Two documents are near-duplicates if the Jaccard similarity of their sets of word n-grams is above a threshold (Broder
1997; for language models Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better"). The signatures
come from `datasketch`. Documents that agree in a band of a signature are compared, first by signature, then exactly.

Memory is 512 bytes for each document. Time is linear: in a band's bucket each document is compared with the first of
the bucket and with its neighbour only. Of two documents at similarity 0.5 the bands miss 1 in 300.

Words are what white space divides. A document of fewer words than an n-gram has one gram, its whole text.
Shapes: D documents, P permutations, G grams.
"""

import zlib
from collections.abc import Callable, Iterable

import numpy as np

PERMUTATIONS, BAND_ROWS = 128, 3  # 42 bands: two documents at similarity s share none with chance (1 - s^3)^42
BATCH_GRAMS = 4096  # whose permuted values, 128 each, stand in memory together
ESTIMATE_MARGIN = 0.2  # four standard errors of a signature's similarity: below the threshold by more, not compared
MOST_PROBES = 1 << 22  # distinct grams of a test split that are looked up; of more, a sample by hash


def grams(text: bytes, words_per_gram: int) -> np.ndarray:
    """The 64-bit hash of each n-gram of words, in order and with repetitions: uint64 [G], at least one."""
    words = np.fromiter(map(zlib.crc32, text.split() or [b""]), dtype=np.uint64)
    size = min(words_per_gram, len(words))
    hashes = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for offset in range(size):
        hashes = _mixed(hashes ^ words[offset : offset + len(hashes)])
    return hashes


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer, a bijection."""
    for constant in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(constant)
    return hashes ^ (hashes >> np.uint64(33))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets of grams, exact up to a collision of hashes."""
    one, other = np.unique(one), np.unique(other)
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


class NearDuplicates:
    """Signatures of documents in the order of reading, and the groups that they form."""

    def __init__(self, words_per_gram: int, above: float):
        from datasketch import MinHash  # here: it loads SciPy, half a second

        self.words_per_gram, self.above = words_per_gram, above
        self._sketch = MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
        self._signatures: list[np.ndarray] = []

    def add(self, text: bytes) -> None:
        self._sketch.clear()
        hashes = np.unique(grams(text, self.words_per_gram) >> np.uint64(32))
        for start in range(0, len(hashes), BATCH_GRAMS):
            self._sketch.update_batch(hashes[start : start + BATCH_GRAMS].tolist())
        self._signatures.append(self._sketch.digest())

    def groups(self, text_of: Callable[[int], bytes], check: Callable[[], None]) -> list[list[int]]:
        """Documents by their numbers, in groups of two or more that near-duplicates connect.

        `text_of` gives a document's text again; `check` is called now and then, and may raise.
        """
        signatures_DP = np.array(self._signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        parent, compared = list(range(len(signatures_DP))), set()

        def root(number):
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return number

        for start in range(0, PERMUTATIONS - BAND_ROWS + 1, BAND_ROWS):
            for pair in same_band(signatures_DP[:, start : start + BAND_ROWS]):
                one, other = sorted(map(root, pair))
                if one == other or pair in compared:
                    continue
                check()
                compared.add(pair)
                if self._near(signatures_DP, pair, text_of):
                    parent[other] = one
        found: dict[int, list[int]] = {}
        for number in range(len(parent)):
            found.setdefault(root(number), []).append(number)
        return [group for group in found.values() if len(group) > 1]

    def _near(self, signatures_DP: np.ndarray, pair: tuple[int, int], text_of: Callable[[int], bytes]) -> bool:
        one, other = signatures_DP[list(pair)]
        if (one == other).mean() < self.above - ESTIMATE_MARGIN:
            return False
        return similarity(*(grams(text_of(number), self.words_per_gram) for number in pair)) > self.above


def same_band(rows_DR: np.ndarray) -> Iterable[tuple[int, int]]:
    """Pairs of documents whose rows are equal: each with the first of its equals, and with the one before it."""
    order_D = np.lexsort(rows_DR.T)  # stable: equals stay in order
    sorted_DR = rows_DR[order_D]
    equal_D = (sorted_DR[1:] == sorted_DR[:-1]).all(axis=1)  # with the one before
    first = 0
    for place in np.flatnonzero(equal_D).tolist():
        if place == 0 or not equal_D[place - 1]:
            first = place
        yield int(order_D[first]), int(order_D[place + 1])
        if first != place:
            yield int(order_D[place]), int(order_D[place + 1])


def share_seen(texts: Iterable[bytes], among: Iterable[bytes], words_per_gram: int) -> float:
    """The share of the grams of `texts` that also stand in `among`, each as often as it occurs.

    Of very long texts a sample is looked up: the grams whose hash is divisible by 2, 4, 8 and so on.
    """
    counts: dict[int, int] = {}
    every = 1
    for text in texts:
        for gram, count in zip(*_counted(grams(text, words_per_gram), every), strict=True):
            counts[gram] = counts.get(gram, 0) + count
        while len(counts) > MOST_PROBES:
            every *= 2
            counts = {gram: count for gram, count in counts.items() if gram % every == 0}
    probes = np.array(sorted(counts), dtype=np.uint64)
    seen = np.zeros(len(probes), dtype=bool)
    for text in among:
        hashes = np.unique(grams(text, words_per_gram))
        places = np.minimum(np.searchsorted(probes, hashes), len(probes) - 1)
        seen[places[probes[places] == hashes]] = True
    occurrences = np.array([counts[gram] for gram in probes.tolist()])
    return float(occurrences[seen].sum() / occurrences.sum())


def _counted(hashes: np.ndarray, every: int) -> tuple[list[int], list[int]]:
    distinct, count = np.unique(hashes[hashes % np.uint64(every) == 0], return_counts=True)
    return distinct.tolist(), count.tolist()

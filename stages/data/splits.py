"""Which documents train, which validate and which test.

A document's split is a function of its own text: its SHA-256, read as a number in [0, 1), is below prepare.test_share,
below that and prepare.val_share, or above both. In a small corpus, where a split would lack the documents it needs,
the border moves to the next checksums. No document is in two splits. Of near-duplicates one leads, and the others go
where it goes, or nowhere.
"""

from bisect import bisect_left
from hashlib import sha256
from typing import Any, NamedTuple

from stages.files.artifacts import Refusal
from stages.settings.schema import Prepare

FEWEST = {"train": 1, "val": 1, "test": 2}  # documents; an interval over documents needs two
FEWEST_HELD_OUT = 4  # documents of validation and of test that max_documents leaves
LARGER_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


class Document(NamedTuple):
    digest: bytes  # SHA-256 of the text
    start: int  # in the spool
    size: int  # utf-8 bytes


Splits = dict[str, list[Document]]


def leaders(documents: list[Document], groups: list[list[int]]) -> tuple[list[Document], dict[bytes, list[Document]]]:
    """Of each group of near-duplicates one document, beside all documents of no group; and the others by its digest.

    The leader is chosen by a checksum of checksums, so that a group is no likelier to be tested than a document is.
    """
    followers = {}
    for group in groups:
        members = sorted((documents[number] for number in group), key=lambda one: sha256(one.digest).digest())
        followers[members[0].digest] = members[1:]
    following = {document.digest for others in followers.values() for document in others}
    return [document for document in documents if document.digest not in following], followers


def with_followers(splits: Splits, followers: dict[bytes, list[Document]]) -> Splits:
    """Each near-duplicate to the split of its leader."""
    return {
        split: sorted(other for leader in part for other in (leader, *followers.get(leader.digest, ())))
        for split, part in splits.items()
    }


def split_documents(documents: list[Document], val_share: float, test_share: float) -> Splits:
    """Each document to the split of its checksum, and at least FEWEST to each; of fewer than four there is no split."""
    documents = sorted(documents)
    test, val = borders(documents, val_share, test_share)
    count = len(documents)
    test = min(max(test, FEWEST["test"]), count - FEWEST["val"] - FEWEST["train"])
    val = min(max(val, test + FEWEST["val"]), count - FEWEST["train"])
    return {"train": documents[val:], "val": documents[test:val], "test": documents[:test]}


def borders(documents: list[Document], val_share: float, test_share: float) -> tuple[int, int]:
    """How many of the sorted documents have checksums below the share of test, and below that of test and val."""
    fractions = [int.from_bytes(document.digest[:8], "big") / 2**64 for document in documents]
    return bisect_left(fractions, test_share), bisect_left(fractions, test_share + val_share)


def moved(splits: Splits, val_share: float, test_share: float) -> int:
    """Documents that are in another split than their checksum says, so that each split has enough."""
    documents = sorted(document for part in splits.values() for document in part)
    test, val = borders(documents, val_share, test_share)
    by_checksum = {"train": documents[val:], "val": documents[test:val], "test": documents[:test]}
    return sum(len(set(part) - set(by_checksum[split])) for split, part in splits.items())


def choose(splits: Splits, max_documents: int, val_share: float, test_share: float) -> Splits:
    """The first documents by checksum, in each split its share of max_documents; all where there are no more (or 0)."""
    if not max_documents or sum(map(len, splits.values())) <= max_documents:
        return splits
    val = max(FEWEST_HELD_OUT, round(max_documents * val_share))
    test = max(FEWEST_HELD_OUT, round(max_documents * test_share))
    quota = {"train": max(1, max_documents - val - test), "val": val, "test": test}
    return {split: documents[: quota[split]] for split, documents in splits.items()}


def refuse_few(documents: list[Document], left_out: list[str]) -> None:
    """Too few to split at all. `left_out`: what else there was, such as "99 exact duplicates"."""
    need = sum(FEWEST.values())
    if len(documents) < need:
        besides = f" (left out: {', '.join(left_out)})" if left_out else ""
        has = f"{len(documents)} document{'s' * (len(documents) != 1)}"
        raise Refusal(f"the corpus is too small: it has {has}{besides} and the splits need {need}; give more documents")


def refuse_short(split: str, parts: dict[str, Any], splits: Splits, unused: int, knobs: Prepare, sequence: int) -> None:
    """A split without a single sequence, and the setting that helps. max_documents left `unused` documents out."""
    part = parts[split]
    if part["tokens"] >= sequence + 1:
        return
    cures = ["give more text"]
    if unused:
        limit = f"prepare.max_documents is {knobs.max_documents} and left out {unused:,} documents"
        cures = [f"{limit}: write prepare: {{max_documents: 0}} (all) into params.yaml"]
    elif share := share_that_helps(split, parts, splits, knobs, sequence):
        cures.append(f"set prepare.{split}_share={share:g}")
    raise Refusal(
        f"the corpus is too small: its {split} split has {part['tokens']} tokens in {part['documents']} "
        f"documents, and a sequence is {sequence + 1}; {' or '.join([*cures, 'lower sequence_tokens'])}"
    )


def share_that_helps(split: str, parts: dict[str, Any], splits: Splits, knobs: Prepare, sequence: int) -> float | None:
    """The smallest larger share with which every split is long enough, by the bytes of a training token."""
    documents = [document for part in splits.values() for document in part]
    enough = 1.2 * (sequence + 1) * parts["train"]["bytes_per_token"]
    shares = {"val_share": knobs.val_share, "test_share": knobs.test_share}
    for share in LARGER_SHARES if f"{split}_share" in shares else ():
        larger = split_documents(documents, **shares | {f"{split}_share": share})
        if share > shares[f"{split}_share"] and all(sum(doc.size for doc in part) > enough for part in larger.values()):
            return share
    return None

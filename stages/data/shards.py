"""Tokens on disk: written once by `prepare`, memory-mapped by every stage after it, checked by checksum.

    tokens = Tokens("artifacts/data", "train")
    windows = Windows(tokens, sequence_tokens=256, seed=1)
    tokens_BT = windows.batch(step=12, rank=0, world_size=2, batch_sequences=32)     # B = 16, T = 257
    tokenizer = load_tokenizer("artifacts/data")

The batch of a step is a pure function of (seed, step, rank, world size): resuming at a step needs no state.
"""

import hashlib
import io
import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.files.artifacts import Refusal, read_json, sha256_of, write_atomically, write_json

SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
TOKENIZER, CARD = "tokenizer.json", "card.json"


# ---- the card


def write_card(folder, card):
    """The card goes last: a folder without one is unfinished. It vouches for every file, and for itself."""
    write_json(Path(folder) / CARD, card | {"sha256": _card_sha256(card)})


def read_card(folder):
    """What is in the folder, as `prepare` recorded it."""
    path = Path(folder) / CARD
    card = read_json(path)
    if not isinstance(card, dict) or card.get("sha256") != _card_sha256(card):
        raise _altered(path)
    return card


def _card_sha256(card):
    rest = {key: value for key, value in card.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _altered(path, what="its content is not what was recorded"):
    return Refusal(f"{path} is damaged ({what}): delete {Path(path).parent} and run dvc repro")


def _check(path, sha256, size=None):
    if not path.is_file():
        raise _altered(path, "it is missing")
    if size is not None and path.stat().st_size != size:
        raise _altered(path, f"{path.stat().st_size} bytes where {size} were written")
    if sha256 is not None and sha256_of(path) != sha256:
        raise _altered(path)


# ---- shards


def token_dtype(vocab_size):
    """Two bytes a token while they suffice."""
    return "uint16" if vocab_size <= 65535 else "uint32"


class Written(NamedTuple):
    """What of a split is on disk: its documents so far, of the last perhaps only the beginning, and its shards."""

    table: list  # of (start token, tokens, utf-8 bytes)
    shards: list  # as the card names them


def write_split(folder, split, documents, tokenizer, shard_tokens, written=None, on_shards=lambda written: None):
    """Write a split's shards and its table of documents; returns its part of the card.

    `documents` yields (tokens, utf-8 bytes); each is closed by one end-of-text token, which counts no byte. To
    continue after what was `written`, give the documents from its last one on. `on_shards` hears of every step.
    """
    folder, dtype = Path(folder), np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    ending = np.asarray([tokenizer.end_of_text], dtype=dtype)
    table, shards = (list(part) for part in written or Written([], []))
    tokens = table.pop()[0] if table else 0  # where the first document to come starts
    skip = sum(shard["tokens"] for shard in shards) - tokens  # of its tokens, already in the shards
    waiting, held = [], 0

    def write_shard(content):
        path = folder / f"{split}-{len(shards):05d}.bin"
        data = content.tobytes()
        write_atomically(path, data)
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append({"file": path.name, "tokens": len(content), "sha256": sha256})

    for ids, size in documents:
        table.append((tokens, len(ids) + 1, size))
        waiting.append(np.append(np.asarray(ids, dtype=dtype), ending)[skip:])
        tokens, held, skip = tokens + len(ids) + 1, held + len(waiting[-1]), 0
        if held >= shard_tokens:
            joined = np.concatenate(waiting)
            whole = held - held % shard_tokens
            for start in range(0, whole, shard_tokens):
                write_shard(joined[start : start + shard_tokens])
            waiting, held = [joined[whole:]], held - whole
            on_shards(Written(table, shards))
    if held:
        write_shard(np.concatenate(waiting))

    buffer = io.BytesIO()
    np.save(buffer, np.asarray(table, dtype="<i8").reshape(-1, 3), allow_pickle=False)
    path = folder / f"{split}-documents.npy"
    write_atomically(path, buffer.getvalue())
    total = sum(size for _, _, size in table)
    return {
        "documents": len(table),
        "bytes": total,
        "tokens": tokens,
        "bytes_per_token": total / max(tokens, 1),
        "shards": shards,
        "documents_table": {"file": path.name, "sha256": sha256_of(path)},
    }


class Tokens:
    """All the tokens of a split as one row, memory-mapped; refused, by name, when a file is not as written.

    `.documents` is int64 [n_documents, 3]: start token, token count (with the end-of-text), utf-8 bytes.
    `verify=False` compares sizes only, for ranks whose stage process has verified the same folder.
    """

    def __init__(self, folder, split, verify=True):
        folder, card = Path(folder), read_card(folder)
        if split not in card["splits"]:
            raise Refusal(f"{folder} has no split {split!r}: it has {', '.join(card['splits'])}")
        part = card["splits"][split]
        dtype = np.dtype(card["dtype"]).newbyteorder("<")
        self.vocab_size, self.end_of_text, self.bytes = card["vocab_size"], card["end_of_text"], part["bytes"]
        self._starts, self._shards, total = [], [], 0
        for shard in part["shards"]:
            path = folder / shard["file"]
            _check(path, shard["sha256"] if verify else None, shard["tokens"] * dtype.itemsize)
            self._starts.append(total)
            self._shards.append(np.memmap(path, dtype=dtype, mode="r"))
            total += shard["tokens"]
        self._total = total
        table = folder / part["documents_table"]["file"]
        _check(table, part["documents_table"]["sha256"])  # small, and read whole anyway
        try:
            with open(table, "rb") as file:
                self.documents = np.lib.format.read_array(file, allow_pickle=False).astype(np.int64)
        except (ValueError, MemoryError):  # not numbers, or more than there are
            raise _altered(table, "it is not a table of numbers") from None
        self.bytes_per_token = self.bytes / max(total, 1)

    def __len__(self):
        return self._total

    def window(self, start, count):
        """`count` tokens from `start` on, across shards, as int64."""
        if start < 0 or count < 0 or start + count > self._total:
            raise IndexError(f"tokens {start} to {start + count} of {self._total}")
        result, filled = np.empty(count, dtype=np.int64), 0
        number = bisect_right(self._starts, start) - 1
        while filled < count:
            inside = start + filled - self._starts[number]
            piece = self._shards[number][inside : inside + count - filled]
            result[filled : filled + len(piece)] = piece
            filled, number = filled + len(piece), number + 1
        return result


# ---- the sampler


class Windows:
    """Windows of sequence_tokens + 1 tokens, in an order that each epoch shuffles anew.

    Neighbours share one token (the last target of one is the first input of the next), so every token of the
    split but the very first is a target exactly once per epoch. With seed None the order is that on disk.
    """

    def __init__(self, tokens, sequence_tokens, seed):
        self.tokens, self.sequence_tokens, self.seed = tokens, sequence_tokens, seed
        self.count = (len(tokens) - 1) // sequence_tokens
        if self.count < 1:
            raise Refusal(
                f"a split of {len(tokens)} tokens is shorter than one sequence: "
                f"sequence_tokens is {sequence_tokens}, lower it or give more text"
            )

    def __len__(self):
        return self.count

    def indices(self, step, rank, world_size, batch_sequences):
        """Which windows this rank reads at this step: its slice of the step's global batch."""
        if batch_sequences % world_size:
            ranks = f"the number of ranks ({world_size}): change it or trainer.ranks"
            raise Refusal(f"batch_sequences ({batch_sequences}) must be divisible by {ranks}")
        local = batch_sequences // world_size
        first = step * batch_sequences + rank * local
        positions = range(first, first + local)  # in the endless row of epochs; a batch may straddle two
        return [self._window_at(*divmod(position, self.count)) for position in positions]

    def batch(self, step, rank=0, world_size=1, batch_sequences=1):
        """tokens_BT, int64: B = batch_sequences / world_size, T = sequence_tokens + 1."""
        return self._stacked(self.indices(step, rank, world_size, batch_sequences))

    def spread(self, most):
        """At most so many windows, as far apart as the split allows, as one batch [B, T]: what to validate on.

        The first of a split would be a few of its documents; these are a sample of all.
        """
        count = min(most, self.count)
        return self._stacked([number * self.count // count for number in range(count)])

    def _stacked(self, indices):
        import torch  # here, because `prepare` writes shards without it

        length = self.sequence_tokens
        return torch.from_numpy(np.stack([self.tokens.window(index * length, length + 1) for index in indices]))

    def _window_at(self, epoch, position):
        return position if self.seed is None else shuffled(position, self.count, f"{self.seed}/{epoch}")


def shuffled(position, count, key, rounds=6):
    """The element at `position` of a shuffle of range(count): a Feistel network that walks until it lands.

    Computed, not stored: no permutation of a billion windows in memory, and no dependence on the version of
    a random number library (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)  # the domain is 4**half, less than 4 * count
    mask, element = (1 << half) - 1, position
    while True:
        left, right = element >> half, element & mask
        for number in range(rounds):
            digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        element = left << half | right
        if element < count:
            return element


# ---- tokenizers


class BytesTokenizer:
    """A token is a byte; 256 ends a text."""

    kind, vocab_size, end_of_text, prefix_bytes = "bytes", 257, 256, 0

    def encode(self, text):
        return list(_utf8(text))

    def encode_batch(self, texts):
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def bytes_of(self, ids):
        ending = END_OF_TEXT.encode()
        return b"".join(ending if id == self.end_of_text else bytes([id]) for id in ids)

    def decode(self, ids):
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def to_json(self):
        return json.dumps({"tokenizer": "bytes", "version": 1}) + "\n"


class BpeTokenizer:
    """Byte-level BPE. Nothing is unknown to it, and text that spells <|endoftext|> is text, not the token."""

    kind, prefix_bytes = "bpe", 0

    def __init__(self, tokenizer):
        tokenizer.encode_special_tokens = True  # not kept in tokenizer.json, hence set at each load
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._bytes = [
            bytes(byte_of[character] for character in tokenizer.id_to_token(id))
            if id != self.end_of_text
            else END_OF_TEXT.encode()
            for id in range(self.vocab_size)
        ]
        self._byte_ids = [tokenizer.token_to_id(character) for character in byte_alphabet()]

    def encode(self, text):
        """Token ids. Bytes that are not UTF-8 may come as Python spells them (surrogateescape)."""
        ids = []
        for piece in ODD_BYTES.split(text):
            if ODD_BYTES.fullmatch(piece):
                ids += [self._byte_ids[ord(character) - 0xDC00] for character in piece]
            elif piece:
                ids += self._tokenizer.encode(piece).ids
        return ids

    def encode_batch(self, texts):
        """Many valid texts at once, on every core."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def bytes_of(self, ids):
        return b"".join(self._bytes[id] for id in ids)

    def decode(self, ids):
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def to_json(self):
        return self._tokenizer.to_str(pretty=True)


ODD_BYTES = re.compile("([\udc80-\udcff]+)")


def _utf8(text):
    return text.encode("utf-8", errors="surrogateescape")


def byte_alphabet():
    """The 256 printable characters that stand for bytes in GPT-2's byte-level BPE, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def load_tokenizer(folder):
    """The tokenizer that made the folder's tokens; refused when its file is not the recorded one."""
    card, path = read_card(folder), Path(folder) / TOKENIZER
    _check(path, card["tokenizer_sha256"])
    if card["tokenizer"] == "bytes":
        return BytesTokenizer()
    import tokenizers

    from stages.data.file_tokenizer import FileTokenizer  # which imports this module

    if card["tokenizer"] == FileTokenizer.kind:
        return FileTokenizer(path, card["vocab_size"], card["end_of_text"])

    try:
        return BpeTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises no narrower type
        raise _altered(path, f"it is no tokenizer: {' '.join(str(error).split())[:200]}") from None

"""Batches from memory-mapped shards: ours, checked and in an order that covers every token, against nanoGPT's
random offsets into one file."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.table import Row
from benchmarks.timing import Action, interleaved
from stages.data.shards import BytesTokenizer, Tokens, Windows, token_dtype, write_card, write_split

DOCUMENT_TOKENS = 1000
SHARD_TOKENS = 1 << 20


def shard_folder(folder: Path, tokens: int) -> Path:
    """What `prepare` would leave, of random bytes."""
    tokenizer, generator = BytesTokenizer(), np.random.Generator(np.random.PCG64(0))
    documents = ((generator.integers(256, size=DOCUMENT_TOKENS - 1), 0) for _ in range(tokens // DOCUMENT_TOKENS))
    split = write_split(folder, "train", documents, tokenizer, SHARD_TOKENS)
    card = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    write_card(folder, card | {"dtype": token_dtype(tokenizer.vocab_size), "splits": {"train": split}})
    return folder


def one_file(folder: Path, path: Path) -> Path:
    """The same tokens as nanoGPT keeps them."""
    path.write_bytes(b"".join(shard.read_bytes() for shard in sorted(folder.glob("*.bin"))))
    return path


def random_offsets(path: Path, sequence_tokens: int, batch_sequences: int) -> tuple[Tensor, Tensor]:
    """nanoGPT's get_batch: opens the file each time, against a leak of numpy's."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - sequence_tokens, (batch_sequences,))
    x = torch.stack([torch.from_numpy(data[i : i + sequence_tokens].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + sequence_tokens].astype(np.int64)) for i in starts])
    return x, y


def our_batches(windows: Windows, batch_sequences: int) -> Action:
    step = 0

    def batch() -> Tensor:
        nonlocal step
        step += 1
        return windows.batch(step, batch_sequences=batch_sequences)

    return batch


def rows(
    tokens: int = 8_000_000,
    sizes: tuple[tuple[int, int], ...] = ((8, 256), (16, 2048)),
    batches: int = 100,
    seconds: float = 3.0,
) -> Iterator[Row]:
    """sizes: pairs of sequences and their tokens, those of the scales demo and gpu."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = shard_folder(Path(temporary) / "data", tokens)
        path = one_file(folder, Path(temporary) / "train.bin")
        for sequences, length in sizes:
            ours = our_batches(Windows(Tokens(folder, "train"), length, seed=1), sequences)
            theirs = partial(random_offsets, path, length, sequences)
            actions: dict[str, Action] = {
                "ours": partial(repeated, ours, batches),
                "nanoGPT": partial(repeated, theirs, batches),
            }
            times = interleaved(actions, seconds, least_rounds=5)
            rate = {name: batches * sequences * length / times.median(name) for name in actions}
            yield Row.of(
                "data",
                f"batches of {sequences} x {length} tokens",
                rate["ours"],
                "nanoGPT's get_batch",
                rate["nanoGPT"],
                "tokens/s",
                times.ratio("nanoGPT", "ours"),
                times.rounds,
            )


def repeated(action: Action, times: int) -> None:
    for _ in range(times):
        action()

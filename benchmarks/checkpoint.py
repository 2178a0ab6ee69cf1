"""What a checkpoint makes training wait for: a blocking torch.save, torch.distributed.checkpoint's async_save, ours.

Two figures per way: the stall until the next step may begin, and the whole time until the state is on disk.
"""

import contextlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.table import Row
from benchmarks.timing import Ratio, Timings, interleaved
from stages.training.checkpoints import Checkpoint

SIZES_BYTES = {"60 MB of state": 60_000_000, "1.2 GB of state": 1_200_000_000}
TENSORS = 12  # weights, momentum and second moments, as one float32 tensor in twelve


def state_of(size_bytes: int) -> dict[str, dict[str, torch.Tensor]]:
    numbers = torch.randn(size_bytes // 4 // TENSORS)
    return {"model": {f"{i}": numbers.clone() for i in range(TENSORS)}}


def rows(sizes_bytes: dict[str, int] = SIZES_BYTES, seconds: float = 20.0) -> Iterator[Row]:
    for what, size_bytes in sizes_bytes.items():
        with tempfile.TemporaryDirectory() as folder:
            yield from rows_of(what, state_of(size_bytes), Path(folder), seconds)


def rows_of(what: str, state, folder: Path, seconds: float) -> Iterator[Row]:
    stalls: dict[str, list[float]] = {"torch.save": [], "async_save": [], "ours": []}

    def blocking():
        started = time.perf_counter()
        with (folder / "blocking.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        stalls["torch.save"].append(time.perf_counter() - started)

    def distributed():
        started = time.perf_counter()
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            future = dcp.async_save(state, checkpoint_id=folder / "distributed", no_dist=True)
            stalls["async_save"].append(time.perf_counter() - started)
            future.result()

    checkpoint = Checkpoint(folder, "ours")

    def ours():
        started = time.perf_counter()
        checkpoint.save(1, state)
        stalls["ours"].append(time.perf_counter() - started)
        checkpoint.wait()

    times = interleaved({"torch.save": blocking, "async_save": distributed, "ours": ours}, seconds)
    # the first stall of each is of the untimed round, which grows the memory
    stall = Timings({name: taken[1:] for name, taken in stalls.items()}, {})
    for peer in ("torch.save", "async_save"):
        ratio, theirs = stall.ratio(peer, "ours"), stall.median(peer)
        yield row(f"{what}: stall of training", stall.median("ours"), peer, theirs, ratio, times.rounds)
    ratio = times.ratio("async_save", "ours")
    whole = f"{what}: until it is on disk"
    yield row(whole, times.median("ours"), "async_save", times.median("async_save"), ratio, times.rounds)


def row(what: str, ours: float, against: str, theirs: float, ratio: Ratio, rounds: int) -> Row:
    return Row.of("checkpoint", what, ours, against, theirs, "s", ratio, rounds)

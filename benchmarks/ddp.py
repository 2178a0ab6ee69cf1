"""What two ranks over gloo give against one process with as many threads: the teacher's training at the default scale,
through `python -m stages.pretrain` as a user types it."""

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.checkout import checkout, default_scale, events, stage
from benchmarks.table import Row
from benchmarks.timing import Timings

FIRST_STEPS = 2  # not counted: memory grows, DDP lays out its buckets


def step_seconds(root: Path, ranks: int, steps: int) -> float:
    """Median over the steps of one run, from one end to the next; the last is left out, for validation is in it."""
    stage(
        root, "pretrain", f"trainer.ranks={ranks}", "trainer.accelerator=cpu", f"pretrain.steps={steps}",
        f"pretrain.validate_every_steps={steps}", "pretrain.validation_sequences=2", "trainer.log_every_steps=1",
        f"hydra.run.dir=outputs/{ranks}",
    )  # fmt: skip
    ends = [event["time"] for event in events(root, "pretrain") if event.get("step")][FIRST_STEPS:-1]
    return median(after - before for before, after in pairwise(ends))


def tokens_per_step(root: Path) -> int:
    parameters = events(root, "pretrain")[0]["params"]
    return int(parameters["pretrain.batch_sequences"]) * int(parameters["sequence_tokens"])


def rows(scale: str = "", steps: int = 20, rounds: int = 3) -> Iterator[Row]:
    scale = scale or default_scale()
    taken: dict[str, list[float]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory() as folder:
        root = checkout(Path(folder), scale)
        for name in ("config", "prepare"):
            stage(root, name)
        for done in range(rounds):
            for ranks in (1, 2) if done % 2 == 0 else (2, 1):
                taken[str(ranks)].append(step_seconds(root, ranks, steps))
        tokens = tokens_per_step(root)
    times = Timings(taken, {})
    ours, theirs = (tokens / times.median(ranks) for ranks in ("2", "1"))
    yield Row.of(
        "DDP",
        f"two ranks, half the cores each, scale {scale}",
        ours,
        "one process, all cores",
        theirs,
        "tokens/s",
        times.ratio("1", "2"),
        times.rounds,
    )

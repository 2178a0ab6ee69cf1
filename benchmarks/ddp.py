"""What two ranks over gloo give against one process with as many threads: the teacher's training at the default scale,
through `python -m stages.pretrain` as a user types it. And what each collective of a step takes by itself."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.checkout import checkout, default_scale, events, stage
from benchmarks.table import Row
from benchmarks.timing import Timings
from stages.files.artifacts import read_json, write_json
from stages.training.optimizers import make_optimizer

FIRST_STEPS = 2  # not counted: memory grows, DDP lays out its buckets
BUCKETS_MB = (1, 5, 25)


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


def exchange(rank: int, ranks: int, folder: Path, floats: int, muon_floats: int, rounds: int) -> None:
    """A rank that does nothing but the collectives of a step, each by itself; rank zero writes their seconds."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    gradients, updates, message = torch.zeros(floats), torch.zeros(muon_floats).bfloat16(), torch.zeros(64)

    def reduce_in(bucket_bytes: int) -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in gradients.split(bucket_bytes // 4)]:
            work.wait()

    def send_updates() -> None:
        for owner, share in enumerate(updates.chunk(ranks)):
            dist.broadcast(share, src=owner)

    actions: dict[str, Callable[[], object]] = {
        f"all-reduce of the gradients in buckets of {size} MB": partial(reduce_in, size * 2**20) for size in BUCKETS_MB
    }
    actions |= {"broadcast of Muon's updates": send_updates, "losses and loads": lambda: dist.all_reduce(message)}
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for done in range(rounds + 1):
        for name, action in actions.items():
            dist.barrier()
            begun = time.perf_counter()
            action()
            if done:  # the first round connects
                taken[name].append(time.perf_counter() - begun)
    if rank == 0:
        write_json(folder / "seconds.json", taken)
    dist.destroy_process_group()


def collectives(floats: int, muon_floats: int, ranks: int = 2, rounds: int = 30) -> Timings:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(exchange, (ranks, Path(folder), floats, muon_floats, rounds), nprocs=ranks)
        return Timings(read_json(Path(folder) / "seconds.json"), {})


def collective_rows(scale: str, step_seconds: float) -> Iterator[Row]:
    """Beside a step: DDP does the first during the backward pass, where a core is free for it."""
    from stages.model.hub import build_teacher
    from stages.settings import schema as settings  # late: the groups of one device run where torch alone is installed
    from stages.settings.compose import compose

    plain = settings.validate(compose([f"scale={scale}", "corpus=stdlib"]))
    teacher = build_teacher(plain.teacher, plain.prepare.vocab_size, plain.sequence_tokens, plain.seed)
    groups = make_optimizer(teacher, plain.optimizer, 1.0).param_groups
    muon, adamw = (
        sum(parameter.numel() for group in groups if group["use_muon"] == wanted for parameter in group["params"])
        for wanted in (True, False)
    )
    times = collectives(muon + adamw, muon)
    beside = Timings(times.seconds | {"a step": [step_seconds] * times.rounds}, {})
    for what in times.seconds:
        ours, ratio = times.median(what) * 1e3, beside.ratio(what, "a step")
        yield Row.of("DDP", what, ours, "a step", step_seconds * 1e3, "ms", ratio, times.rounds, of_ceiling=True)


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
    yield from collective_rows(scale, times.median("2"))

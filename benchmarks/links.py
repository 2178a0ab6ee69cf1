"""Data-parallel training over links of known bandwidth, beside what the planner's equations say of it.

    python -m benchmarks.links          # needs root and iproute2; writes benchmarks/links.md

Each rank runs in a network namespace of its own, whose interface is limited (benchmarks/nodes.py). The teacher of scale
demo trains with DDP over gloo as the pipeline's ranks do. The planner is given one rank's measured step and the limit,
nothing else: bytes from the size of the gradients, seconds from the ring's equation and, where there are more ranks
than cores, from their shares of a core.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.nodes import Node, machines, results_of, why_not
from stages.files.artifacts import write_atomically
from stages.planning.chips import Chip
from stages.planning.collectives import ring_all_reduce_seconds, ring_wire_bytes
from stages.planning.step import Anchor, Fitted, Layout, Model, predict

ROOT = Path(__file__).resolve().parent.parent
MEGABITS = (100, 400)  # per second, of each rank's interface
RANKS = (2, 4)
STEPS, FIRST_STEPS = 8, 2  # the first are not counted: connections, memory, DDP's buckets
SEQUENCES, TOKENS = 2, 128  # of each rank in a step
PAYLOAD_SHARE = 1448 / 1514  # of an Ethernet frame: the rest is headers, which the token bucket counts too
FLOAT32_BYTES = 4
PORT = 29_511
PRIORITY = 15  # of a rank above other processes, or their load would be measured
UNFITTED = Fitted(
    exposed_share_of_fast_links=1.0,
    exposed_share_of_slow_links=1.0,
    straggler_share=0.0,
    low_share=0.0,
    high_share=0.0,
)  # nothing is fitted to this machine


@dataclass(frozen=True)
class Measured:
    """Of one run: medians over its steps, and the bytes that each rank's interface sent in one step."""

    ranks: int
    megabits: float  # 0: no link
    gradient_floats: int
    step_seconds: float
    all_reduce_seconds: float
    all_reduce_bytes: float  # the mean over ranks
    step_bytes: float


# ---- a rank


def work(rank: int, ranks: int, sequences: int, steps: int, folder: str) -> None:
    """Train, then reduce a tensor of the gradients' size; write the seconds and bytes of each step."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if os.geteuid() == 0:
        os.nice(-PRIORITY)
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=ranks)
    module, tokens = _teacher(sequences)
    model = module
    if ranks > 1:
        model = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    gradients = torch.zeros(sum(weight.numel() for weight in module.parameters() if weight.requires_grad))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(tokens).backward()
        optimizer.step()

    def all_reduce() -> None:
        if ranks > 1:
            dist.all_reduce(gradients)

    found = {name: repeated(action, steps, ranks) for name, action in (("step", step), ("all_reduce", all_reduce))}
    found["floats"] = gradients.numel()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def _teacher(sequences):
    """The teacher of scale demo as a module from tokens to its training loss, and a batch."""
    import torch

    from stages.model.hub import build_teacher
    from stages.settings.compose import compose
    from stages.settings.schema import validate
    from stages.training.fit import NextToken

    settings = validate(compose(["scale=demo", "corpus=stdlib"]))
    vocabulary = settings.prepare.vocab_size
    teacher = build_teacher(settings.teacher, vocabulary, TOKENS, settings.seed)
    objective = NextToken(settings.teacher.balance_loss_weight)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

        def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
            return objective(self.teacher, tokens_BT).loss

    return Loss(), torch.randint(vocabulary, (sequences, TOKENS + 1), generator=torch.Generator().manual_seed(0))


def repeated(action, steps, ranks):
    """Seconds of each repetition, and the bytes that the interface sent in one."""
    import torch.distributed as dist

    seconds, before = [], 0
    for number in range(FIRST_STEPS + steps):
        if ranks > 1:
            dist.barrier()
        if number == FIRST_STEPS:
            before = _sent_bytes()
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    if ranks > 1:
        dist.barrier()  # what others still wait for is not sent yet
    return {"seconds": seconds[FIRST_STEPS:], "bytes": (_sent_bytes() - before) / steps}


def _sent_bytes():
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


# ---- runs


def measure(ranks: int, megabits: float, sequences: int = SEQUENCES, steps: int = STEPS) -> Measured:
    """One run over shaped links, or of one rank without any."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        nodes = stack.enter_context(machines(ranks, megabits)) if ranks > 1 else [Node("", "", "")]
        processes = [_started(rank, ranks, node, sequences, steps, folder) for rank, node in enumerate(nodes)]
        found = results_of(processes, Path(folder))
    slowest = [max(of_ranks) for of_ranks in zip(*(each["step"]["seconds"] for each in found), strict=True)]
    reduces = [max(of_ranks) for of_ranks in zip(*(each["all_reduce"]["seconds"] for each in found), strict=True)]
    return Measured(
        ranks=ranks,
        megabits=megabits,
        gradient_floats=found[0]["floats"],
        step_seconds=median(slowest),
        all_reduce_seconds=median(reduces),
        all_reduce_bytes=sum(each["all_reduce"]["bytes"] for each in found) / ranks,
        step_bytes=sum(each["step"]["bytes"] for each in found) / ranks,
    )


def _started(rank, ranks, node, sequences, steps, folder):
    code = f"from benchmarks.links import work; work({rank}, {ranks}, {sequences}, {steps}, {folder!r})"
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # DDP's names, no host names
    environment = os.environ | quiet | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(node.command(sys.executable, "-c", code), cwd=ROOT, env=environment)


# ---- what the planner says


def payload_bytes_per_second(megabits: float) -> float:
    """What TCP delivers of a link's bits: 1,448 bytes of each full frame of 1,514."""
    return megabits * 1e6 / 8 * PAYLOAD_SHARE


def predicted_step_seconds(alone: Measured, ranks: int, megabits: float, cores: int) -> float:
    """From one rank's step: the ring of gradients over the links, and the share of a core that a rank has."""
    model = Model(name="teacher", total_parameters=alone.gradient_floats, active_parameters=alone.gradient_floats)
    core = Chip(
        name="core",
        peak_flops_per_second={"fp32": 1.0},  # the same on both sides: it divides out
        memory_bytes=None,
        chips_per_node=1,
        fast_domain_chips=1,
        intra_bytes_per_second=None,
        inter_bytes_per_second=payload_bytes_per_second(megabits),
        intra_latency_seconds=0.0,
        inter_latency_seconds=0.0,
        source="this machine",
    )
    one = Layout(
        zero=0,
        global_batch_sequences=SEQUENCES,
        micro_batch_sequences=SEQUENCES,
        sequence_tokens=TOKENS,
        precision="fp32",
        gradient_bytes=FLOAT32_BYTES,
        overlapped=False,  # all gradients but the last megabyte fit into one bucket of DDP's: it leaves at the end
    )
    all_ranks = one.model_copy(update={"dp": ranks, "global_batch_sequences": ranks * SEQUENCES})
    shared = alone.step_seconds * max(1.0, ranks / cores)
    return predict(model, all_ranks, core, ranks, Anchor(shared, one, 1), UNFITTED).step_seconds


def rows_of(alone: Measured, run: Measured, cores: int) -> Iterator[tuple[str, float, float, str]]:
    """What was measured, the planner's number, the measured one, the unit."""
    size = run.gradient_floats * FLOAT32_BYTES
    wire = ring_wire_bytes(size, run.ranks)
    reduce = ring_all_reduce_seconds(size, run.ranks, payload_bytes_per_second(run.megabits), 0.0)
    yield "bytes a rank sends in an all-reduce", wire, run.all_reduce_bytes, "B"
    yield "bytes a rank sends in a step", wire, run.step_bytes, "B"
    yield "all-reduce of the gradients", reduce, run.all_reduce_seconds, "s"
    step = predicted_step_seconds(alone, run.ranks, run.megabits, cores)
    yield "training step", step, run.step_seconds, "s"


def as_markdown(pairs: Sequence[tuple[Measured, Measured]], cores: int, load: float) -> str:
    """Each run with the step of one rank alone, measured just before it: others may use the machine meanwhile."""
    alone = [one.step_seconds for one, _ in pairs]
    lines = [
        "# Training over links of known bandwidth",
        "",
        f"`python -m benchmarks.links` on {cores} cores, load {load:.1f} when it began. The teacher of scale demo",
        f"({pairs[0][0].gradient_floats:,} parameters), float32, {SEQUENCES} sequences of {TOKENS} tokens a rank, DDP",
        "over gloo, one thread a rank. The planner's anchor is the step of one rank alone, measured before each run:",
        f"{min(alone):.3f} to {max(alone):.3f} s. Of the limit 1,448 / 1,514 is payload. Nothing is fitted.",
        "",
        "| ranks | link, Mbit/s | what | predicted | measured | error |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for one, run in pairs:
        for what, expected, measured, unit in rows_of(one, run, cores):
            form = ",.0f" if unit == "B" else ".3f"
            both = f"{expected:{form}} {unit} | {measured:{form}} {unit}"
            error = 100 * (expected / measured - 1)
            lines.append(f"| {run.ranks} | {run.megabits:g} | {what} | {both} | {error:+.1f}% |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if reason := why_not():
        sys.exit(f"benchmarks.links: {reason}")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > 0.5 * cores:
        print(f"others use this machine (load {load:.1f}): expect noise", file=sys.stderr)
    pairs = [(measure(1, 0), measure(ranks, megabits)) for ranks, megabits in itertools.product(RANKS, MEGABITS)]
    text = as_markdown(pairs, cores, load)
    print(text)
    write_atomically(ROOT / "benchmarks/links.md", text)


if __name__ == "__main__":
    main()

"""Training over a slow link: DDP against local SGD (stages/training/strategies/local_sgd.py), and both without a limit.

    python -m benchmarks.slow_link      # needs root and iproute2; writes benchmarks/slow_link.md

Two nodes of one rank and one core each (benchmarks/nodes.py) train the teacher of scale tiny with `engine=torchrun`, as
a person would start it, each in a checkout of its own. A link does not change the bytes of a model: DDP over the slow
one is timed for a few steps and ends where DDP without a limit does.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkout import environment, prepared
from benchmarks.nodes import Node, machines, why_not
from benchmarks.table import ROOT
from stages.files.artifacts import read_json, write_atomically

PORT = 29_517
NODES = 2
MEGABITS = 100
SEEDS = (1, 2, 3)
STEPS, TIMED_STEPS = 400, 40
EVERY_STEPS = (10, 25, 50)
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5% quantile by number of seeds
OUT = "outputs/slow_link"


@dataclass(frozen=True)
class Run:
    bits_per_byte: float  # of the validation split, at the end
    tokens_per_second: float  # from the first step to the last
    node_bytes_per_step: float  # that leave node 0, start and end included


def checkouts(folder: Path, count: int) -> list[Path]:
    """One for each node: the same code, settings and data of scale tiny, in folders of their own."""
    first = prepared(folder / "node-0", "tiny")
    return [first, *(Path(shutil.copytree(first, folder / f"node-{k}")) for k in range(1, count))]


def start(trees: Sequence[Path], nodes: Sequence[Node], *words: str) -> list[subprocess.Popen[str]]:
    """`pretrain` on every node, each on one core; node 0 writes the outs."""
    cores = sorted(os.sched_getaffinity(0))
    running = []
    for k, (tree, node) in enumerate(zip(trees, nodes, strict=True)):
        meeting = [f"engine.master_address={nodes[0].address}", f"engine.master_port={PORT}", f"engine.node_rank={k}"]
        command = ["taskset", "--cpu-list", str(cores[k % len(cores)]), sys.executable, "-m", "stages.pretrain"]
        command = node.command(*command, "engine=torchrun", f"engine.nodes={len(nodes)}", *meeting, *words)
        theirs = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9")  # nothing listens there
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        running.append(subprocess.Popen(command, cwd=tree, env=theirs, text=True, stdout=pipe, stderr=both))
    return running


def measure(trees: Sequence[Path], megabits: float, steps: int, *words: str) -> Run:
    with machines(len(trees), megabits) as nodes:
        every = ("trainer.checkpoint_every_seconds=1e9", f"pretrain.validate_every_steps={steps}")
        running = start(trees, nodes, f"pretrain.steps={steps}", *every, f"hydra.run.dir={OUT}", *words)
        said = [process.communicate(timeout=1800)[0] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("a node failed:\n" + "\n".join(said))
        sent = nodes[0].sent_bytes()
    out = trees[0] / OUT
    bits = read_json(out / "metrics/pretrain.json")["validation_bits_per_byte"]
    speed = read_json(out / "measurements/pretrain.json")["teacher/tokens_per_second"]
    shutil.rmtree(out)
    return Run(bits, speed, sent / steps)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean of the paired differences over seeds, and half of its 95% interval (Student's t)."""
    paired = [one - other for one, other in zip(ours, theirs, strict=True)]
    half = STUDENT_T[len(paired)] * statistics.stdev(paired) / len(paired) ** 0.5
    return statistics.mean(paired), half


def as_markdown(unlimited: list[Run], slow: Run, local: dict[int, list[Run]], load: float) -> str:
    speed, bits = _mean(unlimited, "tokens_per_second"), [run.bits_per_byte for run in unlimited]
    lines = [
        "# Training over a slow link",
        "",
        f"`python -m benchmarks.slow_link`, load {load:.1f} when it began: {NODES} nodes of one rank and one core, the",
        f"teacher of scale tiny, {STEPS} steps, {len(unlimited)} seeds. Loss: bits per byte of the validation split,",
        "with its difference to DDP, paired by seed, and the 95% interval of that. DDP on the slow link was timed for",
        f"{TIMED_STEPS} steps; its loss is that of DDP.",
        "",
        "| strategy | link | tokens/s | of DDP without a limit | bytes of a node per step | loss | difference |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        _row("ddp", "no limit", unlimited, speed, ""),
        f"| ddp | {MEGABITS} Mbit/s | {slow.tokens_per_second:,.0f} | {slow.tokens_per_second / speed:.0%} |"
        f" {slow.node_bytes_per_step:,.0f} | {statistics.mean(bits):.3f} | 0 |",
    ]
    for every, runs in local.items():
        mean, half = difference([run.bits_per_byte for run in runs], bits)
        told = f"{mean:+.3f} ± {half:.3f}"
        lines.append(_row(f"local_sgd, every {every} steps", f"{MEGABITS} Mbit/s", runs, speed, told))
    return "\n".join(lines) + "\n"


def _mean(runs, name):
    return statistics.mean(getattr(run, name) for run in runs)


def _row(strategy, link, runs, speed, told):
    own, sent, bits = (_mean(runs, n) for n in ("tokens_per_second", "node_bytes_per_step", "bits_per_byte"))
    return f"| {strategy} | {link} | {own:,.0f} | {own / speed:.0%} | {sent:,.0f} | {bits:.3f} | {told} |"


def main() -> None:
    if reason := why_not():
        sys.exit(f"benchmarks.slow_link: {reason}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        trees = checkouts(Path(folder), NODES)
        slow = measure(trees, MEGABITS, TIMED_STEPS)
        unlimited: list[Run] = []
        local: dict[int, list[Run]] = {every: [] for every in EVERY_STEPS}
        for seed in SEEDS:  # in turn, so that who else uses the machine meets all alike
            unlimited.append(measure(trees, 0, STEPS, f"seed={seed}"))
            for every, runs in local.items():
                words = ("trainer.strategy=local_sgd", f"trainer.average_every_steps={every}", f"seed={seed}")
                runs.append(measure(trees, MEGABITS, STEPS, *words))
    text = as_markdown(unlimited, slow, local, load)
    print(text)
    write_atomically(ROOT / "benchmarks/slow_link.md", text)


if __name__ == "__main__":
    main()

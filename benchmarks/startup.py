"""What a process pays before it works: our rooms in a fresh interpreter against the library below each, and every stage
from its start until it computes, as DVC runs it."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.checkout import checkout, command, environment, stage
from benchmarks.table import ROOT, Row
from benchmarks.timing import Timings, interleaved

# what it is -> (our import, the library that it is built on or that it spares the process)
PAIRS = {
    "a rank that trains": ("stages.training.rank", "lightning"),
    "teacher and losses": ("stages.model.families.deepseek_v3.model, stages.training.fit", "torch"),
    "tracking, in the stage's process": ("stages.tracking", "mlflow"),
    "a stage before its own imports": ("stages.run.entry", "yaml"),
}
# stage -> its heaviest library, in the order of the pipeline; composing settings is all that config does
STAGES = {
    "config": "hydra", "prepare": "tokenizers", "pretrain": "lightning", "distill": "lightning",
    "sparsify": "lightning", "challenge": "lightning", "evaluate": "torch", "report": "yaml",
}  # fmt: skip
TARGETS = {"lightning": 1.0}  # seconds that a stage may add to the import of its library
OTHERS_TARGET = 3.0
# a stage that does not train ends where its work would begin
UNTIL_MAIN = """
import os
from stages.run import entry as runs
run_stage = runs.run_stage
runs.run_stage = lambda main, *rest: run_stage(lambda *_: os._exit(0), *rest)
"""


def import_in_fresh_process(modules: str) -> None:
    theirs = environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env=theirs)


def seconds_to_main(root: Path, name: str) -> float:
    begun = time.monotonic()
    words = command(name, first=UNTIL_MAIN)
    subprocess.run(words, cwd=root, env=environment(DVC_STAGE=name), check=True, capture_output=True)
    return time.monotonic() - begun


def seconds_to_first_step(root: Path, name: str) -> float:
    """Until the first step of training is logged: a step of scale tiny is in it, and what else stands before, such as
    a warm start."""
    state = root / ".runs/resume"
    shutil.rmtree(state, ignore_errors=True)  # of the run before
    begun = time.monotonic()
    process = subprocess.Popen(
        command(name), cwd=root, env=environment(DVC_STAGE=name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not list(state.glob(f"{name}-*/steps.jsonl")):
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with code {process.returncode} before its first step")
            time.sleep(0.005)
        return time.monotonic() - begun
    finally:
        process.terminate()
        process.wait()


def rows(
    pairs: dict[str, tuple[str, str]] = PAIRS,
    stages: dict[str, str] = STAGES,
    seconds: float = 30.0,
    least_rounds: int = 3,
) -> Iterator[Row | str]:
    """At 1x ours costs what the library costs by itself."""
    yield from import_rows(pairs, seconds)
    yield from stage_rows(stages, least_rounds)


def import_rows(pairs: dict[str, tuple[str, str]], seconds: float) -> Iterator[Row | str]:
    """Seconds from the interpreter's start to its end."""
    here = {}
    for what, (ours, library) in pairs.items():
        if importlib.util.find_spec(library) is None:
            yield f"start-up of {ours} left out: {library} is not installed; get it with pip install -e ."
        else:
            here[what] = (ours, library)
    modules = {name for pair in here.values() for name in pair}
    actions = {name: partial(import_in_fresh_process, name) for name in sorted(modules)}
    times = interleaved(actions, seconds, least_rounds=2)  # a round takes 20 s
    for what, (ours, library) in here.items():
        yield row(f"{what}: import {ours}", ours, library, times)


def stage_rows(stages: dict[str, str], rounds: int) -> Iterator[Row | str]:
    taken: dict[str, list[float]] = {name: [] for name in [*stages, *stages.values()]}
    with tempfile.TemporaryDirectory() as folder:
        root = prepared(Path(folder), stages)
        for _ in range(rounds):
            for name, library in stages.items():
                until = seconds_to_first_step if library == "lightning" else seconds_to_main
                taken[name].append(until(root, name))
            for library in dict.fromkeys(stages.values()):
                begun = time.monotonic()
                import_in_fresh_process(library)
                taken[library].append(time.monotonic() - begun)
    times = Timings(taken, {})
    for name, library in stages.items():
        yield row(f"{name}, until it computes", name, library, times)
        added, target = times.median(name) - times.median(library), TARGETS.get(library, OTHERS_TARGET)
        yield f"{name} computes {added:.1f} s after {library} alone would be imported (target: {target:.0f} s)"


def prepared(folder: Path, stages: dict[str, str]) -> Path:
    """A checkout at scale tiny with what these stages read, where every step is logged."""
    edits = {"conf/base.yaml": {"log_every_steps: 10": "log_every_steps: 1"}}
    root = checkout(folder, "tiny", edits)
    order = ["config", "prepare", *(name for name, library in stages.items() if library == "lightning")]
    for name in order[:-1]:  # nothing reads the last one's outs
        stage(root, name)
    return root


def row(what: str, ours: str, library: str, times: Timings) -> Row:
    theirs = times.median(library)
    ratio = times.ratio(library, ours)
    return Row.of("start-up", what, times.median(ours), f"import {library}", theirs, "s", ratio, times.rounds)

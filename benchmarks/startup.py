"""What a process pays before it works: our rooms in a fresh interpreter against the library below each."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.table import ROOT, Row
from benchmarks.timing import interleaved

# what it is -> (our import, the library that it is built on or that it spares the process)
PAIRS = {
    "a rank that trains": ("stages.ranks", "lightning"),
    "teacher and losses": ("stages.teacher, stages.training", "torch"),
    "tracking, in the stage's process": ("stages.tracking", "mlflow"),
    "a stage before its own imports": ("stages.runs", "yaml"),
}


def import_in_fresh_process(modules: str) -> None:
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env=environment)


def rows(pairs: dict[str, tuple[str, str]] = PAIRS, seconds: float = 30.0) -> Iterator[Row | str]:
    """Seconds from the interpreter's start to its end; at 1x ours costs what the library costs by itself."""
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
        yield Row.of(
            "start-up",
            f"{what}: import {ours}",
            times.median(ours),
            f"import {library}",
            times.median(library),
            "s",
            times.ratio(library, ours),
            times.rounds,
        )

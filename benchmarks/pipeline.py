"""Where the time of a cold `dvc repro` goes, and what one costs that has nothing to do: in a copy with a cache of its
own, at the default scale, with the mirrors that send each stage's record beside the stages that follow."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.checkout import DVC, checkout, default_scale, environment, events
from benchmarks.table import Row
from benchmarks.timing import Ratio, interleaved
from stages.files.artifacts import read_json

TRAINING = ("pretrain", "distill", "sparsify", "challenge")
MEASURED = ("prepare", "evaluate")  # stages that write down what their phases took


@dataclass(frozen=True)
class Spent:
    """Seconds of a training stage. The stall of a periodic checkpoint is in `steps` (see the group checkpoint)."""

    steps: float
    validation: float  # with the logging of steps
    saving: float  # from the last step on: checkpoint, model, tracking, provenance

    @property
    def besides(self) -> float:
        return self.validation + self.saving


def spent(record: list[dict]) -> Spent:
    """From the record of a stage that ran undisturbed. A step's speed is of the time from the start of its fit to the
    end of the step, and its row is written after the validation: their difference is what validation took."""
    parameters = record[0]["params"]
    (sequences,) = (int(value) for name, value in parameters.items() if name.endswith("batch_sequences"))
    rows = [event for event in record if event.get("step")]
    fits: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        (name,) = (name for name in row["values"] if name.endswith("/tokens_per_second"))
        tokens = row["step"] * sequences * int(parameters["sequence_tokens"])
        fits.setdefault(name, []).append((row["time"], tokens / row["values"][name]))
    steps = validation = 0.0
    for ends in fits.values():
        begun = min(written - elapsed for written, elapsed in ends)
        late = [written - elapsed - begun for written, elapsed in ends]
        validation += sum(late)
        steps += ends[-1][1] - sum(late[:-1])
    return Spent(steps, validation, record[-1]["time"] - rows[-1]["time"])


def repro(root: Path) -> None:
    subprocess.run([*DVC, "repro", "-q"], cwd=root, env=variables(root), check=True, capture_output=True)


def variables(root: Path) -> dict[str, str]:
    return environment(DVC_SITE_CACHE_DIR=str(root / ".dvc/site"))


def empty_repository(folder: Path) -> Path:
    folder.mkdir()
    subprocess.run([*DVC, "init", "-q", "--no-scm"], cwd=folder, env=variables(folder), check=True)
    return folder


def rows(scale: str = "", seconds: float = 20.0) -> Iterator[Row | str]:
    scale = scale or default_scale()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root, empty = checkout(Path(folder) / "copy", scale), empty_repository(Path(folder) / "empty")
        begun = time.monotonic()
        repro(root)
        whole = time.monotonic() - begun
        # the mirrors must be done before anything else is timed
        subprocess.run([sys.executable, "-m", "stages.tracking", "sync"], cwd=root, env=variables(root), check=True,
                       capture_output=True)  # fmt: skip
        yield from cold_rows(root, scale, whole)
        status = partial(subprocess.run, [*DVC, "status", "-q"], cwd=empty, env=variables(empty), check=True)
        times = interleaved({"no-op": partial(repro, root), "status": status}, seconds, least_rounds=5)
    yield Row.of(
        "pipeline",
        "dvc repro, nothing to do",
        times.median("no-op"),
        "dvc status, empty repository",
        times.median("status"),
        "s",
        times.ratio("status", "no-op"),
        times.rounds,
    )


def cold_rows(root: Path, scale: str, whole: float) -> Iterator[Row | str]:
    training = {name: spent(events(root, name)) for name in TRAINING}
    phases = {name: sum(read_json(root / f"measurements/{name}.json")["seconds"].values()) for name in MEASURED}
    computing = sum(phases.values()) + sum(stage.steps for stage in training.values())
    what = f"cold dvc repro, scale {scale}: preparing, training steps, evaluating"
    yield share(what, computing, "the whole", whole)
    besides = sum(stage.besides for stage in training.values())
    yield (
        f"a cold dvc repro at scale {scale} spends {1 - computing / whole:.0%} of its {whole:.0f} s outside computing: "
        f"{besides:.0f} s on validation, saving and tracking, {whole - computing - besides:.0f} s on starting "
        "processes, building models and DVC"
    )
    for name, stage in training.items():
        against = "with validation, checkpoint, saving, tracking"
        yield share(f"{name}: training steps", stage.steps, against, stage.steps + stage.besides)


def share(what: str, part: float, against: str, whole: float) -> Row:
    of = part / whole
    return Row.of("pipeline", what, part, against, whole, "s", Ratio(of, of, of), 1, of_ceiling=True)

"""What came of a sweep: each job leaves `outcome.json` in its folder, and the process that started them reads these.

A launcher may run jobs in other processes or on other machines, so that nothing else of a job is known here.
"""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback

from stages.files.artifacts import ROOT, Refusal, read_json, write_json
from stages.settings.compose import DEFAULTS, preset_groups, read_sheet
from stages.settings.untracked import OF_TRAINING

FILE = "outcome.json"
LOST = "no outcome: its process ended early"
# The metrics that a table shows, by stage, as metrics/<stage>.json nests them.
COLUMNS = {
    "prepare": ("train.tokens", "train.bytes_per_token", "train.documents", "vocab_size"),
    "pretrain": ("validation_bits_per_byte", "tokens"),
    "distill": (
        "validation_bits_per_byte",
        "control_validation_bits_per_byte",
        "warm_control_validation_bits_per_byte",
        "cold_student_validation_bits_per_byte",
        "tokens",
    ),
    "sparsify": (
        "sparse_student_validation_bits_per_byte",
        "sparse_teacher_validation_bits_per_byte",
        "continued_student_validation_bits_per_byte",
        "continued_teacher_validation_bits_per_byte",
    ),
    "challenge": (
        "scratch_student_validation_bits_per_byte",
        "scratch_sparse_teacher_validation_bits_per_byte",
        "scratch_sparse_student_validation_bits_per_byte",
    ),
    "plan": ("cheapest.dollars", "cheapest.days", "cheapest.tokens_per_second"),
    "evaluate": ("teacher_bits_per_byte", "student_bits_per_byte", "quality_kept", "gap_closed", "test_documents"),
}
# Those whose mean ranks the jobs; the lower the better. The other stages do not make models better or worse.
SCORED = {
    "pretrain": COLUMNS["pretrain"][:1],
    "distill": COLUMNS["distill"][:1],
    "sparsify": COLUMNS["sparsify"][:2],
    "challenge": COLUMNS["challenge"],
}


@dataclass
class Outcome:
    """What became of one job."""

    number: str
    overrides: list[str]
    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    def leave(self, sweep: str) -> None:
        record = {"sweep": sweep, "number": self.number, "overrides": self.overrides}
        write_json(self.folder / FILE, record | {"metrics": self.metrics, "failure": self.failure})

    def score(self, stage: str) -> float | None:
        """What a sweeper such as Optuna minimises; none where a stage has nothing to rank by."""
        if stage not in SCORED:
            return None
        values = [self.metrics[key] for key in SCORED[stage] if key in self.metrics]
        return sum(values) / len(values) if values and not self.failure else float("inf")


class SweepFolder(Callback):
    """Hydra calls it when a sweep starts (conf/config.yaml): nothing else knows where the jobs' folders will be."""

    found: Path | None = None
    hydra_files = ""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        SweepFolder.found = Path(config.hydra.sweep.dir).absolute()
        SweepFolder.hydra_files = config.hydra.output_subdir or ""


def numbers_of(metrics: Path) -> dict[str, float]:
    """All numbers in a file of metrics, under dotted names."""

    def flat(value, path):
        if isinstance(value, dict):
            return {key: number for name, inner in value.items() for key, number in flat(inner, (*path, name)).items()}
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {".".join(path): value} if plain else {}

    return flat(read_json(metrics), ()) if metrics.exists() else {}


def read_outcomes(folder: Path, sweep: str, hydra_files: str) -> list[Outcome]:
    """The outcomes of a sweep's jobs, by number. A folder that Hydra made and no job has closed is a failed job."""
    found = []
    for path in sorted(folder.rglob(FILE)):
        record = read_json(path)
        if record["sweep"] == sweep:  # the folder may hold those of an earlier sweep
            metrics = record["metrics"]
            found.append(Outcome(record["number"], record["overrides"], path.parent, metrics, record["failure"]))
    for path in sorted(folder.rglob(f"{hydra_files}/overrides.yaml")) if hydra_files else []:
        job = Path(str(path).removesuffix(f"/{hydra_files}/overrides.yaml"))
        if not (job / FILE).exists() or (job / FILE).stat().st_mtime_ns < path.stat().st_mtime_ns:
            overrides = yaml.safe_load(path.read_text(encoding="utf-8")) or []
            found.append(Outcome(job.name, overrides, job, failure=LOST))
    return sorted(found, key=lambda job: (not job.number.isdigit(), int(job.number) if job.number.isdigit() else 0))


def show(stage: str, sweep: str, ended: BaseException | None) -> None:
    """Prints the table of the sweep that has `ended`, perhaps early; raises what is wrong with it."""
    assert SweepFolder.found is not None
    jobs = read_outcomes(SweepFolder.found, sweep, SweepFolder.hydra_files)
    if jobs:
        print(table_of(jobs, stage), flush=True)
    if isinstance(ended, (Refusal, KeyboardInterrupt)):
        raise ended
    if ended is not None:  # a launcher or a sweeper: jobs catch their own
        raise Refusal(f"the sweep ended early: {type(ended).__name__}: {ended}".strip().split("\n")[0]) from None
    if not jobs:
        raise Refusal(f"the sweep ran no job, or none that left anything in {os.path.relpath(SweepFolder.found)}")
    failed = [job for job in jobs if job.failure]
    if failed:
        count = f"{len(failed)} of {len(jobs)} jobs failed"
        raise Refusal(f"{count}, first job {failed[0].number}: {failed[0].failure}")


def table_of(jobs: list[Outcome], stage: str) -> str:
    """The jobs of a sweep, aligned, and the best of them."""
    keys = [key for key in COLUMNS.get(stage, ()) if any(key in job.metrics for job in jobs)]
    rows = [["job", "overrides", *keys]]
    for job in jobs:
        numbers = [f"{job.metrics[key]:.6g}" if key in job.metrics else "-" for key in keys]
        rows.append([job.number, " ".join(job.overrides) or "-", *numbers])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for i, job in enumerate(jobs, start=1):
        lines[i] = f"{lines[i]}  {job.failure}"
    return "\n".join(["", *(line.rstrip() for line in lines), *_best(jobs, stage)])


def _best(jobs, stage):
    """Which job to keep, where it is, and how it gets into params.yaml."""
    ranked = [(job.score(stage), job) for job in jobs if not job.failure and job.score(stage) is not None]
    if not ranked:
        return []
    score, best = min(ranked, key=lambda pair: pair[0])
    named = " and ".join(SCORED[stage])
    if len(ranked) > 1 and score == max(other for other, _ in ranked):
        return [f"best: none, all have the same {named}"]
    lines = [f"best: job {best.number} ({' '.join(best.overrides)}), {named} {score:.6g}"]
    lines += [f"      in {os.path.relpath(best.folder)}"]
    words = " ".join(f"-S {shlex.quote(word)}" for word in sheet_words(best.overrides))
    return [*lines, f"      to keep it in params.yaml: dvc exp run {words}"] if words else lines


def sheet_words(overrides: list[str], root: Path = ROOT) -> list[str]:
    """The overrides of a job as `dvc exp run -S` takes them: `+` where params.yaml lacks the key, and a preset with
    settings of its own as one mapping, since the sheet has one place for both."""
    choices, values = read_sheet((), root)
    pairs = dict(word.lstrip("+").split("=", 1) for word in overrides if not word.startswith("~"))
    elsewhere = ("engine", *(f"{group}." for group in OF_TRAINING))  # who watches and where ranks run changes no out
    pairs = {k: value for k, value in pairs.items() if value != choices.get(k) and not k.startswith(elsewhere)}
    words = []
    for group in preset_groups(root):
        own = [key for key in pairs if key.startswith(f"{group}.")]
        if own and (group in pairs or group not in values):
            source = pairs.pop(group, choices[group])
            words += [f"{group}={source}"] if group in values else []  # lets go of what belongs to another preset
            settings = [f"{key.removeprefix(f'{group}.')}:{pairs.pop(key)}" for key in own]
            words.append(f"{group}={{{','.join([f'source:{source}', *settings])}}}")
    for key, value in pairs.items():
        known = key not in DEFAULTS and (key in choices or _has(values, key))  # the sheet need not name what has one
        words.append(f"{key if known else f'++{key}' if key in DEFAULTS else f'+{key}'}={value}")
    return words


def _has(values, key):
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True

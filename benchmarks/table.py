"""A row of the table, the table, and what the numbers depend on: machine, versions, commit."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import DEVICE, Ratio
from stages.model.layers import has_bfloat16

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "lightning", "mlflow")


@dataclass(frozen=True)
class Row:
    """`ratio` is how many times better we are than the peer, or the share that we reach of a ceiling."""

    group: str
    what: str
    ours: float
    against: str
    theirs: float
    unit: str
    ratio: float
    low: float  # quartiles of the ratio over the rounds
    high: float
    rounds: int
    of_ceiling: bool = False

    @classmethod
    def of(cls, group, what, ours, against, theirs, unit, ratio: Ratio, rounds: int, of_ceiling=False):
        return cls(
            group, what, ours, against, theirs, unit, ratio.ratio, ratio.low, ratio.high, rounds, of_ceiling
        )


HEADER = ("", "what", "ours", "against", "theirs", "unit", "ratio", "quartiles", "rounds")


def rendered(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, aligned so that a terminal shows it as well; a group is named in its first row."""
    cells, group = [HEADER], ""
    for row in rows:
        form = (lambda x: f"{x:.0%}") if row.of_ceiling else (lambda x: f"{x:.2f}x")
        name, group = row.group if row.group != group else "", row.group
        quartiles = f"{form(row.low)} to {form(row.high)}"
        ours, theirs = _number(row.ours), _number(row.theirs)
        cells.append((name, row.what, ours, row.against, theirs, row.unit, form(row.ratio), quartiles, str(row.rounds)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]  # not tabulate: a GPU machine lacks it
    right = [name in ("ours", "theirs", "ratio", "rounds") for name in HEADER]
    lines = [
        [cell.rjust(width) if to else cell.ljust(width) for cell, width, to in zip(line, widths, right, strict=True)]
        for line in cells
    ]
    lines.insert(1, ["-" * (width - to) + ":" * to for width, to in zip(widths, right, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def of_this_machine(name: str) -> str:
    """The file's name for this kind of machine, without a suffix."""
    if DEVICE.type == "cuda":
        return f"{name}_gpu"
    return name if has_bfloat16("cpu") else f"{name}_float32"


def conditions() -> dict[str, Any]:
    """What the numbers depend on. No host name and no path: results.json is published."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "edited": bool(_git("status", "--porcelain", "--", "stages", "benchmarks/*.py")),
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "accelerator": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def listed(under: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in under.items())


def as_markdown(rows: Sequence[Row], notes: Sequence[str], under: dict[str, Any]) -> str:
    remarks = "".join(f"- {note}\n" for note in notes)
    return (
        "# Benchmarks\n\nWritten by `python -m benchmarks`. A ratio is how many times better we are than the peer "
        "(above 1: faster, or smaller), or the share of the ceiling that we reach; medians over interleaved "
        f"rounds of one run.\n\n{listed(under)}\n\n{rendered(rows)}\n" + (f"\n{remarks}" if remarks else "")
    )


def as_json(rows: Sequence[Row], notes: Sequence[str], under: dict[str, Any]) -> str:
    plain = {
        "conditions": under,
        "rows": [
            {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(row).items()}
            for row in rows
        ],
        "notes": list(notes),
    }
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"

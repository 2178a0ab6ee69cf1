"""A run's name, its parent and its machine, as known when its stage starts."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import yaml

from stages.files.artifacts import sha256_of
from stages.tracking.redaction import flat, redacted_line


def identity(stage, settings, out, root, sweep, deps):
    """What the mirror needs to name the run, find its parent and tag it."""
    commit = _git(root, "rev-parse", "HEAD")
    resolved = sha256_of(root / "resolved.yaml") if (root / "resolved.yaml").exists() else ""
    overrides = _overrides(stage, out)
    key, parent = None, None
    if sweep is not None:
        sweep = Path(sweep)
        overrides = overrides or [out.name]
        key, parent = f"sweep-{stage}-{sweep.name}", f"sweep {stage} {sweep.name}"
    elif os.environ.get("DVC_EXP_NAME"):
        key = parent = os.environ["DVC_EXP_NAME"]
    elif out.resolve() == root.resolve():  # dvc repro; a run by hand has no parent
        key = f"repro-{commit[:12]}-{resolved[:12]}"
        parent = " ".join(filter(None, ["repro", *_sheet_words(root), commit[:8]]))
    # Only what a person edits: DVC itself rewrites dvc.lock and metrics while the pipeline runs.
    edited = _git(root, "status", "--porcelain", "--", "stages", "conf", "params.yaml", "dvc.yaml")
    tags = {
        "git.commit": commit,
        "git.dirty": str(bool(edited)),
        "mlflow.source.name": f"stages/{stage}.py",
        "mlflow.source.git.commit": commit,
        "dvc.lock": sha256_of(root / "dvc.lock") if (root / "dvc.lock").exists() else "",
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "resolved.sha256": resolved,
        "engine": f"torch {version('torch')}, lightning {version('lightning')}",
        **machine(),
    }
    for path in deps:
        if (root / path).exists():
            tags[f"in.{path}"] = sha256_of(root / path)
    return {
        "stage": stage,
        "name": redacted_line(" ".join([stage, *overrides]), 200),
        "pipeline": key,
        "parent": parent,
        "params": {key: str(value) for key, value in flat(settings).items()},
        "tags": {key: value for key, value in tags.items() if value},
    }


def _overrides(stage, out):
    """What distinguishes a run by hand, or a job of a sweep: the words that Hydra was given."""
    path = out / ".hydra/overrides.yaml"
    words = yaml.safe_load(path.read_text()) if path.exists() else None
    return [str(word).removeprefix(f"{stage}.") for word in words or []]


def machine():
    """What speed depends on, without importing torch: cores, processor, accelerator, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    accelerators = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            accelerators += re.findall(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
    return {
        "machine.cores": str(cores),
        "machine.processor": processor,
        "machine.accelerator": f"{len(accelerators)} x {accelerators[0]}" if accelerators else "none",
        "machine.python": platform.python_version(),
        "machine.torch": version("torch"),
    }


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _sheet_words(root):
    """The words of params.yaml that say which experiment this is."""
    if not (root / "params.yaml").exists():
        return []
    sheet = yaml.safe_load((root / "params.yaml").read_text()) or {}
    words = [sheet[word] for word in ("scale", "corpus") if word in sheet]
    return [str(word.get("source", "") if isinstance(word, dict) else word) for word in words]


def files_of(stage, root):
    """The data that dvc.yaml says the stage reads and writes; code is named by the commit instead."""
    if not (root / "dvc.yaml").exists():
        return [], []
    entry = (yaml.safe_load((root / "dvc.yaml").read_text()) or {}).get("stages", {}).get(stage, {})
    named = {kind: [next(iter(item)) if isinstance(item, dict) else item for item in entry.get(kind) or []]
             for kind in ("deps", "outs", "metrics", "plots")}
    deps = [path for path in named["deps"] if not path.startswith(("stages", "conf"))]
    return deps, named["outs"] + named["metrics"] + named["plots"]


def dataset(root):
    """Which data: the corpus card names every shard by its hash, so its own hash names them all. None without data."""
    path = root / "artifacts/data/card.json"
    if not path.exists():
        return None
    card = json.loads(path.read_text())
    profile = {split: {key: value for key, value in counts.items() if key != "shards"}
               for split, counts in card.get("splits", {}).items()}
    return {"name": _corpus_name(card.get("corpus")), "digest": sha256_of(path)[:32], "profile": profile}


def _corpus_name(corpus):
    """The corpus in at most 60 characters, for a table column."""
    if not isinstance(corpus, dict):
        return redacted_line(corpus or "corpus", 60)
    if corpus.get("source") == "stdlib":
        return f"stdlib {corpus.get('python', '')}".strip()
    return redacted_line(" ".join(filter(None, [corpus.get("name") or "corpus", corpus.get("subset")])), 60)


def _git(root, *words):
    words = ("git", "-C", str(root), *words)
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""

"""A copy of the working tree as a user has it, where benchmarks and tests run stages; the experiment of record stays
untouched.

    root = prepared(folder, scale="tiny")           # with data; `checkout` gives one without
    stage(root, "prepare")                          # as DVC runs it: reads resolved.yaml, writes the outs
    stage(root, "pretrain", "pretrain.steps=12")    # with words, by hand
    events(root, "pretrain")                        # what tracking recorded of the last run
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.table import ROOT

DVC = (sys.executable, "-m", "dvc")

# No mirror: it imports MLflow beside whatever is measured next. What is {first} runs before the stage.
CODE = """
import runpy, sys
from stages.tracking import record as tracking
tracking._start_mirror = lambda *_: None
{first}
sys.argv[1:] = {words}
runpy.run_module("stages.{name}", run_name="__main__", alter_sys=True)  # as python -m: ranks ask for its name
"""


def checkout(folder: Path, scale: str = "", edits: dict[str, dict[str, str]] | None = None) -> Path:
    """With a commit, because tracking asks Git; `edits` are replacements in files, by path."""
    for name in ("stages", "conf", ".dvc/plots"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy2(ROOT / name, folder / name)
    if scale:
        edits = {"params.yaml": {f"scale: {default_scale()} ": f"scale: {scale} "}} | (edits or {})
    for name, replacements in (edits or {}).items():
        text = (folder / name).read_text()
        for old, new in replacements.items():
            assert old in text, f"{name} has no {old!r}"
            text = text.replace(old, new)
        (folder / name).write_text(text)
    who = ["-c", "user.name=benchmark", "-c", "user.email="]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "copy"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def prepared(folder: Path, scale: str, edits: dict[str, dict[str, str]] | None = None) -> Path:
    """A checkout with the data that training stages read."""
    root = checkout(folder, scale, edits)
    for name in ("config", "prepare"):
        stage(root, name)
    return root


def outs_of(root: Path) -> dict[str, str]:
    """SHA-256 of each reproducible out, and what dvc.lock says of them (not its bytes: it keeps the order of runs)."""
    import yaml  # late, as below: the device machine, which imports all benchmarks, has neither it nor a pipeline

    from stages.files.artifacts import sha256_of
    from stages.run.provenance import is_reproducible

    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    for stage in stages.values():
        for kind in ("deps", "outs"):
            stage[kind] = [file for file in stage.get(kind, []) if is_reproducible(file["path"])]
    paths = [out["path"] for stage in stages.values() for out in stage["outs"]]
    return {"dvc.lock": json.dumps(stages, sort_keys=True)} | {path: sha256_of(root / path) for path in paths}


def default_scale() -> str:
    found = re.search(r"^scale: (\w+)", (ROOT / "params.yaml").read_text(), re.MULTILINE)
    assert found, "params.yaml names no scale"
    return found[1]


def environment(**variables: str) -> dict[str, str]:
    """The user's, without what an enclosing DVC says; `python` is this one."""
    outer = {name: value for name, value in os.environ.items() if name not in ("DVC_STAGE", "DVC_ROOT")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{outer.get('PATH', '')}"
    return outer | {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": "."} | variables


def command(name: str, *words: str, first: str = "") -> list[str]:
    return [sys.executable, "-c", CODE.format(first=first, words=list(words), name=name)]


def stage(root: Path, name: str, *words: str) -> None:
    under_dvc = {} if words else {"DVC_STAGE": name}
    subprocess.run(command(name, *words), cwd=root, env=environment(**under_dvc), check=True, capture_output=True)


def events(root: Path, name: str) -> list[dict]:
    """Of the stage's last run, from its settings to its end."""
    record = max((root / ".runs/tracking").glob(f"*-{name}-*/events.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for line in record.read_text().splitlines()]

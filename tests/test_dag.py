"""The DAG tells the truth: every room a stage imports is a dependency, every setting it reads is a parameter."""

import ast
import importlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RECORDING = ("tracking", "records", "identity", "redaction", "mirror", "store", "servers", "served_model", "progress",
             "compare")
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def rooms_imported_by(module: str, seen: set[str] | None = None) -> set[str]:
    """Files under stages/ that the module imports, directly or not, also inside functions."""
    seen = set() if seen is None else seen
    path = ROOT / "stages" / f"{module}.py"
    if not path.exists() or f"stages/{module}.py" in seen:
        return seen
    seen.add(f"stages/{module}.py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stages.")]
        else:
            continue
        for name in names:
            rooms_imported_by(name, seen)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_every_room_a_stage_imports_is_among_its_dependencies(stage):
    needed = rooms_imported_by(stage)
    if "stages/launching.py" in needed:  # the ranks are started by name, not imported
        needed |= rooms_imported_by("ranks") | rooms_imported_by("torchrun")
    # what records and tells never changes an out
    needed -= {f"stages/{room}.py" for room in RECORDING}
    missing = needed - set(STAGES[stage]["deps"])
    assert not missing, f"add to the deps of {stage} in dvc.yaml: {sorted(missing)}"


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "config"])
def test_the_sections_a_stage_reads_are_the_params_it_declares(stage):
    sections = set(importlib.import_module(f"stages.{stage}").SECTIONS)
    declared = {s for entry in STAGES[stage]["params"] for s in entry["resolved.yaml"]}
    assert sections == declared

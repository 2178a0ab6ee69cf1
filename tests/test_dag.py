"""The DAG and the folders tell the truth: what a stage imports is a dependency, what it reads is a parameter."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
FOLDERS = sorted(path.name for path in (ROOT / "stages").iterdir() if (path / "__init__.py").exists())
COMMANDS = {"doctor", "export", "generate", "serve"}  # what a person runs beside the DAG
MOST_LINES = 400


def modules_imported_by(path: Path, top_level_only: bool = False) -> Iterator[Path]:
    """Files under stages/ that this file imports, also inside functions."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("stages.")]
        for name in names:
            found = ROOT / (name.replace(".", "/") + ".py")
            if found.exists():
                yield found


def reached_from(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """All files under stages/ that this file imports, directly or not."""
    seen = set() if seen is None else seen
    if path not in seen:
        seen.add(path)
        for found in modules_imported_by(path):
            reached_from(found, seen)
    return seen


def in_folder(path: Path) -> str:
    """The dependency in dvc.yaml that stands for this file: its folder, or itself."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2])


@pytest.mark.parametrize("stage", STAGES)
def test_every_folder_a_stage_imports_is_among_its_dependencies(stage):
    needed = reached_from(ROOT / f"stages/{stage}.py")
    if ROOT / "stages/training/launch.py" in needed:  # the ranks are started by name, not imported
        for path in [ROOT / "stages/training/rank.py", *(ROOT / "stages/training").glob("*/*.py")]:
            needed |= reached_from(path)
    outside = {"stages/tracking", "stages/engines"}  # who records, and where ranks run, never changes an out
    folders = {in_folder(path) for path in needed} - outside
    declared = {path for path in STAGES[stage]["deps"] if path.startswith("stages/")}
    assert folders <= declared, f"add to the deps of {stage} in dvc.yaml: {sorted(folders - declared)}"
    assert declared <= folders, f"not imported by {stage}: {sorted(declared - folders)}"


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "distill", "sparsify", "challenge"])
def test_an_edit_where_runs_are_recorded_measured_or_reported_reruns_no_training(stage):
    assert not {"stages/tracking", "stages/reporting", "stages/measure"} & set(STAGES[stage]["deps"])


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "config"])
def test_the_sections_a_stage_reads_are_the_params_it_declares(stage):
    sections = set(importlib.import_module(f"stages.{stage}").SECTIONS)
    declared = {s for entry in STAGES[stage]["params"] for s in entry["resolved.yaml"]}
    assert sections == declared


def test_beside_folders_only_stages_of_the_dag_and_commands_stand_in_stages():
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == {"__init__", *STAGES, *COMMANDS}


def test_no_stage_of_the_dag_needs_a_command():
    needed: set[Path] = set()
    for stage in STAGES:
        reached_from(ROOT / f"stages/{stage}.py", needed)
    assert not {ROOT / f"stages/{name}.py" for name in COMMANDS} & needed


def test_no_folders_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {}
    for folder in FOLDERS:
        files = (ROOT / "stages" / folder).rglob("*.py")
        found = {path.relative_to(ROOT / "stages") for file in files for path in modules_imported_by(file)}
        below[folder] = {path.parts[0] for path in found} - {folder}
        assert not {f"{name}.py" for name in [*STAGES, *COMMANDS]} & below[folder], f"{folder} imports a stage"
    while below:
        free = {folder for folder, others in below.items() if not others & below.keys()}
        assert free, f"a circle among {sorted(below)}: {below}"
        below = {folder: others for folder, others in below.items() if folder not in free}


def test_no_file_is_too_long_to_read():
    files = [path for path in (ROOT / "stages").rglob("*.py")]
    assert not [path.name for path in files if len(path.read_text().splitlines()) > MOST_LINES]

"""`dvc exp run`: a refused one leaves the settings as they were; --queue and --temp run; `dvc exp show` lists them."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.checkout import DVC, checkout, environment
from tests.test_runs import TOY


@pytest.fixture
def tree(tmp_path) -> Path:
    clone = checkout(tmp_path / "clone", "tiny")
    assert typed(clone, "repro", "config").returncode == 0
    return committed(clone, "config has run")


def typed(tree: Path, *words: str) -> subprocess.CompletedProcess:
    site = tree.with_name("site")  # git, which adds all, must not see its files come and go
    theirs = environment(PYTHONPATH=str(tree), DVC_SITE_CACHE_DIR=str(site))
    return subprocess.run([*DVC, *words], cwd=tree, env=theirs, capture_output=True, text=True)


def test_a_refused_experiment_leaves_committed_accepted_and_resolved_settings_as_they_were(tree):
    sheet, resolved = tree / "params.yaml", tree / "resolved.yaml"

    def refused() -> str:
        done = typed(tree, "exp", "run", "-S", "distill.temperature=-1")
        assert done.returncode != 0 and "distill.temperature = -1: must be above 0" in done.stderr
        return done.stderr

    committed = sheet.read_bytes(), resolved.read_bytes()
    assert "params.yaml is as it was before -S" in refused()
    assert (sheet.read_bytes(), resolved.read_bytes()) == committed

    sheet.write_text(sheet.read_text().replace("seed: 1 ", "seed: 2 "))
    assert typed(tree, "repro", "config").returncode == 0
    accepted = sheet.read_bytes(), resolved.read_bytes()
    assert "params.yaml is as it was before -S" in refused()
    assert (sheet.read_bytes(), resolved.read_bytes()) == accepted

    sheet.write_text(sheet.read_text().replace("seed: 2 ", "seed: 3 "))  # that no stage has seen
    assert "params.yaml keeps what -S wrote: edit it" in refused()
    assert "seed: 3 " in sheet.read_text() and resolved.read_bytes() == accepted[1]


@pytest.fixture
def short(tmp_path) -> Path:
    """The stages config and distill, whose training is a toy's; the rest of the pipeline is not there."""
    clone = checkout(tmp_path / "clone", "tiny")
    pipeline = yaml.safe_load((clone / "dvc.yaml").read_text())
    distill = pipeline["stages"]["distill"]
    distill["deps"] = [path for path in distill["deps"] if not path.startswith("artifacts/")]
    distill["outs"] = ["provenance/distill.json"]
    stages = {"config": pipeline["stages"]["config"], "distill": distill}
    (clone / "dvc.yaml").write_text(yaml.safe_dump({"params": pipeline["params"], "stages": stages}, sort_keys=False))
    sections = tuple(distill["params"][0]["resolved.yaml"])
    toy = TOY.replace('("distill", "seed")', repr(sections)).replace("settings.teacher is None", "settings.student")
    (clone / "stages/distill.py").write_text(toy)
    committed(clone, "a toy")
    assert typed(clone, "repro").returncode == 0
    return committed(clone, "it has run")


def committed(clone: Path, message: str) -> Path:
    who = ["-c", "user.name=test", "-c", "user.email="]
    for words in (["add", "--all"], [*who, "commit", "-qm", message]):
        subprocess.run(["git", *words], cwd=clone, check=True)
    return clone


def test_experiments_run_from_the_queue_and_in_a_temporary_copy_and_are_shown_side_by_side(short):
    before = {name: (short / name).read_bytes() for name in ("params.yaml", "resolved.yaml", "dvc.lock")}
    assert typed(short, "exp", "run", "--queue", "-S", "distill.temperature=2").returncode == 0
    for words in (["--run-all"], ["--temp", "-S", "distill.temperature=3", "-S", "+logger=csv"]):
        done = typed(short, "exp", "run", *words)
        assert done.returncode == 0, done.stderr
    assert before == {name: (short / name).read_bytes() for name in before}, "the workspace is left alone"
    (workspace, head) = json.loads(typed(short, "exp", "show", "--json").stdout)
    shown = [head, *(each["revs"][0] for each in head["experiments"])]
    found = {
        each["data"]["params"]["params.yaml"]["data"]["distill"]["temperature"]: (
            each["data"]["params"]["resolved.yaml"]["data"]["distill"]["temperature"],
            each["data"]["metrics"]["metrics/distill.json"]["data"]["validation_bits_per_byte"],
        )
        for each in shown
    }
    assert found == {1.0: (1.0, 2), 2: (2.0, 1), 3: (3.0, 2)}, "asked, composed, trained"
    records = [json.loads(line) for path in short.glob(".runs/tracking/*/events.jsonl") for line in path.open()]
    assert len([record for record in records if record["kind"] == "start"]) == 3, "recorded in the user's checkout"

"""A refused `dvc exp run -S` leaves the settings as they were."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.checkout import DVC, checkout, environment


@pytest.fixture
def tree(tmp_path) -> Path:
    clone = checkout(tmp_path / "clone", "tiny")
    assert typed(clone, "repro", "config").returncode == 0
    who = ["-c", "user.name=test", "-c", "user.email="]
    for words in (["add", "--all"], [*who, "commit", "-qm", "config has run"]):
        subprocess.run(["git", *words], cwd=clone, check=True)
    return clone


def typed(tree: Path, *words: str) -> subprocess.CompletedProcess:
    theirs = environment(PYTHONPATH=str(tree), DVC_SITE_CACHE_DIR=str(tree / ".dvc/site"))
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

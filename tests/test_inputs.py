"""What DVC cannot see is fingerprinted: a changed corpus is prepared again, an equal one is not."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.checkout import DVC, checkout, environment
from stages.data import fingerprints as inputs
from stages.files.artifacts import Refusal


def corpus(**settings):
    return SimpleNamespace(**{"source": "files", "paths": ("texts/*.txt",), "dataset": None} | settings)


def fingerprint(root: Path, **settings) -> dict:
    return inputs.corpus_fingerprint(corpus(**settings), root, {})


@pytest.fixture
def root(tmp_path) -> Path:
    write_texts(tmp_path / "texts", 5)
    return tmp_path


def write_texts(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        lines = [f"{word} {number} says that {word * 2} is {number * 7 % 5}.\n" for word in "abcdefghijkl"]
        (folder / f"{number}.txt").write_text("".join(lines) * 20)


def age(folder: Path) -> None:
    """As if written long ago: a file that changed just now is never trusted by its times."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("a", "A", 1))  # of the same size


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: edited(texts / "0.txt"),
        lambda texts: (texts / "0.txt").unlink(),
        lambda texts: (texts / "5.txt").write_text("new"),
        lambda texts: (texts / "0.txt").rename(texts / "6.txt"),
    ],
    ids=["edited", "deleted", "added", "renamed"],
)
def test_an_edited_deleted_added_or_renamed_file_changes_the_fingerprint(root, change):
    before = fingerprint(root)
    assert fingerprint(root) == before
    change(root / "texts")
    assert fingerprint(root) != before


def test_an_edit_that_keeps_size_and_modification_time_is_seen(root, monkeypatch):
    monkeypatch.setattr(inputs, "SETTLED_SECONDS", -1)  # remember files that were written just now, too
    age(root / "texts")
    before = fingerprint(root)
    time.sleep(0.02)  # a tick of the clock that stamps the change
    edited(root / "texts/0.txt")
    age(root / "texts")
    assert fingerprint(root) != before


def test_equal_files_elsewhere_touched_or_copied_have_the_same_fingerprint(root, tmp_path_factory):
    before = fingerprint(root)
    age(root / "texts")
    assert fingerprint(root) == before
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(root / "texts", elsewhere / "texts")
    assert fingerprint(elsewhere) == before
    assert str(root) not in json.dumps(before)


def test_a_file_that_has_not_changed_is_not_read_again(root, monkeypatch):
    monkeypatch.setattr(inputs, "SETTLED_SECONDS", -1)
    before = fingerprint(root)
    monkeypatch.setattr(inputs, "sha256_of", lambda path: 1 / 0)
    assert fingerprint(root) == before


@pytest.mark.parametrize("memory", ["", "[]", "{}", '{"a": 1}', '{"a": [1, 2, 3]}', "\udcff"])
def test_a_damaged_memory_costs_only_reading(root, memory):
    before = fingerprint(root)
    (root / inputs.MEMORY).parent.mkdir(exist_ok=True)
    (root / inputs.MEMORY).write_text(memory, errors="surrogateescape")
    assert fingerprint(root) == before


def test_a_saved_dataset_is_seen_by_its_files(root):
    before = fingerprint(root, source="huggingface", dataset="texts")
    edited(root / "texts/3.txt")
    assert fingerprint(root, source="huggingface", dataset="texts") != before


def test_the_library_is_seen_by_its_version_and_its_files(tmp_path, monkeypatch):
    before = fingerprint(tmp_path, source="stdlib")
    assert before["python"] == ".".join(map(str, sys.version_info[:3])) and before["files"] > 500
    files = inputs.library_files()
    monkeypatch.setattr(inputs, "library_files", lambda: files[1:])
    assert fingerprint(tmp_path, source="stdlib") != before


def test_a_dataset_of_the_hub_keeps_its_last_known_revision_where_the_hub_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = corpus(source="huggingface", dataset="owner/name")
    before = {"source": "huggingface", "dataset": "owner/name", "revision": "abc"}
    assert inputs.corpus_fingerprint(settings, tmp_path, before) == before
    assert inputs.corpus_fingerprint(settings, tmp_path, before | {"dataset": "owner/other"})["revision"] is None


def test_a_missing_file_is_refused_before_any_stage_runs(tmp_path):
    with pytest.raises(Refusal, match="matches no file"):
        fingerprint(tmp_path)


def test_repro_prepares_a_changed_corpus_again_and_an_equal_one_not(tmp_path):
    write_texts(tmp_path / "texts", 80)
    paths = {"conf/corpus/files.yaml": {"paths: []": f"paths: ['{tmp_path}/texts/*.txt']"}}
    tree = checkout(tmp_path / "tree", "tiny", paths | {"params.yaml": {"corpus: stdlib": "corpus: files "}})

    def repro() -> str:
        theirs = environment(PYTHONPATH=str(tree), DVC_SITE_CACHE_DIR=str(tree / ".dvc/site"))
        done = subprocess.run([*DVC, "repro", "prepare"], cwd=tree, env=theirs, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def prepare_alone() -> str:
        theirs = environment(PYTHONPATH=str(tree), DVC_STAGE="prepare")
        command = [sys.executable, "-m", "stages.prepare"]
        return subprocess.run(command, cwd=tree, env=theirs, capture_output=True, text=True).stderr

    def documents() -> int:
        splits = json.loads((tree / "metrics/prepare.json").read_text())
        return sum(splits[split]["bytes"] for split in ("train", "val", "test"))

    assert "Running stage 'prepare'" in repro()
    before = documents()
    age(tmp_path / "texts")
    assert "Stage 'prepare' didn't change, skipping" in repro()
    for number in range(0, 80, 2):
        (tmp_path / f"texts/{number}.txt").unlink()
    assert "the corpus is not the one that inputs.json describes" in prepare_alone()
    assert "Running stage 'prepare'" in repro()
    assert documents() < before

"""How a stage is entered: the commands a person types, on a toy stage in a copy of the repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stages.artifacts import ROOT, read_json, write_json

ROOMS = (
    "__init__", "artifacts", "settings", "config", "runs", "provenance", "compare", "corpus", "inputs", "resuming",
    "experiments",
)  # fmt: skip
TOY = """
import os, sys, time
from stages.artifacts import Refusal, write_json
from stages.runs import run_stage

def main(settings, place, run):
    assert settings.teacher is None
    if settings.seed == 13:
        raise Refusal("seed 13 is unlucky")
    if settings.seed == 99:
        write_json(place.root / "pid.json", os.getpid())
        time.sleep(60)
    run.metrics({"seed": 1.0})
    t = settings.distill.temperature
    write_json(place.write("metrics/distill.json"),
               {"validation_bits_per_byte": abs(t - 2) + 1, "steps": 3, "curve": [1]})
    return {"conditions": {"ranks": int(os.environ.get("TOY_RANKS", 2))}}

if __name__ == "__main__":
    run_stage(main, "distill", ("distill", "seed"))
"""
TRACKING = """
import contextlib

class Run:
    def metrics(self, values, step=None):
        pass

@contextlib.contextmanager
def start_run(stage, settings, out, root, sweep):
    assert set(settings) == {"distill", "seed"}
    yield Run()
"""


@pytest.fixture
def repository(tmp_path):
    """The real entry and settings around a toy stage, without MLflow."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "stages").mkdir()
    for room in ROOMS:
        shutil.copy(ROOT / f"stages/{room}.py", tmp_path / f"stages/{room}.py")
    (tmp_path / "stages/distill.py").write_text(TOY)
    (tmp_path / "stages/tracking.py").write_text(TRACKING)
    return tmp_path


def typed(repository, *words, stage="distill", dvc=False):
    environment = os.environ | ({"DVC_STAGE": stage} if dvc else {})
    command = [sys.executable, "-m", f"stages.{stage}", *words]
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60
    )


def jobs_in(folder):
    return sorted(path.parent for path in folder.rglob("resolved.yaml"))


def test_a_run_by_hand_writes_into_its_own_folder_with_its_settings(repository):
    done = typed(repository, "distill.temperature=3")
    assert done.returncode == 0, done.stderr
    (job,) = jobs_in(repository / "outputs/distill")
    assert read_json(job / "metrics/distill.json")["validation_bits_per_byte"] == 2
    assert yaml.safe_load((job / "resolved.yaml").read_text())["distill"]["temperature"] == 3
    assert not (repository / "metrics").exists() and not (repository / "resolved.yaml").exists()
    assert done.stderr.splitlines() == [f"offramp: distill wrote {job.relative_to(repository)}"]


@pytest.mark.parametrize("words", [("-m", "distill.temperature=1,2,4"), ("distill.temperature=1,2,4", "-m")])
def test_a_sweep_prints_a_table_and_the_best_job(repository, words):
    done = typed(repository, *words)
    assert done.returncode == 0, done.stderr
    assert len(jobs_in(repository / "multirun/distill")) == 3
    lines = done.stdout.strip().splitlines()
    assert lines[0].split() == ["job", "overrides", "validation_bits_per_byte", "steps"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["0", "distill.temperature=1", "2"],
        ["1", "distill.temperature=2", "1"],
        ["2", "distill.temperature=4", "3"],
    ]
    assert lines[4] == "best: job 1 (distill.temperature=2), validation_bits_per_byte 1"
    assert (repository / lines[5].removeprefix("      in ") / "resolved.yaml").exists()


@pytest.mark.parametrize(
    ("word", "lengths"), [("scale=tiny,demo", [64, 256]), ("scale=glob(*,exclude=[gpu,node])", [256, 64])]
)
def test_a_sweep_over_presets_is_composed_for_each_job(repository, word, lengths):
    assert typed(repository, "-m", word).returncode == 0
    steps = [
        yaml.safe_load((job / "resolved.yaml").read_text())["sequence_tokens"]
        for job in jobs_in(repository / "multirun")
    ]
    assert steps == lengths


def test_a_refusing_job_leaves_the_others_running_and_the_sweep_fails(repository):
    done = typed(repository, "-m", "seed=1,13,2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "seed 13 is unlucky" in done.stdout and len(list(repository.rglob("metrics/distill.json"))) == 2
    assert done.stderr.splitlines()[-1] == "offramp: 1 of 3 jobs failed, first job 1: seed 13 is unlucky"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=13"], "offramp: seed 13 is unlucky"),
        (["teacher.experts_per_token=999"], "offramp: teacher.experts_per_token = 999: must be at most"),
        (["distill.temprature=2"], "offramp: distill.temprature: no such setting; did you mean"),
        (["scale=dmeo"], "offramp: scale = dmeo: must be one of"),
        (["-m", "scale=tiny,dmeo"], "offramp: scale = dmeo: must be one of"),
        (["seed=="], "offramp: "),
        (["distill.temperature=1,2"], "offramp: Ambiguous value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(repository, words, line):
    done = typed(repository, *words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(line)


OUTSIDE = [
    ["hydra.run.dir=../elsewhere"],
    ["hydra.run.dir={elsewhere}"],
    ["hydra.run.dir=outputs/../../elsewhere"],
    ["hydra.run.dir=${{oc.env:ELSEWHERE}}"],
    ["hydra.run.dir=outputs/a", "hydra.output_subdir=../../../elsewhere"],
    ["+hydra.job_logging.handlers={{file: {{class: logging.FileHandler, filename: {elsewhere}}}}}"],
    ["-m", "hydra.sweep.dir={elsewhere}"],
    ["-m", "hydra.sweep.subdir=../../../../elsewhere", "seed=1,2"],
    ["-m", "hydra.sweep.subdir={elsewhere}/${{hydra.job.num}}", "seed=1,2"],
    ["-m", "hydra.sweep.subdir=${{corpus.text_field}}", "corpus.text_field=text,../../../../elsewhere"],
    ["-m", "hydra.sweep.subdir=${{hydra.job.override_dirname}}", "corpus.text_field=a/../../../../../elsewhere"],
    ["hydra.run.dir=.."],
    ["hydra.run.dir=outputs/link/.."],
]


@pytest.mark.parametrize("words", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_run_that_would_write_outside_the_project_is_refused_before_a_folder_is_made(
    repository, tmp_path_factory, monkeypatch, words
):
    elsewhere = tmp_path_factory.mktemp("outside") / "elsewhere"
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))
    (repository / "outputs").mkdir()
    (repository / "outputs/link").symlink_to(tmp_path_factory.mktemp("linked"))

    def files():
        found = [*repository.parent.rglob("*"), *elsewhere.parent.rglob("*")]
        return sorted(path for path in found if "__pycache__" not in path.parts)

    before = files()
    done = typed(repository, *[word.format(elsewhere=elsewhere) for word in words])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"a run writes inside {repository} only" in line
    assert files() == before


def test_a_preset_that_would_write_outside_the_project_is_refused(repository):
    config = repository / "conf/config.yaml"
    config.write_text(config.read_text().replace("dir: outputs/", "dir: ../outputs/"))
    assert "a run writes inside" in typed(repository).stderr and not (repository.parent / "outputs").exists()


@pytest.mark.parametrize("words", [["hydra.run.dir=outputs/mine"], ["hydra.run.dir={repository}/outputs/mine"]])
def test_a_folder_inside_the_project_may_be_named(repository, words):
    done = typed(repository, *[word.format(repository=repository) for word in words])
    assert done.returncode == 0 and (repository / "outputs/mine/metrics/distill.json").exists(), done.stderr


def test_a_link_that_the_owner_made_leads_to_another_disk(repository, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    (repository / "multirun").symlink_to(disk)
    done = typed(repository, "-m", "seed=1,2", "hydra.sweep.subdir=seed-${seed}")
    assert done.returncode == 0 and len(list(disk.rglob("seed-*/metrics/distill.json"))) == 2, done.stderr


def test_a_run_by_hand_in_the_project_itself_would_overwrite_the_outs_and_is_refused(repository):
    assert "DVC's outs" in typed(repository, "hydra.run.dir=.").stderr
    assert not (repository / "metrics").exists()


@pytest.mark.parametrize("option", ["--config-dir", "--config-path", "--config-name", "--experimental-rerun"])
def test_settings_from_elsewhere_are_refused(repository, option):
    done = typed(repository, option, "conf")
    assert done.returncode == 1
    assert done.stderr == f"offramp: {option}: settings come from params.yaml and conf/ only\n"


def test_under_dvc_a_stage_reads_its_sections_of_resolved_yaml_and_writes_the_outs(repository):
    assert "run dvc repro config" in typed(repository, dvc=True).stderr
    assert typed(repository, stage="config", dvc=True).returncode == 0
    plain = yaml.safe_load((repository / "resolved.yaml").read_text())
    (repository / "resolved.yaml").write_text(yaml.safe_dump({"distill": plain["distill"], "seed": 7}))
    done = typed(repository, dvc=True)
    assert done.returncode == 0, done.stderr
    assert (repository / "metrics/distill.json").exists() and not (repository / "outputs").exists()


def test_under_dvc_a_stage_records_what_made_its_outs_and_compares_it_with_the_commit(repository, monkeypatch):
    typed(repository, stage="config", dvc=True)
    typed(repository, dvc=True)
    record = (repository / "provenance/distill.json").read_bytes()
    write_json(repository / "provenance.json", {"distill": json.loads(record)})  # as report does
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "run"]):
        subprocess.run([*git, *words], cwd=repository, check=True)
    (repository / "provenance/distill.json").unlink()  # as DVC does before a rerun
    assert typed(repository, dvc=True).stderr == "offramp: distill: same bytes as the committed run\n"
    assert (repository / "provenance/distill.json").read_bytes() == record

    monkeypatch.setenv("TOY_RANKS", "4")
    assert "on another kind of machine than the committed run (ranks: 2 -> 4)" in typed(repository, dvc=True).stderr
    by_hand = typed(repository, "distill.temperature=3")
    assert "committed run" not in by_hand.stderr and not list((repository / "outputs").rglob("provenance"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_stage_dies_with_its_dvc_and_the_next_copy_waits_for_its_lock(repository):
    typed(repository, stage="config", dvc=True)
    resolved = yaml.safe_load((repository / "resolved.yaml").read_text())
    (repository / "resolved.yaml").write_text(yaml.safe_dump(resolved | {"seed": 99}))
    starter = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'stages.distill'])"  # for dvc
    environment = os.environ | {"DVC_STAGE": "distill"}
    dvc = subprocess.Popen([sys.executable, "-c", starter], cwd=repository, env=environment)
    deadline = time.monotonic() + 30
    while not (repository / "pid.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stage = read_json(repository / "pid.json")
    (repository / "resolved.yaml").write_text(yaml.safe_dump(resolved))
    second = subprocess.Popen(
        [sys.executable, "-m", "stages.distill"],
        cwd=repository,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "another process is still running" in second.stderr.readline()
    dvc.send_signal(signal.SIGKILL)
    dvc.wait()
    assert second.wait(20) == 0
    status = Path(f"/proc/{stage}/status")  # a dead process may wait there as a zombie for a lazy init
    assert not status.exists() or "State:\tZ" in status.read_text()

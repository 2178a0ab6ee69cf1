"""python -m stages.doctor: what is here, what is missing and how to mend it."""

import socket

import pytest

from stages import doctor
from stages.files.artifacts import ROOT


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["doctor"])  # here they are pytest's


def test_what_is_here_is_named_and_what_only_some_engines_need_is_no_fault(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.main() == 0
    told = capsys.readouterr().out
    for word in ("Python", "torch", "dvc", "mlflow", "disk", "cores", "bfloat16", "GPU", "compiler", "huggingface"):
        assert f" {word} " in told, word
    for preset in (ROOT / "conf/engine").glob("*.yaml"):
        assert f" {preset.stem} " in told
    assert "missing  git            not on PATH; apt install git" in told
    assert "missing  slurm          no sbatch here; run the stage on a login node" in told
    assert "MISSING" not in told and told.endswith("The pipeline can run here: make repro\n")


def test_a_package_that_the_pipeline_needs_and_lacks_is_told_with_its_mend_and_ends_with_code_1(capsys, monkeypatch):
    versions = {"lightning": "", "mlflow": "3.0.0"}
    installed = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, installed(name)))
    assert doctor.main() == 1
    told = capsys.readouterr().out
    assert "  MISSING  lightning" in told and "is not installed; make env" in told
    assert "mlflow         3.0.0; the numbers here were measured with 3." in told
    assert told.endswith("The pipeline cannot run here: lightning\n")


def test_an_mlflow_server_that_is_down_is_told_and_no_password_is(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        up = doctor.server(f"http://me:secret@{address}/mlflow")
    down = doctor.server(f"http://me:secret@{address}/mlflow")
    assert up.is_there and not down.is_there and not down.is_needed
    assert "does not answer" in str(down) and "secret" not in f"{up}{down}"


def test_a_full_disk_is_a_reason_why_the_pipeline_cannot_run(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    (disk,) = [finding for finding in doctor.machine() if finding.name == "disk"]
    assert not disk.is_there and disk.is_needed and "make room: 2 GB are needed" in str(disk)

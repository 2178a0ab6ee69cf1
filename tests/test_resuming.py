"""Saved work is loaded whole or not at all, by the hash of what it was made from, by one process at a time."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from test_evaluate import VOCAB, write_data

from stages import distill, sparsify
from stages.data.shards import read_card
from stages.files import resuming
from stages.files.artifacts import Refusal
from stages.files.resuming import Interruption, ResumeState, remove_recorded, resume_key
from stages.model.hub import build_student, build_teacher, save
from stages.run.entry import Place
from stages.training.checkpoints import made_once


def test_saved_work_can_be_loaded_until_the_work_succeeds(tmp_path):
    with pytest.raises(ZeroDivisionError), ResumeState(tmp_path, "evaluate", "key") as state:
        state.save("sums", b"kept")
        raise ZeroDivisionError
    with ResumeState(tmp_path, "evaluate", "key") as state:
        assert state.load("sums") == b"kept" and state.load("other") is None
    assert not state.folder.exists()


def write_lock(root: Path, record: str) -> None:
    md5 = hashlib.md5(record.encode()).hexdigest()
    outs = [{"path": "provenance/evaluate.json", "md5": md5}]
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": {"outs": outs}}}))


def test_under_dvc_finished_work_is_kept_until_dvc_has_saved_the_outs(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    write_lock(tmp_path, "of an earlier run")
    with ResumeState(tmp_path, "evaluate", "key") as state:
        state.save("sums", b"kept")
    (tmp_path / "provenance").mkdir()
    (tmp_path / "provenance/evaluate.json").write_text("of this run")
    write_lock(tmp_path, "of this run")
    os.utime(tmp_path / "dvc.lock", (1, 1))  # that of a new clone, whose cache is empty
    for step in (lambda: None, lambda: write_lock(tmp_path, "of another"), (tmp_path / "dvc.lock").unlink):
        step()
        remove_recorded(tmp_path)
        with ResumeState(tmp_path, "evaluate", "key") as state:
            assert state.load("sums") == b"kept"
    write_lock(tmp_path, "of this run")
    with ResumeState(tmp_path, "evaluate", "key"):
        remove_recorded(tmp_path)
        assert state.folder.exists(), "another process works there"
    write_lock(tmp_path, "of this run")  # DVC writes it after the stage, and the time counts
    remove_recorded(tmp_path)
    assert not state.folder.exists()


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_one_altered_bit_anywhere_is_found_and_named(tmp_path, place, capsys):
    with ResumeState(tmp_path, "evaluate", "key") as state:
        state.save("sums", b"0123456789")
        content = bytearray((state.folder / "sums").read_bytes())
        content[place] ^= 1
        (state.folder / "sums").write_bytes(content)
        assert state.load("sums") is None
        assert f"evaluate: {state.folder / 'sums'} is damaged" in capsys.readouterr().err


def another_process(root: Path) -> subprocess.Popen:
    """It holds the state until its stdin is closed."""
    script = (
        "import sys; from pathlib import Path; from stages.files.resuming import ResumeState\n"
        "with ResumeState(Path(sys.argv[1]), 'prepare', 'key'): print('at work', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(root)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    other.stdout.readline()
    return other


def test_the_same_work_is_done_by_one_process_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resuming, "LOCK_SECONDS", 0.5)
    other = another_process(tmp_path)
    with pytest.raises(Refusal, match="by another process"), ResumeState(tmp_path, "prepare", "key"):
        pass
    assert "prepare: another process is still running; waiting" in capsys.readouterr().err
    with ResumeState(tmp_path, "prepare", "another key"):
        pass
    other.kill()
    other.communicate()
    with ResumeState(tmp_path, "prepare", "key"):  # the kernel freed it
        pass


def test_a_process_that_waited_goes_on_when_the_other_one_succeeds_and_removes_the_state(tmp_path, capsys):
    other = another_process(tmp_path)
    threading.Timer(0.5, other.stdin.close).start()
    with ResumeState(tmp_path, "prepare", "key") as state:
        assert "another process is still running" in capsys.readouterr().err and not state.folder.exists()
        state.save("sums", b"kept")
        assert state.load("sums") == b"kept"
    assert other.wait() == 0


def test_the_key_changes_with_settings_inputs_code_and_libraries(tmp_path, monkeypatch):
    module, text = tmp_path / "stages/data/module.py", tmp_path / "input.txt"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n")
    text.write_text("one")
    monkeypatch.setattr(resuming, "ROOT", tmp_path)

    def key(settings=1):
        return resume_key("prepare", [settings], [text])

    keys = [key(), key(settings=2)]
    text.write_text("two")
    keys.append(key())
    module.write_text("x = 2\n")
    keys.append(key())
    monkeypatch.setattr(resuming.metadata, "version", lambda name: "0")
    keys.append(key())
    assert len(set(keys)) == 5 and key() == keys[-1]


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal: what is started by nohup or in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_waits_for_the_check_or_ends_what_saves_nothing_at_once(ctrl_c):
    with Interruption("evaluate") as interruption:
        interruption.check("scoring")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="evaluate: interrupted while scoring; the same command"):
            interruption.check("scoring")
        with pytest.raises(KeyboardInterrupt, match="while timing"):  # noted before, not forgotten
            interruption.at_once("timing")
    with Interruption("evaluate") as interruption, pytest.raises(KeyboardInterrupt, match="while timing"):
        interruption.at_once("timing")
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as before"


def test_a_second_signal_ends_a_stage_that_does_not_come_to_its_check(ctrl_c):
    with pytest.raises(KeyboardInterrupt), Interruption("prepare"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stage", [distill, sparsify], ids=["distill", "sparsify"])
def test_warm_start_and_calibration_are_made_once_and_are_the_same_whenever_made(tmp_path, tiny_settings, stage):
    """A rank that resumes takes them from the state; one that finds nothing there makes the same bytes."""
    write_data(tmp_path / "artifacts/data")
    T, tokenizer = tiny_settings.sequence_tokens, read_card(tmp_path / "artifacts/data")["tokenizer_sha256"]
    for name, build in (("teacher", build_teacher), ("student", build_student)):
        model = build(getattr(tiny_settings, name), VOCAB, T, seed=1)
        save(model, tmp_path / "artifacts" / name, tokenizer_sha256=tokenizer)
    made, state = [], tmp_path / "state"
    state.mkdir()

    def starts(rank, seed):
        torch.manual_seed(seed)  # nothing may depend on it

        def keep(name, make):
            return made_once(state, rank, name, lambda: made.append(name) or make())

        fits = stage.fits(tiny_settings, Place(tmp_path, tmp_path), keep)
        return {fit.name: (fit.notes, {k: v.clone() for k, v in fit.model.state_dict().items()}) for fit in fits}

    runs = [starts(rank=1, seed=1)]
    assert not list(state.iterdir()), "only rank zero keeps"
    runs += [starts(rank=0, seed=2), starts(rank=1, seed=3)]
    once = ["warm_start"] if stage is distill else ["teacher_calibration", "student_calibration"]
    assert made == once * 2, "the third run, a resumed one, made nothing"
    for run in runs[1:]:
        for name, (notes, weights) in run.items():
            assert notes == runs[0][name][0]
            assert all(torch.equal(part, runs[0][name][1][key]) for key, part in weights.items()), name
    (state / f"{once[0]}-0.pt").write_bytes(b"damaged")
    starts(rank=0, seed=4)
    assert made == once * 2 + once[:1], "damaged state is made again"

"""Checkpoints: what comes back is what was saved, or nothing; the last good one survives whatever fails."""

import errno
import json
import os

import pytest
import torch

from stages.training.checkpoints import Checkpoint


def state_of(step):
    weight, momentum = torch.arange(12.0).view(3, 4) + step, torch.full((3, 4), float(step))
    return {"model": {"w": weight}, "optimizers": [{"state": {0: momentum}}], "step": step}


def assert_state(state, step):
    assert state["step"] == step
    assert torch.equal(state["model"]["w"], state_of(step)["model"]["w"])
    assert torch.equal(state["optimizers"][0]["state"][0], state_of(step)["optimizers"][0]["state"][0])


@pytest.fixture
def saved(tmp_path):
    checkpoint = Checkpoint(tmp_path, "teacher")
    checkpoint.save(1, state_of(1))
    checkpoint.wait()
    return checkpoint


def test_the_latest_save_comes_back_and_the_one_before_is_removed(saved):
    saved.save(2, state_of(2))
    saved.wait()
    assert_state(Checkpoint(saved.folder, "teacher").load(), 2)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["teacher-2.pt", "teacher.json"]


def test_without_a_save_there_is_nothing_to_load(tmp_path):
    assert Checkpoint(tmp_path, "teacher").load() is None


def test_training_may_change_its_tensors_while_they_are_written(tmp_path, monkeypatch):
    state, write = state_of(5), Checkpoint._write

    def late(self, step, copied):  # training's next step comes before the thread's first byte
        state["model"]["w"].zero_()
        state["optimizers"][0]["state"][0].zero_()
        write(self, step, copied)

    monkeypatch.setattr(Checkpoint, "_write", late)
    checkpoint = Checkpoint(tmp_path, "teacher")
    checkpoint.save(5, state)
    checkpoint.wait()
    assert_state(checkpoint.load(), 5)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), RuntimeError("PytorchStreamWriter failed")])
def test_a_save_that_fails_keeps_the_one_before_and_says_so(saved, monkeypatch, capsys, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    saved.save(2, state_of(2))
    saved.wait()
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "step 2 could not be written" in told and "is kept" in told
    assert saved.failure
    assert_state(saved.load(), 1)
    assert not (saved.folder / "teacher-2.pt").exists()


def test_a_kill_before_the_index_is_replaced_leaves_the_one_before(saved):
    (saved.folder / "teacher-2.pt").write_bytes(b"half a checkpo")
    assert_state(saved.load(), 1)
    saved.save(3, state_of(3))
    saved.wait()
    assert sorted(path.name for path in saved.folder.iterdir()) == ["teacher-3.pt", "teacher.json"]


@pytest.mark.parametrize("name", ["teacher-1.pt", "teacher.json"])
def test_any_damage_is_noticed_and_named(saved, capsys, name):
    path = saved.folder / name
    whole = path.read_bytes()
    flips = range(0, len(whole), max(1, len(whole) // 40))
    damaged = [whole[:n] for n in (0, 1, len(whole) // 2, len(whole) - 2)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] for at in flips]
    for content in damaged:
        path.write_bytes(content)
        state = saved.load()
        if state is not None:  # a flip in the step number of the index, which no one reads
            assert_state(state, 1)
        else:
            assert "teacher.json is damaged" in capsys.readouterr().out
    assert path.write_bytes(whole) and saved.load() is not None


def test_an_index_that_points_elsewhere_is_refused(saved):
    elsewhere = saved.folder.parent / "elsewhere.pt"
    os.replace(saved.folder / "teacher-1.pt", elsewhere)
    index = json.loads(saved.index.read_text())
    saved.index.write_text(json.dumps(index | {"file": f"../{elsewhere.name}"}))
    assert saved.load() is None


class Marks:
    """Unpickled without care, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_runs_nothing(saved):
    from stages.files.artifacts import sha256_of, write_json

    marker = saved.folder / "executed"
    torch.save({"step": 1, "model": Marks(marker)}, saved.folder / "teacher-1.pt")
    write_json(saved.index, {"file": "teacher-1.pt", "sha256": sha256_of(saved.folder / "teacher-1.pt"), "step": 1})
    assert saved.load() is None and not marker.exists()
    torch.load(saved.folder / "teacher-1.pt", weights_only=False)  # the trap is real
    assert marker.exists()

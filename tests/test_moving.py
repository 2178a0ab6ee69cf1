"""A run that moves to another place finds its state there, says so in its record, and shares it with no other run."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from forked_ranks import in_ranks
from test_evaluate import SilentRun, with_values, write_data
from test_resuming import another_process

from stages import pretrain
from stages.files import resuming
from stages.files.artifacts import Refusal, read_json, write_json
from stages.files.resuming import FINISHED, STATES, ResumeState, resume_and_run_key
from stages.run.entry import Place
from stages.training import launch as launching
from stages.training import moving
from stages.training.moving import RUN, settle_in, without_place
from stages.training.order import BYTES, as_numbers, from_numbers, order_of

RUN_KEY, HERE = "the same run", "fsdp2 on 4 ranks"


def leave(root: Path, key: str, step: int, run: str = RUN_KEY, content: bytes = b"weights") -> Path:
    """What a run of two ranks that stopped after this step has left."""
    folder = root / STATES / f"pretrain-{key}"
    folder.mkdir(parents=True)
    write_json(folder / RUN, {"run": run, "place": "ddp on 2 ranks"})
    (folder / f"teacher-{step}.pt").write_bytes(content)
    write_json(folder / "teacher.json", {"file": f"teacher-{step}.pt", "sha256": "", "step": step})
    (folder / "job.json").write_text("{}")
    return folder


def settled(root: Path, move: bool) -> tuple[str, Path]:
    with pytest.raises(ZeroDivisionError), ResumeState(root, "pretrain", "here") as state:
        said = settle_in(state, root, RUN_KEY, HERE, move)
        raise ZeroDivisionError  # the run does not end: its state stays
    return said, state.folder


def test_what_was_left_elsewhere_is_told_of_and_taken_over_where_that_is_wanted(tmp_path):
    left = leave(tmp_path, "there", 7)
    said, here = settled(tmp_path, move=False)
    assert said == (
        "a run of these settings waits elsewhere (ddp on 2 ranks, teacher at step 7);"
        " trainer.move=true goes on with it here"
    )
    assert left.exists() and not (here / "teacher.json").exists()
    said, here = settled(tmp_path, move=True)
    assert said == "goes on with the run that was left elsewhere (ddp on 2 ranks, teacher at step 7)"
    assert not left.exists(), "no second run can grow from it"
    assert (here / "teacher-7.pt").read_bytes() == b"weights" and read_json(here / "teacher.json")["step"] == 7
    assert read_json(here / RUN) == {"run": RUN_KEY, "place": HERE} and not (here / "job.json").exists()
    assert settled(tmp_path, move=True) == ("", here), "it goes on with its own"


def test_the_furthest_of_several_is_taken_and_own_work_is_never_replaced(tmp_path):
    leave(tmp_path, "one", 3)
    leave(tmp_path, "two", 5)
    assert settled(tmp_path, move=True)[0].endswith("(ddp on 2 ranks, teacher at step 5)")
    said, here = settled(tmp_path, move=True)
    assert said == "" and read_json(here / "teacher.json")["step"] == 5
    assert (tmp_path / STATES / "pretrain-one").exists()


def test_a_state_of_another_run_or_of_a_finished_one_or_without_a_step_stays_where_it_is(tmp_path):
    leave(tmp_path, "other", 7, run="another")
    (leave(tmp_path, "finished", 8) / FINISHED).touch()
    leave(tmp_path, "begun", 0)
    (leave(tmp_path, "damaged", 9) / "teacher.json").write_text("{")
    (leave(tmp_path, "unmarked", 9) / RUN).unlink()
    said, here = settled(tmp_path, move=True)
    assert said.startswith("trainer.move: .runs/resume has no unfinished run of these settings; it starts from the")
    assert [path.name for path in here.iterdir() if path.name != "lock"] == [RUN]
    assert len(list((tmp_path / STATES).iterdir())) == 6


def test_a_run_that_still_goes_on_cannot_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "LOCK_SECONDS", 0.3)
    left = shutil.copytree(leave(tmp_path, "there", 7), tmp_path / STATES / "prepare-key")  # what the process holds
    shutil.rmtree(tmp_path / STATES / "pretrain-there")
    other = another_process(tmp_path)
    with pytest.raises(Refusal, match="the run still goes on elsewhere .ddp on 2 ranks.: end it, then run this again"):
        with ResumeState(tmp_path, "prepare", "here") as state:
            settle_in(state, tmp_path, RUN_KEY, HERE, move=True)
    other.kill()
    other.communicate()
    assert (Path(left) / "teacher-7.pt").exists()


@pytest.mark.parametrize("broken", ["copy2", "rmtree"])
def test_a_kill_while_a_state_moves_loses_nothing(tmp_path, monkeypatch, broken):
    leave(tmp_path, "there", 7)
    with monkeypatch.context() as patch:
        patch.setattr(moving.shutil, broken, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), ResumeState(tmp_path, "pretrain", "here") as state:
            settle_in(state, tmp_path, RUN_KEY, HERE, move=True)
    said, here = settled(tmp_path, move=True)
    assert ("goes on with the run" in said) == (broken == "copy2")
    assert read_json(here / "teacher.json")["step"] == 7 and (here / "teacher-7.pt").read_bytes() == b"weights"


def test_a_run_is_the_same_in_any_place_and_another_where_anything_else_differs(tmp_path, tiny_settings):
    (tmp_path / "input").write_text("text")

    def keys(**trainer):
        plain = with_values(tiny_settings, "trainer", **trainer).model_dump(include={"trainer", "pretrain", "seed"})
        return resume_and_run_key("pretrain", [plain], [without_place(plain)], [tmp_path / "input"])

    moved = keys(strategy="fsdp2", ranks=4, accelerator="cpu", checkpoint_every_seconds=1.0)
    assert moved[0] != keys()[0] and moved[1] == keys()[1]
    for other in ({"precision": "32-true"}, {"gradient_clip_val": 2.0}, {"deterministic": False}):
        assert keys(**other)[1] != keys()[1]
    before = keys()
    (tmp_path / "input").write_text("other text")
    assert keys()[1] != before[1]


def test_the_order_of_windows_is_one_number_however_many_ranks_read_them():
    windows = [5, 2, 9, 9, 0, 7]
    whole = order_of(0, windows)
    dealt = [order_of(0, windows[:3]), order_of(3, windows[3:])]
    bytes_summed = [sum(pair) for pair in zip(*map(as_numbers, dealt), strict=True)]
    assert from_numbers(bytes_summed) == whole and len(bytes_summed) == BYTES
    swapped, missing, twice = [2, 5, 9, 9, 0, 7], windows[:-1], [*windows, 7]
    assert len({whole, *(order_of(0, other) for other in (swapped, missing, twice))}) == 4


# ---- a stage that moves


class ForkedRanks:
    """A launcher of so many forked ranks, which are told to stop at a step."""

    def __init__(self, ranks: int, stop: int):
        self.ranks, self.stop = ranks, stop

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def conditions(self, trainer: dict) -> dict:
        return {"ranks": self.ranks, "accelerator": "none", "precision": "32-true", "threads_per_rank": 1}

    def run(self, job: Path) -> int:
        stop = self.stop

        def in_rank(_):
            from stages.training import rank

            warnings.filterwarnings("ignore")
            steps = iter(range(1, 100))
            rank.Rank.wish_to_stop = lambda _: rank.INTERRUPTED if next(steps) == stop else 0.0
            sys.argv = ["rank", str(job)]
            rank.main()

        try:
            in_ranks(self.ranks, job.parent / "ranks", in_rank)
        except AssertionError:  # a rank was refused
            return 1
        return 0


class FollowedRun(SilentRun):
    def follow(self):
        pass

    def metrics(self, values, step=None, at=None):
        pass


def test_a_run_stopped_under_one_strategy_goes_on_under_another_and_says_so_in_its_record(
    tmp_path, tiny_settings, monkeypatch, capfd
):
    settings = with_values(tiny_settings, "pretrain", steps=6, validate_every_steps=6).model_copy(
        update={"sequence_tokens": 32, "callbacks": {}, "logger": {}}
    )
    settings = with_values(settings, "trainer", log_every_steps=1)

    def pretrained(root: Path, strategy: str, ranks: int, stop: int = 0, move: bool = False):
        if not (root / "artifacts").exists():
            write_data(root / "artifacts/data")
        monkeypatch.setattr(launching, "placed", lambda *_: ForkedRanks(ranks, stop))
        chosen = with_values(settings, "trainer", strategy=strategy, ranks=ranks, move=move)
        sections = {*pretrain.SECTIONS, "callbacks", "logger", "engine"}
        chosen = type(chosen).model_construct(sections, **dict(chosen))
        return launching.launch(pretrain.fits, chosen, Place(root, root), ["artifacts/data"], FollowedRun())

    stayed, conditions = pretrained(tmp_path / "stayed", "ddp", 2)
    assert "moved" not in conditions and "moved" not in read_json(tmp_path / "stayed/measurements/pretrain.json")
    for strategy, ranks, stop in (("ddp", 2, 2), ("fsdp2", 4, 2)):  # a count of steps is of one process
        with pytest.raises(Refusal, match="interrupted after step . of 6; the same command continues"):
            pretrained(tmp_path / "moved", strategy, ranks, stop, move=True)
    capfd.readouterr()
    result, conditions = pretrained(tmp_path / "moved", "ddp", 1, move=True)
    told = capfd.readouterr().out
    assert "pretrain: goes on with the run that was left elsewhere (fsdp2 on 4 ranks, teacher at step 4)" in told
    where = "ddp on 2 ranks from step 0, fsdp2 on 4 ranks from step 2, ddp on 1 rank from step 4"
    assert conditions["moved"] == f"teacher: {where}"
    found = read_json(tmp_path / "moved/measurements/pretrain.json")["moved"]["teacher"]
    assert found["data_order_equal"] is True and found["batches"] == 6
    assert found["data_order"] == found["data_order_of_one_rank"] != "0x" + "0" * 16
    assert 0 == found["places"]["0"]["bytes"] < found["places"]["1"]["bytes"] < found["bytes_that_travelled"]
    assert not list((tmp_path / "moved" / STATES).iterdir()), "nothing is left in any place"

    losses = [[row["loss"] for row in one["teacher"]["curve"]] for one in (stayed, result)]
    assert losses[0] == pytest.approx(losses[1], abs=5e-4), "Muon rounds to bfloat16"
    print(json.dumps({"largest difference of loss": max(abs(a - b) for a, b in zip(*losses, strict=True))}))

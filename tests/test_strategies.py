"""Strategies that share the model out: the loss of DDP, and a state that any strategy and number of ranks goes on from.

The ranks are real and joined by gloo, but forks of one process (tests/forked_ranks.py).
"""

import shutil
import warnings
from pathlib import Path

import pytest
from forked_ranks import in_ranks
from safetensors.torch import load_file
from test_evaluate import with_values, write_data

from stages import pretrain, training
from stages.files.artifacts import Refusal, read_json, sha256_of, write_json
from stages.run.entry import Place
from stages.training.callbacks import ExactResume
from stages.training.checkpoints import Checkpoint, Part, join_parts
from stages.training.job import Job, name_of
from stages.training.rank import INTERRUPTED, Rank, run_fit
from stages.training.sharing import checkpoints_in, make_whole

STEPS, STOP = 3, 2
PLACES = {  # strategy, ranks, ranks of a machine
    "single": ("ddp", 1, 1),
    "ddp 2": ("ddp", 2, 2),
    "ddp 4": ("ddp", 4, 4),
    "fsdp2 1": ("fsdp2", 1, 1),
    "fsdp2 2": ("fsdp2", 2, 2),
    "fsdp2 4": ("fsdp2", 4, 4),
    "hsdp 2x2": ("hsdp", 4, 2),
}
MORE_PLACES = {"hsdp 2x1": ("hsdp", 2, 1)}


@pytest.fixture(scope="module")
def settings(tiny_settings):
    settings = with_values(tiny_settings, "pretrain", steps=STEPS, validate_every_steps=STEPS, validation_sequences=5)
    settings = with_values(settings, "teacher", layers=2).model_copy(update={"sequence_tokens": 32})
    settings = with_values(settings, "optimizer", name="adamw")
    return with_values(settings, "trainer", gradient_clip_val=None, log_every_steps=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("strategies")
    write_data(root / "artifacts/data")
    return root


def train(root: Path, settings, place: str, states: list[Path], stop: int | None = None, first=lambda: None) -> list:
    """What the teacher's fit gives on rank zero of this place, for one state after another.

    `stop` it after a step; `first` is called in each rank before.
    """
    strategy, ranks, of_machine = (PLACES | MORE_PLACES)[place]
    settings = with_values(settings, "trainer", strategy=strategy)

    def in_rank(_):
        warnings.filterwarnings("ignore")
        first()
        return [_fit(root, settings, state, stop) for state in states]

    for state in states:
        state.mkdir(parents=True, exist_ok=True)
    return in_ranks(ranks, root / "ranks", in_rank, of_machine)[0]


def _fit(root: Path, settings, state: Path, stop: int | None) -> dict | str:
    job = Job("pretrain", name_of(pretrain.fits), settings, Place(root, state), state, "cpu", "32-true")
    rank = Rank(job)
    (fit,) = pretrain.fits(settings, job.place, None)
    steps = iter(range(1, STEPS + 1))
    if stop:
        rank.wish_to_stop = lambda: INTERRUPTED if next(steps) == stop else 0.0
    try:
        return run_fit(fit, rank)
    except Refusal as refusal:
        return str(refusal)


def weights(state: Path) -> Path:
    return state / "artifacts/teacher/model.safetensors"


def farthest(one: Path, other: Path) -> float:
    """The largest difference of two weights."""
    ours, theirs = load_file(weights(one)), load_file(weights(other))
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def stayed(root, settings) -> dict[int, Path]:
    """Runs that were never stopped, by their number of ranks."""
    for place in ("single", "ddp 2"):
        train(root, settings, place, [root / "stayed" / place])
    return {1: root / "stayed/single", 2: root / "stayed/ddp 2"}


@pytest.fixture(scope="module")
def written(root, settings) -> dict[str, Path]:
    """States of runs that were stopped, by place."""
    states = {place: root / "written" / place for place in PLACES}
    for place, state in states.items():
        (said,) = train(root, settings, place, [state], stop=STOP)
        assert said == f"teacher: interrupted after step {STOP} of {STEPS}; the same command continues from there"
        assert read_json(state / "teacher.json")["file"] == "teacher-2.pt", "one file, whatever the strategy"
    return states


@pytest.mark.parametrize("reader", PLACES)
def test_a_run_goes_on_in_any_place_from_what_any_place_has_written(root, settings, stayed, written, reader):
    copies = {writer: root / "read" / reader / writer for writer in PLACES}
    for writer, copy in copies.items():
        shutil.copytree(written[writer], copy)
    results = train(root, settings, reader, list(copies.values()))
    for (writer, state), result in zip(copies.items(), results, strict=True):
        ranks = {PLACES[writer][1], PLACES[reader][1]}
        if ranks in ({1}, {2}):  # gradients are summed in one order
            same = sha256_of(weights(stayed[ranks.pop()]))
            assert sha256_of(weights(state)) == same, f"{writer} to {reader}"
        assert farthest(state, stayed[1]) < 1e-4, f"{writer} to {reader}"
        assert len(result["curve"]) == STEPS
        moved = result["moved"]
        assert bool(moved) == (writer != reader)
        if moved:
            assert moved["data_order_equal"] and moved["batches"] == STEPS
            assert [place["from_step"] for place in moved["places"].values()] == [0, STOP]
            assert moved["bytes_that_travelled"] == (written[writer] / "teacher-2.pt").stat().st_size


def test_muon_takes_the_same_steps_where_the_model_is_shared_out(root, settings):
    settings = with_values(settings, "optimizer", name="muon")
    states = {place: root / "muon" / place for place in ("ddp 2", "fsdp2 2", "hsdp 2x1")}
    for place, state in states.items():
        train(root, settings, place, [state])
    assert len({sha256_of(weights(state)) for state in states.values()}) == 1


def validates_one_sequence_at_a_time():
    """2 batches for one of four ranks, 1 for the others."""
    training.fit.VALIDATION_BATCH = training.rank.VALIDATION_BATCH = 1


def test_a_clipped_gradient_differs_in_the_last_bit_and_ranks_with_fewer_validation_batches_wait_for_none(
    root, settings
):
    settings = with_values(settings, "trainer", gradient_clip_val=0.1)
    bits = {}
    for place in ("ddp 4", "fsdp2 4"):
        (result,) = train(root, settings, place, [root / "clipped" / place], first=validates_one_sequence_at_a_time)
        bits[place] = result["validation_bits_per_byte"]
    assert bits["fsdp2 4"] == pytest.approx(bits["ddp 4"], rel=1e-5)
    assert farthest(root / "clipped/ddp 4", root / "clipped/fsdp2 4") < 1e-4


def dies_at_step_3():
    """ExactResume saves after each step before, and ends there as a killed rank does."""
    saves = ExactResume.after_step

    def after_step(self, trainer, module):
        if module.progress.step == 3:
            raise Refusal("killed")
        saves(self, trainer, module)
        module.saves.part.wait()
        module.progress.checkpoint.wait()

    ExactResume.after_step = after_step


@pytest.fixture
def in_parts(root, settings, tmp_path) -> Path:
    """The state of two ranks, killed when the parts of step 1 are the checkpoint and those of step 2 are on disk."""
    settings = with_values(settings, "trainer", checkpoint_every_seconds=0.0)
    assert train(root, settings, "fsdp2 2", [tmp_path / "state"], first=dies_at_step_3) == ["killed"]
    names = [path.name for path in (tmp_path / "state").glob("*.pt")]
    assert sorted(names) == [f"teacher.{rank}of2-{step}.pt" for rank in (0, 1) for step in (1, 2)]
    assert read_json(tmp_path / "state/teacher.json")["step"] == 1
    return tmp_path / "state"


def test_ranks_of_several_machines_write_one_file(root, settings, tmp_path):
    settings = with_values(settings, "trainer", checkpoint_every_seconds=0.0)
    assert train(root, settings, "hsdp 2x1", [tmp_path], first=dies_at_step_3) == ["killed"]
    assert sorted(path.name for path in tmp_path.glob("teacher*")) == ["teacher-2.pt", "teacher.json"]


def test_parts_that_a_killed_run_leaves_are_read_by_other_ranks_and_made_one_file(root, settings, stayed, in_parts):
    copy, other = (Path(shutil.copytree(in_parts, in_parts.with_name(name))) for name in ("copy", "other"))
    (result,) = train(root, settings, "ddp 2", [in_parts])
    assert [place["from_step"] for place in result["moved"]["places"].values()] == [0, 1]
    assert sha256_of(weights(in_parts)) == sha256_of(weights(stayed[2]))
    assert sorted(path.name for path in in_parts.glob("teacher*")) == ["teacher-3.pt", "teacher.json"]

    said = [join_parts(copy / "teacher.json") for _ in range(2)]  # the second time it is one file already
    assert said == [f"{copy / 'teacher-1.pt'}: step 1, {(copy / 'teacher-1.pt').stat().st_size:,} bytes"] * 2
    assert sorted(path.name for path in copy.glob("teacher*")) == ["teacher-1.pt", "teacher.json"]
    train(root, settings, "fsdp2 2", [copy])
    assert sha256_of(weights(copy)) == sha256_of(weights(stayed[2]))

    (other / "teacher.1of2-1.pt").write_bytes(b"half a part")
    assert Checkpoint(other, "teacher").load() is None
    with pytest.raises(Refusal, match="not converted; a run goes on without it, from the beginning of this model"):
        join_parts(other / "teacher.json")


def test_parts_are_made_one_file_before_they_are_handed_to_other_machines(in_parts):
    make_whole(in_parts)
    assert sorted(path.name for path in in_parts.glob("teacher*")) == ["teacher-1.pt", "teacher.json"]
    assert list(checkpoints_in(in_parts)) == ["teacher.json"]


def test_parts_of_one_save_are_named_together_or_not_at_all(in_parts, capsys):
    part = Part(Checkpoint(in_parts, "teacher"), rank=0, ranks=2)
    before = (in_parts / "teacher.json").read_bytes()
    write_json(in_parts / "teacher.1of2.json", read_json(in_parts / "teacher.1of2.json") | {"step": 1})
    part.name_all(2)
    assert "step 2 could not be written (the ranks have written parts of several" in capsys.readouterr().out
    assert (in_parts / "teacher.json").read_bytes() == before


@pytest.mark.parametrize("name", ["job.json", "teacher-1.pt", "nothing.json"])
def test_what_is_no_index_of_a_checkpoint_is_refused_by_the_converter(tmp_path, name):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(Refusal, match=r"is not the index of a checkpoint: name <state>/<model>.json|is missing"):
        join_parts(tmp_path / name)

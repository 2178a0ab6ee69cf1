"""A model trained from nothing gets the cost of what it is held against: as many whole steps, and no more."""

from dataclasses import asdict
from pathlib import Path

import pytest
from test_evaluate import VOCAB, with_values

from stages import challenge
from stages.compress.pruning import pruned_shape
from stages.files.artifacts import Refusal, read_json, write_json
from stages.model.families.registry import family_of
from stages.model.hub import build_student, build_teacher
from stages.run.entry import Place
from stages.training.cost import step_flops

FLOPS = {
    "teacher": 30_000_000_000, "student": 9_000_000_000, "control": 6_000_000_000, "warm_control": 7_000_000_000,
    "cold_student": 8_000_000_000, "sparse_teacher": 5_000_000_000, "continued_teacher": 4_000_000_000,
    "sparse_student": 2_000_000_000, "continued_student": 1_000_000_000,
}  # fmt: skip
STAGE_OF = {"teacher": "pretrain", "sparse": "sparsify", "continued": "sparsify"}


@pytest.fixture
def shapes(tiny_settings):
    T = tiny_settings.sequence_tokens
    teacher = build_teacher(tiny_settings.teacher, VOCAB, T, seed=1).shape
    student = build_student(tiny_settings.student, VOCAB, T, seed=1).shape
    pruned = {
        "sparse_teacher": pruned_shape(teacher, {"neurons": 0.5, "experts": 0.5}),
        "sparse_student": pruned_shape(student, {"neurons": 0.5}),
    }
    return {name: teacher if "teacher" in name else student for name in FLOPS} | pruned


@pytest.fixture
def root(tmp_path, shapes) -> Path:
    stages: dict[str, dict] = {"pretrain": {}, "distill": {}, "sparsify": {}}
    for name, shape in shapes.items():
        stages[STAGE_OF.get(name.partition("_")[0], "distill")][name] = {
            "config": family_of(shape).config_of(shape),
            "training_flops": FLOPS[name],
            "bias_update_rate": 0.002 if name == "teacher" else 0.0,
            "balance_loss_weight": 0.0003 if name == "teacher" else 0.0,
        }
    for stage, made in stages.items():
        write_json(tmp_path / f"artifacts/costs/{stage}.json", made)
    return tmp_path


def fits_of(root: Path, settings) -> dict:
    return {fit.name: fit for fit in challenge.fits(settings, Place(root, root), None)}


def test_each_takes_as_many_steps_as_the_whole_cost_of_its_model_pays_for(root, shapes, tiny_settings):
    found = fits_of(root, tiny_settings)
    whole = {
        "scratch_student": FLOPS["teacher"] + FLOPS["student"],
        "scratch_sparse_teacher": FLOPS["teacher"] + FLOPS["sparse_teacher"],
        "scratch_sparse_student": FLOPS["teacher"] + FLOPS["student"] + FLOPS["sparse_student"],
    }
    assert list(found) == list(whole)
    T = tiny_settings.sequence_tokens
    for name, budget in whole.items():
        fit = found[name]
        assert fit.model.shape == shapes[name.removeprefix("scratch_")], asdict(fit.model.shape)
        one = step_flops(fit.model, fit.batch_sequences * T, T)
        assert fit.steps * one <= budget < (fit.steps + 1) * one


def test_larger_batches_mean_fewer_steps_for_about_the_same_tokens(root, tiny_settings):
    usual = fits_of(root, tiny_settings)["scratch_student"]
    twice = with_values(tiny_settings, "challenge", batch_sequences=2 * usual.batch_sequences)
    larger = fits_of(root, twice)["scratch_student"]
    summed = fits_of(root, with_values(tiny_settings, "trainer", accumulate_grad_batches=2))["scratch_student"]
    assert summed.steps == larger.steps < usual.steps
    tokens = [fit.steps * fit.batch_sequences for fit in (usual, larger)]
    assert tokens[0] <= tokens[1] < 2 * tokens[0], "Muon's share falls, so that more tokens are paid for"


def test_a_mixture_is_balanced_as_the_teacher_was(root, tiny_settings):
    fit = fits_of(root, tiny_settings)["scratch_sparse_teacher"]
    assert (fit.bias_update_rate, fit.objective.balance_loss_weight) == (0.002, 0.0003)


def test_the_whole_cost_of_a_model_has_that_of_those_it_was_made_from(root):
    whole = challenge.whole_costs(challenge.read_costs(Place(root, root)))
    assert whole["teacher"] == FLOPS["teacher"] and whole["control"] == FLOPS["control"]
    for name in ("student", "warm_control", "cold_student", "sparse_teacher", "continued_teacher"):
        assert whole[name] == FLOPS["teacher"] + FLOPS[name]
    for name in ("sparse_student", "continued_student"):
        assert whole[name] == FLOPS["teacher"] + FLOPS["student"] + FLOPS[name]


def test_costs_that_lack_a_model_are_refused_by_its_name(root, tiny_settings):
    path = root / "artifacts/costs/distill.json"
    made = read_json(path)
    del made["student"]
    write_json(path, made)
    with pytest.raises(Refusal, match="artifacts/costs tells nothing of student: run dvc repro"):
        fits_of(root, tiny_settings)
    path.unlink()
    with pytest.raises(Refusal, match="distill.json is missing: run the stage"):
        fits_of(root, tiny_settings)

"""The four cells of the distillation experiment are what their names say and differ in nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_evaluate import VOCAB, with_values, write_data

from stages import distill
from stages.data.shards import read_card
from stages.files.artifacts import Refusal
from stages.model.families.qwen3.model import Qwen3Shape
from stages.model.hub import build_student, build_teacher, load, new_model, save
from stages.run.entry import Place
from stages.training.fit import Distillation, Fit, NextToken


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_settings) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    write_data(root / "artifacts/data")
    tokenizer = read_card(root / "artifacts/data")["tokenizer_sha256"]
    teacher = build_teacher(tiny_settings.teacher, VOCAB, tiny_settings.sequence_tokens, seed=7)
    save(teacher, root / "artifacts/teacher", tokenizer_sha256=tokenizer)
    return root


def cells(root: Path, settings) -> dict[str, Fit]:
    return {fit.name: fit for fit in distill.fits(settings, Place(root, root), lambda name, make: make())}


def same(one: Fit, other: Fit) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_cells_cross_start_and_targets_and_share_everything_else(root, tiny_settings):
    found = cells(root, tiny_settings)
    assert list(found) == ["student", "control", "warm_control", "cold_student"]
    assert same(found["student"], found["warm_control"]) and same(found["control"], found["cold_student"])
    assert not same(found["student"], found["control"])
    for name in ("student", "cold_student"):
        assert isinstance(found[name].objective, Distillation)
    for name in ("control", "warm_control"):
        assert isinstance(found[name].objective, NextToken)
    recipes = {(fit.steps, fit.batch_sequences, fit.learning_rate_scale) for fit in found.values()}
    assert len(recipes) == 1
    plain = build_student(tiny_settings.student, VOCAB, tiny_settings.sequence_tokens, tiny_settings.seed)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), found["control"].model.parameters(), strict=True))
    assert found["student"].prepared_flops == found["warm_control"].prepared_flops > 0
    assert found["control"].prepared_flops == found["cold_student"].prepared_flops == 0


def test_training_one_cell_leaves_the_start_of_the_others_alone(root, tiny_settings):
    """The fits are built one after another, each after the one before was trained."""
    starts = {}
    for fit in distill.fits(tiny_settings, Place(root, root), lambda name, make: make()):
        starts[fit.name] = {key: part.clone() for key, part in fit.model.state_dict().items()}
        with torch.no_grad():
            for parameter in fit.model.parameters():
                parameter.add_(1.0)
    for one, other in (("student", "warm_control"), ("control", "cold_student")):
        assert all(torch.equal(part, starts[other][key]) for key, part in starts[one].items())


def test_a_student_with_a_random_start_is_the_cold_one_and_is_trained_once(root, tiny_settings):
    found = cells(root, with_values(tiny_settings, "distill", init="random"))
    assert list(found) == ["student", "control", "warm_control"]
    assert same(found["student"], found["control"]) and not same(found["warm_control"], found["control"])


@pytest.fixture(scope="module")
def llama(root, tmp_path_factory, tiny_settings) -> Path:
    """The same data, and a dense teacher."""
    other = tmp_path_factory.mktemp("llama")
    shutil.copytree(root / "artifacts/data", other / "artifacts/data")
    shape = Qwen3Shape(VOCAB, 64, layers=3, width=48, heads=4, kv_heads=2, head_dim=12, mlp_width=96, rope_theta=1e4)
    teacher = new_model(replace(shape, kind="llama", tied=True), seed=7)
    save(teacher, other / "artifacts/teacher", tokenizer_sha256=read_card(root / "artifacts/data")["tokenizer_sha256"])
    return other


def test_a_student_cut_out_of_a_dense_teacher_has_the_same_four_cells(llama, tiny_settings):
    pruned = with_values(tiny_settings, "distill", init="pruned")
    found = cells(llama, with_values(pruned, "student", parameters_share=0.6, keep_layers=0.67))
    assert list(found) == ["student", "control", "warm_control", "cold_student"]
    assert same(found["student"], found["warm_control"]) and same(found["control"], found["cold_student"])
    teacher, student = load(llama / "artifacts/teacher"), found["student"].model
    (shape,) = {fit.model.shape for fit in found.values()}
    kept = found["student"].notes["copied"]
    assert (shape.kind, shape.tied, shape.layers, shape.width) == ("llama", True, 2, 48)
    assert kept["neurons"] == shape.mlp_width < 96 and 0.55 < kept["parameters_share"] <= 0.6
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert not same(found["student"], found["control"])
    assert found["student"].prepared_flops == found["warm_control"].prepared_flops > 0
    assert found["control"].prepared_flops == found["cold_student"].prepared_flops == 0
    shown = distill.summaries(pruned.distill)
    assert "started from the teacher's most important layers, heads and neurons and distilled" in shown["student"]
    assert "started from the teacher's most important layers" in shown["warm_control"]


def test_a_dense_teacher_of_its_own_family_is_cut_and_a_mixture_is_not(root, llama, tiny_settings):
    with pytest.raises(Refusal, match="distill.init = pruned: no student is cut out of a deepseek_v3 teacher"):
        cells(root, with_values(tiny_settings, "distill", init="pruned"))
    assert list(cells(llama, with_values(tiny_settings, "distill", init="random")))[:2] == ["student", "control"]
    with pytest.raises(Refusal, match=r"from a llama teacher: set distill.init to pruned \(a student cut out"):
        cells(llama, with_values(tiny_settings, "distill", init="teacher"))


def test_where_nothing_of_the_teacher_fits_there_is_no_warm_cell_to_train(root, tiny_settings):
    wider = with_values(tiny_settings, "student", width=2 * tiny_settings.teacher.width)
    assert list(cells(root, with_values(wider, "distill", init="random"))) == ["student", "control"]
    with pytest.raises(Refusal, match="distill.init to random"):
        cells(root, wider)

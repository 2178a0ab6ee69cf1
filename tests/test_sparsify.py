"""The fits that sparsify hands to its ranks: what is pruned, settled and balanced."""

import shutil

import pytest
from test_evaluate import VOCAB, with_values, write_data

from stages import sparsify
from stages.measure.flops import flops_per_token
from stages.model.hub import build_student, build_teacher, load, save
from stages.run.entry import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_settings):
    root = tmp_path_factory.mktemp("checkout")
    write_data(root / "artifacts/data")
    build = {"teacher": build_teacher, "student": build_student}
    for name, model in build.items():
        save(model(getattr(tiny_settings, name), VOCAB, 64, seed=1), root / "artifacts" / name)
    return Place(root, root)


def sparse_fits(settings, place, **teacher):
    chosen = settings.sparsify.teacher.model_copy(update=teacher)
    settings = with_values(settings, "sparsify", teacher=chosen)
    found = sparsify.fits(settings, place, keep=lambda name, compute: compute())
    return {fit.name: fit for fit in found}


def test_by_confidence_a_pruned_mixture_has_the_operations_of_the_fixed_number(tiny_settings, place, tmp_path):
    fixed = sparse_fits(tiny_settings, place)["sparse_teacher"].model
    fit = sparse_fits(tiny_settings, place, expert_choice="confidence")["sparse_teacher"]
    shape = fit.model.shape
    assert fixed.shape.gate_mass == 1 and fixed.shape.experts_per_token == 2
    assert shape.gate_mass < 1 and shape.experts_per_token == 3, "each token may take as many as in the dense model"
    assert shape.mean_experts_per_token == pytest.approx(2, abs=0.05)
    flops, equal = (flops_per_token(one, 64)["total"] for one in (shape, fixed.shape))
    assert flops == pytest.approx(equal, rel=0.01)
    for block in fit.model.blocks[1:]:
        block.mlp.router_weight.data.mul_(3)  # as training does: surer gates
    fit.finish(fit.model)
    assert fit.model.shape.gate_mass > shape.gate_mass, "settled anew before it is saved"
    assert fit.model.shape.mean_experts_per_token == pytest.approx(2, abs=0.05)
    save(fit.model, tmp_path)
    assert load(tmp_path).shape == fit.model.shape


def test_a_teacher_without_experts_is_pruned_by_what_it_has(tiny_settings, place, tmp_path):
    for name in ("data", "student"):
        shutil.copytree(place.read(f"artifacts/{name}"), tmp_path / "artifacts" / name)
    save(build_student(tiny_settings.student, VOCAB, 64, seed=2), tmp_path / "artifacts/teacher")
    fits = sparse_fits(tiny_settings, Place(tmp_path, tmp_path), expert_choice="confidence", keep_experts=0.5)
    dense, sparse = (fits[f"{how}_teacher"].model.shape for how in ("continued", "sparse"))
    assert sparse.kv_heads < dense.kv_heads and sparse.mlp_width < dense.mlp_width
    assert fits["sparse_teacher"].finish(fits["sparse_teacher"].model) is None


def test_a_pruned_mixture_and_its_control_are_balanced_while_they_train(tiny_settings, place):
    fits = sparse_fits(tiny_settings, place, bias_update_rate=0.002)
    assert {name: fit.bias_update_rate for name, fit in fits.items()} == {
        "sparse_teacher": 0.002,
        "continued_teacher": 0.002,
        "sparse_student": 0.0,
        "continued_student": 0.0,
    }
    assert fits["sparse_student"].finish(fits["sparse_student"].model) is None

"""Experts by the confidence of the router: what is dropped, what is left, what it costs, how it is saved."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pruning import TEACHER, a_model, batches

from stages.files.artifacts import Refusal
from stages.measure.flops import flops_per_token
from stages.model.experts import MoE, confident, route, share_before
from stages.model.families.deepseek_v3.confidence import bisected, mixtures, settle, shares_before
from stages.model.hub import load, save
from stages.model.layers import for_matmuls


def a_mixture(gate_mass, width=32, gating="sigmoid"):
    generator = torch.Generator().manual_seed(1)
    moe = MoE(width, 16, 8, 4, 1, gating, 1.5, gate_mass)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return moe


def by_loop(moe, x_ND):
    """Token by token and expert by expert, in the words of the definition."""
    gates = moe.gates(x_ND)
    rows = []
    for x_D, weight_K, index_K in zip(x_ND, gates.weight_NK, gates.expert_index_NK, strict=True):
        heavy, order = weight_K.sort(descending=True)
        kept, held = [], 0.0
        for weight, place in zip(heavy, order, strict=True):
            if kept and held >= moe.gate_mass * weight_K.sum():
                break
            kept.append((weight, index_K[place]))
            held = held + weight.item()
        total = sum(weight for weight, _ in kept)
        row = moe.shared(x_D)
        for weight, expert in kept:
            gate, up = (moe.gate_up[expert] @ x_D).chunk(2)
            row = row + weight / total * weight_K.sum() * (moe.down[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("gate_mass", "tokens"), [(0.6, 40), (0.3, 40), (0.01, 40), (0.6, 300)])
def test_a_mixture_equals_the_loop_over_experts_with_its_gradients(gate_mass, tokens, gating):
    moe = a_mixture(gate_mass, gating=gating)
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(2))
    outcomes = []
    for compute in (lambda x: moe(x)[0][0], lambda x: by_loop(moe, x[0])):
        own = x.clone().requires_grad_()
        y_ND = compute(own)
        moe.zero_grad()
        (y_ND * torch.arange(32)).sum().backward()
        outcomes.append([y_ND, own.grad, moe.gate_up.grad, moe.down.grad, moe.router_weight.grad])
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-4, atol=2e-4)
    with torch.no_grad():
        alone = torch.cat([moe(x[:, n : n + 1])[0] for n in range(5)], dim=1)
        torch.testing.assert_close(alone, moe(x)[0][:, :5], rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_rows_are_padded_and_the_result_is_near():
    moe = a_mixture(0.5)
    x = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert for_matmuls(x).dtype == torch.bfloat16
        rounded = moe(x)[0].float()
        rounded.sum().backward()
    exact = moe(x)[0]
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_each_token_keeps_the_fewest_experts_that_hold_the_mass_and_their_weights_keep_their_sum(weights, mass):
    weight_NK = torch.tensor(weights)
    gates = route(torch.randn(len(weights), 6), torch.randn(8, 6), torch.zeros(8), 4, "sigmoid", 1.0)
    kept = confident(gates._replace(weight_NK=weight_NK), mass)
    stays = kept.expert_index_NK < 8
    assert stays.sum(-1).min() >= 1 and torch.equal(stays, kept.weight_NK > 0)
    torch.testing.assert_close(kept.weight_NK.sum(-1), weight_NK.sum(-1))
    for own, left in zip(weight_NK, stays, strict=True):
        assert own[left].min() >= own[~left].max() if (~left).any() else True
        assert own[left].sum() >= mass * own.sum() - 1e-5, "they hold the mass"
        assert own[left].sum() - own[left].min() < mass * own.sum() + 1e-5, "and one fewer does not"
    assert share_before(weight_NK).min() == 0


@pytest.mark.parametrize("mean", [1.0, 1.7, 2.5, 3.0])
def test_the_mass_is_found_that_gives_the_mean_count(mean):
    model = a_model(TEACHER)
    text = batches(4)
    settle(model, mean, text)
    assert model.shape.mean_experts_per_token == pytest.approx(mean, abs=0.1)
    assert {moe.gate_mass for moe in mixtures(model)} == {model.shape.gate_mass}
    counts = (shares_before(model, text) < model.shape.gate_mass).sum(-1).double()
    assert counts.mean() == pytest.approx(model.shape.mean_experts_per_token)
    loads = sum(routing.load_E.sum() for tokens in text for routing in model.features(tokens[:, :-1]).routings)
    assert loads == counts.sum(), "what the model runs is what was counted"
    if 1 < mean < 3:
        assert counts.min() < counts.max(), "it differs by token"


def test_the_mean_is_bisected_from_below():
    before_NK = torch.tensor([[0.0, 0.6, 0.9], [0.0, 0.4, 0.7]])
    for mean, mass in ((1.0, 0.4), (1.5, 0.6), (2.0, 0.7), (3.0, 1.0)):
        assert bisected(before_NK, mean) == pytest.approx(mass, abs=1e-6)


@pytest.mark.parametrize("mean", [0.5, 3.5])
def test_a_mean_that_is_no_number_of_experts_is_refused(mean):
    with pytest.raises(Refusal, match="from 1 to experts_per_token \\(3\\)"):
        settle(a_model(TEACHER), mean, batches(1))


def test_operations_are_those_of_the_mean_count():
    fixed = flops_per_token(replace(TEACHER, experts_per_token=2), 16)
    varying = flops_per_token(replace(TEACHER, gate_mass=0.5, mean_experts_per_token=2.0), 16)
    assert varying == fixed
    more = flops_per_token(replace(TEACHER, gate_mass=0.5, mean_experts_per_token=2.5), 16)
    assert more["experts"] == pytest.approx(fixed["experts"] * 1.25)


def test_a_settled_model_survives_saving_and_transformers_refuses_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = a_model(TEACHER)
    settle(model, 2.0, batches(2))
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.shape == model.shape
    tokens = batches(1, seed=9)[0][:, :-1]
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
    with pytest.raises(ValueError, match="offramp_confidence_moe"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"gate_mass": 0.0}, "gate_mass"),
        ({"gate_mass": 0.5, "mean_experts_per_token": 0.0}, "mean_experts_per_token"),
        ({"gate_mass": 0.5, "mean_experts_per_token": 9.0}, "mean_experts_per_token"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(fields, field):
    from stages.model.hub import check_shape

    with pytest.raises(Refusal, match=field):
        check_shape(replace(TEACHER, **fields))

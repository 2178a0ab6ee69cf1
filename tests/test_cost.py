"""Two roads to the operations of a forward pass give one number; parameters are what the tensors hold."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.measure import flops as cost
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.model.hub import new_model

TEACHER = TeacherShape(
    vocab_size=300, sequence_tokens=32, layers=3, dense_layers=1, width=48, heads=3, nope_head_dim=8,
    rope_head_dim=8, value_head_dim=16, latent_width=20, dense_width=72, experts=6, experts_per_token=2,
    shared_experts=1, expert_width=24, gating="sigmoid", route_scale=1.0, rope_theta=10000.0,
)  # fmt: skip
STUDENT = StudentShape(
    vocab_size=300, sequence_tokens=32, layers=2, width=40, heads=4, kv_heads=2, head_dim=12, mlp_width=56,
    rope_theta=10000.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [
        TEACHER,
        dataclasses.replace(TEACHER, gating="softmax", shared_experts=2, experts_per_token=6),
        dataclasses.replace(TEACHER, shared_experts=0, dense_layers=0, heads=1),
        dataclasses.replace(TEACHER, dense_layers=3),
        dataclasses.replace(TEACHER, value_head_dim=8),  # narrower than the key: padded
        dataclasses.replace(TEACHER, value_head_dim=24),
        STUDENT,
        dataclasses.replace(STUDENT, kv_heads=4, width=32),
        dataclasses.replace(STUDENT, heads=1, kv_heads=1, mlp_width=8),
    ],
)
@pytest.mark.parametrize("context_tokens", [1, 8, 32])
def test_the_formula_equals_the_count(shape, context_tokens):
    model = new_model(shape, seed=1)
    formula = cost.flops_per_token(shape, context_tokens)
    assert formula["total"] == pytest.approx(cost.counted_flops_per_token(model, context_tokens), rel=1e-12)
    assert formula["total"] == sum(value for part, value in formula.items() if part != "total")


def test_the_count_of_attention_stops_at_the_diagonal_and_its_backward_is_five_products_for_two():
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    with cost.Counter() as counter:
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    product = 2 * 2 * 3 * (16 * 17 // 2) * 8
    assert counter.get_total_flops() == 7 * product
    with cost.Counter() as counter:
        F.scaled_dot_product_attention(query.detach(), query.detach(), query.detach())
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_grouped_matmul_is_counted_forward_and_backward():
    rows = torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(3, 8, 16, requires_grad=True)
    ends = torch.tensor([5, 12, 20], dtype=torch.int32)
    with cost.Counter() as counter:
        out = F.grouped_mm(rows, weight, offs=ends)
        assert counter.get_total_flops() == 2 * 20 * 8 * 16
        out.backward(torch.ones_like(out))
    assert counter.get_total_flops() == 3 * 2 * 20 * 8 * 16


def test_more_experts_cost_memory_and_router_but_no_expert_flops():
    wider = dataclasses.replace(TEACHER, experts=12)
    before, after = cost.flops_per_token(TEACHER, 32), cost.flops_per_token(wider, 32)
    assert after["experts"] == before["experts"] and after["router"] == 2 * before["router"]
    models = new_model(TEACHER, 1), new_model(wider, 1)
    totals, actives = [
        [count(m) for m in models] for count in (cost.total_parameters, cost.active_parameters)
    ]
    assert totals[1] > totals[0]
    assert actives[1] - actives[0] == 2 * 6 * 48, "only the router's rows are met by every token"


def test_a_dense_model_is_all_active():
    model = new_model(STUDENT, 1)
    assert (
        cost.active_parameters(model)
        == cost.total_parameters(model)
        == sum(p.numel() for p in model.parameters())
    )


def test_interleaved_timing_runs_each_action_in_turn_and_drops_the_warm_up():
    order = []
    seconds = cost.interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_of_times_lies_in_its_interval_which_a_drift_of_the_machine_does_not_widen():
    drift, noise = np.linspace(1.0, 2.0, 21), np.random.default_rng(1).normal(1.0, 0.01, 21)
    assert cost.median_ratio(2 * drift, drift, seed=1) == pytest.approx((2, 2, 2))
    ratio, low, high = cost.median_ratio(2 * drift * noise, drift, seed=1)
    assert low < ratio < high and low == pytest.approx(2, rel=0.02) and high == pytest.approx(2, rel=0.02)

"""What a training step costs by formula is what it really runs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from stages.measure.flops import Counter
from stages.model.hub import empty_model, new_model
from stages.training.cost import forward_flops, muon_flops, step_flops
from stages.training.fit import Distillation, NextToken
from stages.training.optimizers import make_optimizer
from tests.test_cost import STUDENT, TEACHER

SEQUENCES, TOKENS = 3, 32
RECIPE = SimpleNamespace(
    name="muon", muon_learning_rate=0.01, muon_momentum=0.9, adamw_learning_rate=0.01, adamw_beta1=0.9,
    adamw_beta2=0.95, weight_decay=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "teacher"),
    [
        (TEACHER, None),
        (dataclasses.replace(TEACHER, shared_experts=0, experts_per_token=4), None),
        (STUDENT, None),
        (STUDENT, TEACHER),
        (TEACHER, TEACHER),
    ],
    ids=["mixture", "no shared expert", "dense", "distilled from a mixture", "recovered mixture"],
)
def test_the_formula_of_a_step_equals_the_count_of_what_it_runs(shape, teacher):
    model = new_model(shape, seed=1)
    optimizer = make_optimizer(model, RECIPE, 1.0)
    objective = NextToken(1e-4)
    if teacher is not None:
        teacher = new_model(teacher, seed=2)
        objective = Distillation(teacher, "forward_kl", 1.0, 0.9, chunk_tokens=40)
    tokens_BT1 = torch.randint(300, (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    with Counter() as counter:
        objective(model, tokens_BT1).loss.backward()
        optimizer.step()
    batch = SEQUENCES * TOKENS
    # torch counts the attention scores that the backward kernel computes again, and knows no addmm_, which makes the
    # gradient of the head
    head_width = getattr(shape, "head_dim", None) or max(
        shape.nope_head_dim + shape.rope_head_dim, shape.value_head_dim
    )
    scores_again = 2 * shape.layers * shape.heads * head_width * (TOKENS + 1) / 2 * batch
    head_gradient = 2 * shape.width * shape.vocab_size * batch
    expected = step_flops(model, batch, TOKENS, teacher)
    assert counter.get_total_flops() - scores_again + head_gradient == pytest.approx(expected, rel=1e-12)


def test_muons_share_is_counted_too_and_needs_no_weights():
    model = new_model(TEACHER, seed=1)
    optimizer = make_optimizer(model, RECIPE, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Counter() as counter:
        optimizer.step()
    assert counter.get_total_flops() == muon_flops(model) == muon_flops(empty_model(TEACHER)) > 0


def test_the_cost_of_a_step_grows_with_its_tokens_but_not_muons():
    one, two = (step_flops(empty_model(STUDENT), tokens, TOKENS) for tokens in (64, 128))
    assert two - one == 3 * forward_flops(STUDENT, 64, TOKENS)

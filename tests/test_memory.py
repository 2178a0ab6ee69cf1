"""Checkpointing policies: the same gradients, fewer bytes, and a model that is as it was afterwards."""

import pytest
import torch

from stages.measure import memory
from stages.model.hub import build_student, build_teacher
from stages.model.losses import next_token
from stages.training.fit import NextToken

POLICIES = ["none", "every_3", "every_2", "every_1", "all_but_last", "selective"]


@pytest.fixture(scope="module", params=["teacher", "student"])
def step(request, tiny_settings):
    if request.param == "teacher":
        model = build_teacher(tiny_settings.teacher, 512, 64, seed=1)
    else:
        model = build_student(tiny_settings.student, 512, 64, seed=1)
    tokens_BT1 = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(1))

    def loss_of():
        x_BTD = model.features(tokens_BT1[:, :-1]).x_BTD
        return next_token(x_BTD.flatten(0, 1), model.head.weight, tokens_BT1[:, 1:].reshape(-1))

    return model, loss_of


@pytest.fixture(scope="module")
def rows(step):
    return {row["policy"]: row for row in memory.compare_policies(step[0], POLICIES, step[1])}


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_without_checkpointing(rows, policy):
    assert rows[policy]["gradients_equal"]


def test_the_more_blocks_are_recomputed_the_fewer_bytes_are_kept(rows):
    kept = [rows[name]["activation_bytes"] for name in ("none", "every_3", "every_2", "every_1")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert rows["none"]["memory_saved"] == 0 == rows["none"]["recomputed_flops_share"]
    assert rows["every_1"]["memory_saved"] > 0.5
    assert rows["all_but_last"]["memory_saved"] > 0.45
    assert 0.1 < rows["selective"]["memory_saved"] < rows["every_1"]["memory_saved"]


def test_recomputation_is_what_the_policy_says(rows):
    share = {name: row["recomputed_flops_share"] for name, row in rows.items()}
    assert 0 < share["every_3"] < share["every_2"] == share["all_but_last"] < share["every_1"] < 1
    assert share["selective"] < share["every_3"] * 1.2, "matrices and attention are kept, not repeated"


def test_counted_activations_agree_with_the_tensors_that_autograd_saves(step, rows):
    saved = memory.saved_bytes(*step)
    assert rows["none"]["activation_bytes"] == pytest.approx(saved, rel=0.01)


def test_bytes_are_the_same_on_every_measurement(step, rows):
    again = memory.compare_policies(step[0], ["every_2", "selective"], step[1])
    assert again == [rows["every_2"], rows["selective"]]


def test_the_model_is_as_it_was_afterwards_even_after_an_error(step):
    model, loss_of = step
    with pytest.raises(KeyError), memory.checkpointed(model, "every_1"):
        raise KeyError
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_recomputed_router_counts_no_token_twice(tiny_settings):
    model = build_teacher(tiny_settings.teacher, 512, 64, seed=1)
    tokens_BT1 = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(1))
    loads = []
    for policy in ("none", "every_1", "selective"):
        with memory.checkpointed(model, policy):
            outcome = NextToken(balance_loss_weight=0.01)(model, tokens_BT1)
            outcome.loss.backward()
        loads.append(torch.stack(outcome.loads))
        assert loads[-1].sum(-1).tolist() == [2 * 64 * 3] * 2
    assert torch.equal(loads[0], loads[1]) and torch.equal(loads[0], loads[2])


def test_policies_that_checkpoint_nothing_new_are_left_out():
    assert memory.policies((4, 2, 1), layers=3) == ["none", "every_2", "every_1", "all_but_last", "selective"]


@pytest.mark.parametrize("policy", ["every_0", "every", "all", ""])
def test_an_unknown_policy_is_named(step, policy):
    with pytest.raises(ValueError, match="policy"), memory.checkpointed(step[0], policy):
        pass

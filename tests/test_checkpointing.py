"""Checkpointing policies: the same gradients, fewer bytes, and a model that is as it was afterwards."""

import pytest
import torch

from stages.files.artifacts import Refusal
from stages.model import checkpointing
from stages.model.hub import build_student, build_teacher
from stages.model.losses import next_token
from stages.training.fit import NextToken

POLICIES = [
    "none", "every_3", "every_2", "every_1", "all_but_last", "selective",
    "first_1", "first_2", "attention_1", "attention_3", "mlp_1", "mlp_3",
]  # fmt: skip


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
    return {row["policy"]: row for row in checkpointing.compare_policies(step[0], POLICIES, step[1])}


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
    assert share["first_2"] == share["all_but_last"] and share["first_1"] == share["every_3"]
    assert 0 < share["attention_1"] < share["attention_3"] < share["every_1"]
    assert 0 < share["mlp_1"] < share["mlp_3"] < share["every_1"]


def test_a_budget_takes_the_policy_that_repeats_least_of_those_that_fit(step, rows):
    model, loss_of = step
    plain = rows["none"]["activation_bytes"]
    tried = {name: rows[name] for name in POLICIES if name.partition("_")[0] in ("first", "attention", "mlp")}
    tried |= {"selective": rows["selective"], "first_3": rows["every_1"] | {"policy": "first_3"}}
    for budget in (plain, int(plain * 0.6)):
        chosen = checkpointing.least_recomputation(model, budget, loss_of, "the model")
        assert chosen.activation_bytes <= budget
        cheaper = [row for row in tried.values() if row["recomputed_flops_share"] < chosen.recomputed_flops_share]
        assert all(row["activation_bytes"] > budget for row in cheaper)
        assert (chosen.policy == "none") == (budget == plain)


def test_a_budget_that_cannot_be_reached_is_refused_with_the_least_that_can(step, rows):
    model, loss_of = step
    with pytest.raises(Refusal) as caught:
        checkpointing.least_recomputation(model, 1000, loss_of, "teacher (4 sequences)")
    least = min(row["activation_bytes"] for row in rows.values())
    assert f"keeps so little for teacher (4 sequences): set it to {least} at least" in str(caught.value)
    assert checkpointing.least_recomputation(model, least, loss_of, "the model").activation_bytes == least


def test_a_deep_model_is_tried_with_few_numbers_of_blocks():
    of_two = [f"{part}_{depth}" for part in ("first", "attention", "mlp") for depth in (1, 2)]
    assert checkpointing.candidates(2) == [*of_two, "selective"]
    deep = checkpointing.candidates(61)
    assert len(deep) == 19 and {"first_61", "attention_61", "mlp_61", "first_11"} <= set(deep)


def test_counted_activations_agree_with_the_tensors_that_autograd_saves(step, rows):
    saved = checkpointing.saved_bytes(*step)
    assert rows["none"]["activation_bytes"] == pytest.approx(saved, rel=0.01)


def test_bytes_are_the_same_on_every_measurement(step, rows):
    again = checkpointing.compare_policies(step[0], ["every_2", "selective"], step[1])
    assert again == [rows["every_2"], rows["selective"]]


def test_the_model_is_as_it_was_afterwards_even_after_an_error(step):
    model, loss_of = step
    with pytest.raises(KeyError), checkpointing.checkpointed(model, "every_1"):
        raise KeyError
    assert all("forward" not in module.__dict__ for module in model.modules())
    with pytest.raises(KeyError), checkpointing.checkpointed(model, "mlp_2"):
        raise KeyError
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_recomputed_router_counts_no_token_twice(tiny_settings):
    model = build_teacher(tiny_settings.teacher, 512, 64, seed=1)
    tokens_BT1 = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(1))
    loads = []
    for policy in ("none", "every_1", "selective", "mlp_3"):
        with checkpointing.checkpointed(model, policy):
            outcome = NextToken(balance_loss_weight=0.01)(model, tokens_BT1)
            outcome.loss.backward()
        loads.append(torch.stack(outcome.loads))
        assert loads[-1].sum(-1).tolist() == [2 * 64 * 3] * 2
    assert all(torch.equal(loads[0], other) for other in loads[1:])


def test_policies_that_checkpoint_nothing_new_are_left_out():
    parts = ["attention_3", "mlp_3"]
    expected = ["none", "every_2", "every_1", "all_but_last", *parts, "selective"]
    assert checkpointing.policies((4, 2, 1), layers=3) == expected
    assert len(checkpointing.policies((4, 3, 2, 1), layers=4)) >= 8, "points of the frontier at scale demo"


@pytest.mark.parametrize("policy", ["every_0", "every", "all", "", "head_2", "mlp_0"])
def test_an_unknown_policy_is_named(step, policy):
    with pytest.raises(ValueError, match="policy"), checkpointing.checkpointed(step[0], policy):
        pass

"""Muon on stacks against torch.optim.Muon, and the schedule."""

import pytest
import torch

from benchmarks.variants import MUON
from stages.training import optimizers
from stages.training.optimizers import (
    MuonAdamW,
    fair_shares,
    learning_rate_factor,
    orthogonalise,
    orthogonalise_by_shape,
)


@pytest.fixture
def torch_iterations(monkeypatch):
    """The coefficients of torch.optim.Muon, five times."""
    monkeypatch.setattr(optimizers, "COEFFICIENTS", (MUON,) * 5)
    monkeypatch.setattr(optimizers, "NORM_MARGIN", 1.0)


def muon(parameters, matrices=1):
    groups = [{"params": parameters, "use_muon": True, "matrices": matrices}]
    return MuonAdamW(groups, lr=0.02, momentum=0.95, weight_decay=0.1)


def test_each_matrix_of_a_stack_moves_as_torch_optim_muon_moves_it_alone(torch_iterations):
    torch.manual_seed(0)
    for rows, columns in ((24, 16), (16, 24)):
        stack = torch.nn.Parameter(torch.randn(3, rows, columns))
        alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
        ours = muon([stack])
        theirs = torch.optim.Muon(alone, lr=0.02, momentum=0.95, weight_decay=0.1)
        for _ in range(3):
            stack.grad = torch.randn_like(stack)
            for matrix, gradient in zip(alone, stack.grad, strict=True):
                matrix.grad = gradient.clone()
            ours.step()
            theirs.step()
        # bfloat16 inside the iteration: the two sum in another order
        torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in alone]), rtol=0, atol=2e-3)


def test_a_single_matrix_moves_as_torch_optim_muon_moves_it(torch_iterations):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    ours.grad = torch.randn(24, 16)
    theirs.grad = ours.grad.clone()
    muon([ours]).step()
    torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1).step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_gate_and_up_fused_in_one_parameter_move_as_two_matrices():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(3, 32, 24))
    gate, up = (torch.nn.Parameter(half.clone()) for half in fused.detach().split(16, dim=1))
    fused.grad = torch.randn(3, 32, 24)
    gate.grad, up.grad = fused.grad.split(16, dim=1)
    muon([fused], matrices=2).step()
    muon([gate, up]).step()
    torch.testing.assert_close(fused.detach(), torch.cat([gate, up], dim=1).detach(), rtol=0, atol=2e-3)


def test_groups_without_muon_move_bit_for_bit_as_torch_optim_adamw_moves_them_also_after_a_resume():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    hidden = torch.nn.Parameter(torch.ones(16, 16))
    groups = [{"params": [hidden], "use_muon": True}, {"params": [ours], "lr": 0.003, "betas": (0.9, 0.95)}]
    optimizer = MuonAdamW(groups, lr=0.02, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.003, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(4):
        hidden.grad, ours.grad = torch.randn_like(hidden), torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs) and not torch.equal(hidden, torch.ones(16, 16))
        saved = optimizer.state_dict()
        optimizer = MuonAdamW(groups, lr=0.02, weight_decay=0.1)
        optimizer.load_state_dict(saved)


def test_singular_values_from_a_hundredth_of_the_norm_on_end_near_one():
    values = torch.logspace(-2, 0, 2000, dtype=torch.float64)
    for a, b, c in optimizers.COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.72 and values.max() < 1.28


def test_an_orthogonalised_update_keeps_its_singular_vectors():
    torch.manual_seed(0)
    update = torch.randn(4, 32, 20)
    for given, dtype in ((update, torch.float32), (update.mT.contiguous(), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = orthogonalise(given).float()
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        along = left.mT @ found @ right.mT
        values = along.diagonal(dim1=-2, dim2=-1)
        assert values.min() > 0.68 and values.max() < 1.35
        torch.testing.assert_close(along, torch.diag_embed(values), rtol=0, atol=0.05)


def test_the_iteration_runs_in_bfloat16_under_autocast_alone():
    assert orthogonalise(torch.randn(8, 6)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert orthogonalise(torch.randn(8, 6)).dtype == torch.bfloat16


def test_updates_orthogonalised_with_others_of_their_shape_are_as_alone():
    torch.manual_seed(0)
    updates = [torch.randn(2, 12, 8), torch.randn(1, 8, 12), torch.randn(3, 2, 12, 8), torch.randn(1, 12, 8)]
    for together, update in zip(orthogonalise_by_shape(updates), updates, strict=True):
        torch.testing.assert_close(together, orthogonalise(update))


def test_the_schedule_warms_up_holds_and_decays_to_almost_nothing():
    factors = [learning_rate_factor(step, 100, 0.1, 0.4) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:60] == [1.0] * 51
    assert 0 < factors[-1] <= 0.03
    assert all(a >= b for a, b in zip(factors[60:], factors[61:], strict=False))


def test_the_ranks_share_every_update_out_once_and_evenly():
    costs = [5, 100, 40, 90, 50, 60, 10]
    shares = fair_shares(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 40, "less than the smallest of the large ones"
    assert fair_shares([1], 4) == [[0]], "more ranks than matrices"

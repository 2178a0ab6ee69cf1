"""Muon on stacks against torch.optim.Muon, and the schedule."""

import torch

from stages.optimizers import StackedMuon, fair_shares, learning_rate_factor, orthogonalise


def test_each_matrix_of_a_stack_moves_as_torch_optim_muon_moves_it_alone():
    torch.manual_seed(0)
    for rows, columns in ((24, 16), (16, 24)):
        stack = torch.nn.Parameter(torch.randn(3, rows, columns))
        alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
        ours = StackedMuon([stack], lr=0.02, momentum=0.95, weight_decay=0.1)
        theirs = torch.optim.Muon(alone, lr=0.02, momentum=0.95, weight_decay=0.1)
        for _ in range(3):
            stack.grad = torch.randn_like(stack)
            for matrix, gradient in zip(alone, stack.grad, strict=True):
                matrix.grad = gradient.clone()
            ours.step()
            theirs.step()
        # bfloat16 inside the iteration: the two sum in another order
        torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in alone]), rtol=0, atol=2e-3)


def test_orthogonalised_updates_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 32, 20)).float())
    assert values.min() > 0.3 and values.max() < 1.5


def test_the_schedule_warms_up_holds_and_decays_to_almost_nothing():
    factors = [learning_rate_factor(step, 100, 0.1, 0.4) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:60] == [1.0] * 51
    assert 0 < factors[-1] <= 0.03
    assert all(a >= b for a, b in zip(factors[60:], factors[61:], strict=False))


def test_the_ranks_share_every_update_out_once_and_evenly():
    costs = [100, 90, 60, 50, 40, 10, 5]
    shares = fair_shares(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 15
    assert fair_shares([1], 4) == [[0]], "more ranks than matrices"

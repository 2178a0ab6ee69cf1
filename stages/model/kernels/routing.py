"""What the router does with its scores: softmax, the K largest, their sum per expert, the order of the routed rows.

Shapes: N tokens, E experts, K experts per token, M = N*K routed rows, G groups of tokens.
"""

import numpy as np
import torch
from torch import Tensor

from stages.model.kernels.dispatch import Operation

softmax_over_experts = Operation("softmax_over_experts")  # [N, E] -> [N, E]
top_experts = Operation("top_experts")  # scores [N, E], K -> index [N, K] of each token's largest; of equal ones either
chosen_scores = Operation("chosen_scores")  # scores [N, E], index [N, K] -> [N, K]
loads = Operation("loads")  # index [N, K], E, G -> float32 [G, E]: tokens of each group that chose each expert
permutation = Operation("permutation")  # index [N, K] -> order [M] of the rows by expert, stable, and its inverse [M]

FEW_TOKENS = 256  # as in decoding: for fewer, K passes cost more than sorting


def on_cpu(operand: Tensor, *_: object) -> bool:
    return operand.device.type == "cpu"


def by_column(score_NE: Tensor) -> bool:
    """On CPU the experts of a token, where they are too few to fill a register, are slow to work on side by side."""
    return score_NE.device.type == "cpu" and score_NE.shape[1] < 16


@softmax_over_experts.kernel(when=by_column)
def softmax_by_column(logit_NE: Tensor) -> Tensor:
    """A ninth of the time of the other."""
    return logit_NE.T.softmax(dim=0).T


@softmax_over_experts.kernel()
def softmax_by_row(logit_NE: Tensor) -> Tensor:
    return logit_NE.softmax(dim=-1)


@top_experts.kernel(when=lambda score_NE, per_token: not on_cpu(score_NE) or len(score_NE) < FEW_TOKENS)
def by_topk(score_NE: Tensor, experts_per_token: int) -> Tensor:
    return score_NE.topk(experts_per_token, dim=-1, sorted=False).indices


@top_experts.kernel()
def by_maxima(score_NE: Tensor, experts_per_token: int) -> Tensor:
    """On CPU `topk` sorts row by row, which takes up to twice as long as K passes that take every row's maximum.

    A float32 score leaves the low 29 bits of a double empty: they hold the number of its expert, so that one maximum
    gives both.
    """
    tokens, experts = score_NE.shape
    number_E, across = torch.arange(experts), 1
    if by_column(score_NE):
        score_NE, number_E, across = score_NE.T, number_E.unsqueeze(1), 0
    key = torch.empty(score_NE.shape, dtype=torch.float64).copy_(score_NE)
    key.view(torch.int64).bitwise_or_(number_E)
    index_NK = torch.empty(tokens, experts_per_token, dtype=torch.int64)
    for choice in range(experts_per_token):
        best_N = key.amax(dim=across).view(torch.int64).bitwise_and_(0xFFFF)
        best_N.clamp_(max=experts - 1)  # a score that is not a number has other bits there
        index_NK[:, choice] = best_N
        if choice + 1 < experts_per_token:
            key.scatter_(across, best_N.unsqueeze(across), -torch.inf)
    return index_NK


@chosen_scores.kernel(when=on_cpu)
def by_gather(score_NE: Tensor, index_NK: Tensor) -> Tensor:
    return score_NE.gather(-1, index_NK)


@chosen_scores.kernel()
def by_mask(score_NE: Tensor, index_NK: Tensor) -> Tensor:
    """A compiler fuses it, and its gradient is no scatter."""
    return (score_NE.unsqueeze(1) * is_expert(index_NK, score_NE.shape[1])).sum(dim=-1)


def is_expert(index: Tensor, experts: int) -> Tensor:
    """One-hot of expert numbers, [..., E] of bool."""
    return index.unsqueeze(-1) == torch.arange(experts, device=index.device)


@loads.kernel(when=on_cpu)
def counted_by_scatter(index_NK: Tensor, experts: int, groups: int = 1) -> Tensor:
    chosen_GM = index_NK.reshape(groups, -1)
    one = torch.ones((), dtype=torch.float32)
    return torch.zeros(groups, experts).scatter_add_(1, chosen_GM, one.expand_as(chosen_GM))


@loads.kernel()
def counted_by_mask(index_NK: Tensor, experts: int, groups: int = 1) -> Tensor:
    return is_expert(index_NK.reshape(groups, -1), experts).sum(dim=1).float()


@permutation.kernel(when=on_cpu)
def by_radix(index_NK: Tensor) -> tuple[Tensor, Tensor]:
    """NumPy sorts short integers by radix, five to ten times faster than PyTorch sorts them."""
    expert_M = index_NK.flatten()
    return with_inverse(torch.from_numpy(np.argsort(expert_M.to(torch.int16).numpy(), kind="stable")))


@permutation.kernel()
def by_argsort(index_NK: Tensor) -> tuple[Tensor, Tensor]:
    return with_inverse(index_NK.flatten().to(torch.int16).argsort(stable=True))


def with_inverse(order_M: Tensor) -> tuple[Tensor, Tensor]:
    inverse_M = torch.empty_like(order_M)
    inverse_M.scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return order_M, inverse_M

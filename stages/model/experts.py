"""The mixture of experts: a float32 router, its balancing, and experts computed over sorted tokens.

Shape legend: B sequences, T tokens of a sequence, N = B*T tokens, K experts per token, M = N*K routed rows,
E experts, D width, F width of an expert.

Routing is returned from forward and nothing is stored on the module, so running a block twice (activation
checkpointing) cannot count a token twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.layers import SwiGLU, for_matmuls, gated_silu, gated_silu_backward, one_thread


class Routing(NamedTuple):
    expert_index_NK: Tensor
    load_E: Tensor  # float32 count of tokens that each expert received in this forward
    balance_loss: Tensor | None  # scalar, 1 where the load is even; None where no gradient is wanted


class Gates(NamedTuple):
    weight_NK: Tensor  # float32, sums to route_scale over K
    expert_index_NK: Tensor
    score_NE: Tensor  # affinities before the bias


def route(
    x_ND: Tensor,
    router_weight_ED: Tensor,
    bias_E: Tensor,
    experts_per_token: int,
    gating: str,
    route_scale: float,
) -> Gates:
    """Chooses experts_per_token experts for each token and their weights, in float32 even under autocast.

    sigmoid (DeepSeek-V3, eq. 13-16): the bias takes part in the choice, never in the weight.
    softmax (Shazeer et al. 2017, over all experts): no bias; balance comes from the auxiliary loss.
    Both renormalise the chosen scores to sum to one, then multiply by route_scale.
    """
    with torch.autocast(x_ND.device.type, enabled=False):
        logit_NE = F.linear(x_ND.float(), router_weight_ED.float())
        with one_thread(x_ND.device):
            if gating == "sigmoid":
                score_NE = logit_NE.sigmoid()
                index_NK = top_experts(score_NE.detach() + bias_E, experts_per_token)
            else:
                score_NE = softmax(logit_NE)
                index_NK = top_experts(score_NE.detach(), experts_per_token)
            chosen_NK = chosen_scores(score_NE, index_NK)
            # 1e-20 as in DeepSeek's own code: chosen sigmoids that all underflow must not divide by zero
            weight_NK = chosen_NK / (chosen_NK.sum(dim=-1, keepdim=True) + 1e-20) * route_scale
    return Gates(weight_NK, index_NK, score_NE)


def by_column(score_NE: Tensor) -> bool:
    """On CPU the experts of a token, where they are too few to fill a register, are slow to work on side by side."""
    return score_NE.device.type == "cpu" and score_NE.shape[1] < 16


def softmax(logit_NE: Tensor) -> Tensor:
    """Over the experts of each token; by column it takes a ninth of the time."""
    if by_column(logit_NE):
        return logit_NE.T.softmax(dim=0).T
    return logit_NE.softmax(dim=-1)


def top_experts(score_NE: Tensor, experts_per_token: int) -> Tensor:
    """Index [N, K] of each token's largest scores; of equal ones either.

    On CPU `topk` sorts row by row, which takes up to twice as long as K passes that take every row's maximum. A
    float32 score leaves 29 bits of a double empty: there its expert's number travels along. For few tokens, as in
    decoding, the passes cost more than the sorting.
    """
    if score_NE.device.type != "cpu" or len(score_NE) < 256:
        return score_NE.topk(experts_per_token, dim=-1, sorted=False).indices
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


def chosen_scores(score_NE: Tensor, index_NK: Tensor) -> Tensor:
    """Each token's scores at its K experts; where a compiler fuses, as a sum, whose gradient is no scatter."""
    if score_NE.device.type == "cpu":
        return score_NE.gather(-1, index_NK)
    return (score_NE.unsqueeze(1) * is_expert(index_NK, score_NE.shape[1])).sum(dim=-1)


def is_expert(index: Tensor, experts: int) -> Tensor:
    """One-hot of expert numbers, [..., E] of bool."""
    return index.unsqueeze(-1) == torch.arange(experts, device=index.device)


def loads(index_NK: Tensor, experts: int, groups: int = 1) -> Tensor:
    """How many tokens of each group of equal size chose each expert -> [groups, E], float32."""
    chosen_GM = index_NK.reshape(groups, -1)
    if chosen_GM.device.type != "cpu":
        return is_expert(chosen_GM, experts).sum(dim=1).float()
    one = torch.ones((), dtype=torch.float32)
    return torch.zeros(groups, experts).scatter_add_(1, chosen_GM, one.expand_as(chosen_GM))


def balance_loss(load_GE: Tensor, score_NE: Tensor, gating: str) -> Tensor:
    """The mean over groups of sum_e f_e P_e, where f is an expert's load over the mean load and P its mean score.
    Gradients flow through P alone.

    sigmoid: DeepSeek-V3 eq. 17-20, each sequence a group; f counts the routing taken, bias included.
    softmax: the classic loss of GShard and Switch, the whole batch one group.
    """
    with one_thread(score_NE.device):
        if gating == "sigmoid":
            score_NE = score_NE / (score_NE.sum(dim=-1, keepdim=True) + 1e-20)
        mean_GE = score_NE.unflatten(0, (len(load_GE), -1)).mean(dim=1)
        share_GE = load_GE / load_GE.mean(dim=-1, keepdim=True)
        return (share_GE * mean_GE).sum(dim=-1).mean()


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """Auxiliary-loss-free balancing (Wang et al. 2024): a step up for the underloaded, down for the rest.

    Centred, so that the biases cannot drift together: only their differences choose experts.
    """
    step_E = rate * torch.sign(load_E.mean() - load_E)
    return bias_E + step_E - step_E.mean()


# ---- experts over sorted rows ------------------------------------------------------------------------------
# Two primitives carry all the work, forward and backward. Rows are sorted, so each expert owns one slice.
# `loop` is fastest on CPU; `grouped`, for CUDA, is one kernel and never waits for counts to reach the host.


def rows_times_experts(x_MI: Tensor, weight_EIO: Tensor, load_E: Tensor, kernel: str) -> Tensor:
    """Each row of expert e times weight[e] -> [M, O]; the weight is cast to the rows' dtype."""
    if kernel == "grouped":
        return F.grouped_mm(x_MI, weight_EIO.to(x_MI.dtype), offs=_ends(load_E))
    out_MO = x_MI.new_empty(x_MI.shape[0], weight_EIO.shape[-1])
    rows_E = load_E.long().tolist()
    for x, weight, out in zip(x_MI.split(rows_E), weight_EIO, out_MO.split(rows_E), strict=True):
        if len(x):  # cast here: the weight stays in cache, and decoding touches only the chosen experts
            torch.mm(x, weight.to(x.dtype), out=out)
    return out_MO


def _ends(load_E: Tensor) -> Tensor:
    """Where each expert's rows end. In integers: CUDA's float cumsum is refused by deterministic algorithms."""
    return load_E.to(torch.int32).cumsum(0, dtype=torch.int32)


def outer_per_expert(a_MO: Tensor, b_MI: Tensor, load_E: Tensor, dtype: torch.dtype, kernel: str) -> Tensor:
    """The gradient of each expert's weight, a[rows of e]^T b[rows of e] -> [E, O, I]."""
    if kernel == "grouped":
        return F.grouped_mm(a_MO.t(), b_MI, offs=_ends(load_E)).to(dtype)
    out_EOI = torch.empty(len(load_E), a_MO.shape[1], b_MI.shape[1], dtype=dtype, device=a_MO.device)
    rows_E = load_E.long().tolist()
    for a, b, out in zip(a_MO.split(rows_E), b_MI.split(rows_E), out_EOI, strict=True):
        if not len(a):
            out.zero_()
        elif dtype == a.dtype:
            torch.mm(a.t(), b, out=out)
        else:
            out.copy_(a.t() @ b)
    return out_EOI


def permutation(index_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The order [M] that puts routed rows by expert, stable within an expert, and its inverse [M]."""
    expert_M = index_NK.flatten()
    if expert_M.device.type == "cpu":  # NumPy sorts short integers by radix, five to ten times faster
        order_M = torch.from_numpy(np.argsort(expert_M.to(torch.int16).numpy(), kind="stable"))
    else:
        order_M = expert_M.to(torch.int16).argsort(stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M.scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return order_M, inverse_M


# On CPU oneDNN compiles a bfloat16 product for each number of rows that it has not met lately, which takes longer than
# the product itself; and an expert's load is another in every step. Rounded up it is one of few.
BLOCK_ROWS = 32


def gets_blanks(x_ND: Tensor, index_NK: Tensor, experts: int) -> bool:
    """Not where an expert has few rows, as in decoding: there they would be most of the work."""
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16 and index_NK.numel() >= experts * BLOCK_ROWS


def with_blanks(
    order_M: Tensor, inverse_M: Tensor, weight_M: Tensor, load_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with each expert's rows rounded up to whole blocks.

    What is added is a copy of the first token's row at weight zero: nobody gathers its result, and its gradients
    are zero.
    """
    own_E = load_E.long()
    room_E = (own_E + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    shift_E = (room_E - own_E).cumsum(0) - (room_E - own_E)
    place_M = torch.arange(len(order_M)) + shift_E.repeat_interleave(own_E)
    rows = int(room_E.sum())
    order = order_M.new_zeros(rows).scatter_(0, place_M, order_M)
    weight = weight_M.new_zeros(rows).scatter_(0, place_M, weight_M)
    return order, place_M[inverse_M], weight, room_E


class SortedExperts(torch.autograd.Function):
    """y[n] = sum_k weight[n, k] * SwiGLU_{index[n, k]}(x[n]).

    Kept for backward: x once per token (not once per routed row) and the inner pre-activations. Both scatters are
    written as gathers through the inverse permutation, so sums have one order. The weight goes into that sum, and
    in backward into the gradient's rows before the experts see them: no pass of its own over what is F wide.
    """

    @staticmethod
    def forward(ctx, x_ND, weight_NK, gate_up_E2FD, down_EDF, index_NK, load_E, kernel):
        order_M, inverse_M = permutation(index_NK)
        weight_NK = weight_NK.to(x_ND.dtype)
        weight_M = weight_NK.flatten()[order_M]
        if gets_blanks(x_ND, index_NK, len(load_E)):
            order_M, inverse_M, weight_M, load_E = with_blanks(order_M, inverse_M, weight_M, load_E)
        inverse_NK, token_M = inverse_M.view_as(index_NK), order_M // index_NK.shape[1]
        h_M2F = rows_times_experts(x_ND.index_select(0, token_M), gate_up_E2FD.transpose(1, 2), load_E, kernel)
        y_MD = rows_times_experts(gated_silu(h_M2F), down_EDF.transpose(1, 2), load_E, kernel)
        ctx.save_for_backward(x_ND, weight_M, h_M2F, gate_up_E2FD, down_EDF, token_M, inverse_NK, load_E)
        ctx.kernel = kernel
        return _sum_over_choices(y_MD, inverse_NK, weight_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, weight_M, h_M2F, gate_up_E2FD, down_EDF, token_M, inverse_NK, load_E = ctx.saved_tensors
        kernel = ctx.kernel
        needs_x, _, needs_gate_up, needs_down = ctx.needs_input_grad[:4]  # a frozen weight costs nothing
        grad_gate_up = grad_down = grad_x_ND = None
        weighted_grad_MD = grad_ND.to(x_ND.dtype).index_select(0, token_M).mul_(weight_M.unsqueeze(1))
        gate, up = h_M2F.chunk(2, dim=-1)
        silu_MF = F.silu(gate)
        a_MF = silu_MF * up
        grad_a_MF = rows_times_experts(weighted_grad_MD, down_EDF, load_E, kernel)
        # divided by the weight that it was multiplied with; one that underflowed to zero has no gradient to hand on
        grad_weight_M = torch.linalg.vecdot(grad_a_MF, a_MF).float() / weight_M
        grad_weight_M.masked_fill_(weight_M == 0, 0.0)
        if needs_down:
            grad_down = outer_per_expert(weighted_grad_MD, a_MF, load_E, down_EDF.dtype, kernel)
        grad_h_M2F = gated_silu_backward(grad_a_MF, h_M2F, silu_MF)
        if needs_gate_up:
            x_MD = x_ND.index_select(0, token_M)
            grad_gate_up = outer_per_expert(grad_h_M2F, x_MD, load_E, gate_up_E2FD.dtype, kernel)
        if needs_x:
            grad_x_MD = rows_times_experts(grad_h_M2F, gate_up_E2FD, load_E, kernel)
            grad_x_ND = _sum_over_choices(grad_x_MD, inverse_NK)
        return grad_x_ND, grad_weight_M[inverse_NK], grad_gate_up, grad_down, None, None, None


def _sum_over_choices(y_MD: Tensor, inverse_NK: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's K rows -> [N, D]."""
    if y_MD.device.type == "cpu":  # gathers and sums at once, a fifth of the time in bfloat16
        return F.embedding_bag(inverse_NK, y_MD, mode="sum", per_sample_weights=weight_NK)
    y_NKD = y_MD.index_select(0, inverse_NK.flatten()).unflatten(0, inverse_NK.shape)
    return (y_NKD if weight_NK is None else y_NKD.mul_(weight_NK.unsqueeze(-1))).sum(dim=1)


# ---- decoding ----------------------------------------------------------------------------------------------
# Both give what SortedExperts gives, for a few tokens: sorting those takes longer than their products.

GATHERED_TOKENS = 8  # on a GPU so many at the most: each has a copy made of its experts' weights


def few_enough(x_ND: Tensor) -> bool:
    return not torch.is_grad_enabled() and len(x_ND) <= (GATHERED_TOKENS if x_ND.is_cuda else 1)


def experts_of_one(
    x_1D: Tensor, weight_1K: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_1K: Tensor
) -> Tensor:
    """On CPU, of one token."""
    y_K1D = [
        F.linear(gated_silu(F.linear(x_1D, gate_up_E2FD[expert].to(x_1D.dtype))), down_EDF[expert].to(x_1D.dtype))
        for expert in index_1K[0].tolist()
    ]
    return (torch.cat(y_K1D) * weight_1K.T.to(x_1D.dtype)).sum(dim=0, keepdim=True)


def gathered_experts(
    x_ND: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_NK: Tensor
) -> Tensor:
    """On a GPU, from the weights of each token's experts side by side. No loop over counts: in a CUDA graph the host
    cannot know them."""
    h_N2FK = gate_up_E2FD[index_NK].flatten(1, 2) @ x_ND.unsqueeze(2)
    y_NKD1 = down_EDF[index_NK] @ gated_silu(h_N2FK.view(*index_NK.shape, -1)).unsqueeze(3)
    return (y_NKD1.squeeze(3) * weight_NK.unsqueeze(2).to(y_NKD1.dtype)).sum(dim=1)


def kernel_for(x_ND: Tensor, expert_width: int) -> str:
    """grouped_mm reads 16 bytes at a time: an odd width left by pruning takes the loop."""
    aligned = x_ND.shape[1] % 8 == 0 and expert_width % 8 == 0
    return "grouped" if x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned else "loop"


class MoE(nn.Module):
    """DeepSeekMoE: shared experts for every token (one SwiGLU of their joint width) plus routed experts.

    Weights lie as nn.Linear has them: gate_up [E, 2F, D] with the gate's rows first, down [E, D, F].
    """

    def __init__(
        self,
        width: int,
        expert_width: int,
        experts: int,
        experts_per_token: int,
        shared_experts: int,
        gating: str,
        route_scale: float,
    ):
        super().__init__()
        self.router_weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(experts, width, expert_width))
        self.shared = SwiGLU(width, shared_experts * expert_width) if shared_experts else None
        self.experts_per_token = experts_per_token
        self.gating = gating
        self.route_scale = route_scale

    def gates(self, x_ND: Tensor) -> Gates:
        return route(
            x_ND, self.router_weight, self.bias, self.experts_per_token, self.gating, self.route_scale
        )

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        gates = self.gates(x_ND)
        groups = x_BTD.shape[0] if self.gating == "sigmoid" else 1
        load_GE = loads(gates.expert_index_NK, len(self.bias), groups)
        load_E = load_GE.sum(dim=0)
        balance = balance_loss(load_GE, gates.score_NE, self.gating) if torch.is_grad_enabled() else None
        x_ND = for_matmuls(x_ND)
        operands = x_ND, gates.weight_NK, self.gate_up, self.down, gates.expert_index_NK
        if few_enough(x_ND):
            y_ND = gathered_experts(*operands) if x_ND.is_cuda else experts_of_one(*operands)
        else:
            y_ND = SortedExperts.apply(*operands, load_E, kernel_for(x_ND, self.down.shape[-1]))
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), Routing(gates.expert_index_NK, load_E, balance)

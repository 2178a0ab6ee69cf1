"""What the routed experts of a layer give: y[n] = sum_k weight[n, k] * SwiGLU_{index[n, k]}(x[n]).

Shapes: N tokens, K experts per token, M = N*K routed rows, E experts, D width, F width of an expert. Where a token may
take fewer than K experts, the others have the index E and the weight 0, loads are [E + 1] with their number last, and M
counts the rows that some expert has.

To add a kernel: a function of the operands below under `@routed_experts.kernel(when=..., first=True)`. One that only
brings faster products of sorted rows adds them to `rows.PRODUCTS` instead, and a kernel of two lines here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.kernels.dispatch import Operation
from stages.model.kernels.gated import gated_silu, gated_silu_backward
from stages.model.kernels.routing import permutation
from stages.model.kernels.rows import PRODUCTS, pad_expert_rows, pads_rows, sum_over_choices

GATHERED_TOKENS = 8  # on a GPU so many at the most: each has a copy made of its experts' weights

# x [N, D], weights [N, K], gate_up [E, 2F, D], down [E, D, F], index [N, K], loads [E] -> [N, D]
routed_experts = Operation("routed_experts")


def decodes_on_cpu(x_ND: Tensor, *_: Tensor) -> bool:
    """Without gradients, as the others of few tokens: sorting them takes longer than their products."""
    return not torch.is_grad_enabled() and not x_ND.is_cuda and len(x_ND) <= 1


def decodes_on_gpu(x_ND: Tensor, *_: Tensor) -> bool:
    return not torch.is_grad_enabled() and x_ND.is_cuda and len(x_ND) <= GATHERED_TOKENS


def has_grouped_products(x_ND: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, *_: Tensor) -> bool:
    """grouped_mm reads 16 bytes at a time: an odd width left by pruning takes the loop."""
    aligned = x_ND.shape[1] % 8 == 0 and down_EDF.shape[-1] % 8 == 0
    return x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned


@routed_experts.kernel(when=decodes_on_cpu)
def one_token(
    x_1D: Tensor, weight_1K: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_1K: Tensor, load_E: Tensor
) -> Tensor:
    y_K1D = [
        F.linear(gated_silu(F.linear(x_1D, gate_up_E2FD[expert].to(x_1D.dtype))), down_EDF[expert].to(x_1D.dtype))
        for expert in index_1K[0].tolist()
        if expert < len(gate_up_E2FD)
    ]
    weight_1K = weight_1K[index_1K < len(gate_up_E2FD)].unsqueeze(0)
    return (torch.cat(y_K1D) * weight_1K.T.to(x_1D.dtype)).sum(dim=0, keepdim=True)


@routed_experts.kernel(when=decodes_on_gpu)
def gathered(
    x_ND: Tensor, weight_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_NK: Tensor, load_E: Tensor
) -> Tensor:
    """From the weights of each token's experts side by side. No loop over counts: in a CUDA graph the host cannot
    know them.
    """
    index_NK = index_NK.clamp(max=len(gate_up_E2FD) - 1)  # any expert will do at weight 0
    h_N2FK = gate_up_E2FD[index_NK].flatten(1, 2) @ x_ND.unsqueeze(2)
    y_NKD1 = down_EDF[index_NK] @ gated_silu(h_N2FK.view(*index_NK.shape, -1)).unsqueeze(3)
    return (y_NKD1.squeeze(3) * weight_NK.unsqueeze(2).to(y_NKD1.dtype)).sum(dim=1)


@routed_experts.kernel(when=has_grouped_products)
def sorted_grouped(*operands: Tensor) -> Tensor:
    return SortedExperts.apply(*operands, "grouped")


@routed_experts.kernel()
def sorted_loop(*operands: Tensor) -> Tensor:
    return SortedExperts.apply(*operands, "loop")


def of_experts(
    order_M: Tensor, inverse_M: Tensor, load_E: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Order, inverse and loads without the rows that no expert has, and whether there were any.

    They come last in the order. All their places become that of one more row, which `with_zero_row` adds.
    """
    if len(load_E) == experts:
        return order_M, inverse_M, load_E, False
    load_E = load_E[:experts]
    rows = int(load_E.sum())
    return order_M[:rows], inverse_M.clamp(max=rows), load_E, True


def with_zero_row(rows_M: Tensor, wanted: bool) -> Tensor:
    return torch.cat([rows_M, rows_M.new_zeros(1, *rows_M.shape[1:])]) if wanted else rows_M


class SortedExperts(torch.autograd.Function):
    """The rows sorted by expert, and the two products of `rows.PRODUCTS`.

    Kept for backward: x once per token (not once per routed row) and the inner pre-activations. Both scatters are
    written as gathers through the inverse permutation, so sums have one order. The weight goes into that sum, and
    in backward into the gradient's rows before the experts see them: no pass of its own over what is F wide.
    """

    @staticmethod
    def forward(ctx, x_ND, weight_NK, gate_up_E2FD, down_EDF, index_NK, load_E, products):
        order_M, inverse_M, load_E, ragged = of_experts(*permutation(index_NK), load_E, len(down_EDF))
        weight_NK = weight_NK.to(x_ND.dtype)
        weight_M = weight_NK.flatten()[order_M]
        if pads_rows(x_ND, index_NK, len(load_E)):
            order_M, inverse_M, weight_M, load_E = pad_expert_rows(order_M, inverse_M, weight_M, load_E)
        inverse_NK, token_M = inverse_M.view_as(index_NK), order_M // index_NK.shape[1]
        rows_times_experts = PRODUCTS[products].rows_times_experts
        h_M2F = rows_times_experts(x_ND.index_select(0, token_M), gate_up_E2FD.transpose(1, 2), load_E)
        y_MD = rows_times_experts(gated_silu(h_M2F), down_EDF.transpose(1, 2), load_E)
        ctx.save_for_backward(x_ND, weight_M, h_M2F, gate_up_E2FD, down_EDF, token_M, inverse_NK, load_E)
        ctx.products, ctx.ragged = products, ragged
        return sum_over_choices(with_zero_row(y_MD, ragged), inverse_NK, weight_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, weight_M, h_M2F, gate_up_E2FD, down_EDF, token_M, inverse_NK, load_E = ctx.saved_tensors
        rows_times_experts, outer_per_expert = PRODUCTS[ctx.products]
        needs_x, _, needs_gate_up, needs_down = ctx.needs_input_grad[:4]  # a frozen weight costs nothing
        grad_gate_up = grad_down = grad_x_ND = None
        weighted_grad_MD = grad_ND.to(x_ND.dtype).index_select(0, token_M).mul_(weight_M.unsqueeze(1))
        gate, up = h_M2F.chunk(2, dim=-1)
        silu_MF = F.silu(gate)
        a_MF = silu_MF * up
        grad_a_MF = rows_times_experts(weighted_grad_MD, down_EDF, load_E)
        # divided by the weight that it was multiplied with; one that underflowed to zero has no gradient to hand on
        grad_weight_M = torch.linalg.vecdot(grad_a_MF, a_MF).float() / weight_M
        grad_weight_M.masked_fill_(weight_M == 0, 0.0)
        if needs_down:
            grad_down = outer_per_expert(weighted_grad_MD, a_MF, load_E, down_EDF.dtype)
        grad_h_M2F = gated_silu_backward(grad_a_MF, h_M2F, silu_MF)
        if needs_gate_up:
            x_MD = x_ND.index_select(0, token_M)
            grad_gate_up = outer_per_expert(grad_h_M2F, x_MD, load_E, gate_up_E2FD.dtype)
        if needs_x:
            grad_x_MD = rows_times_experts(grad_h_M2F, gate_up_E2FD, load_E)
            grad_x_ND = sum_over_choices(with_zero_row(grad_x_MD, ctx.ragged), inverse_NK, None)
        grad_weight_NK = with_zero_row(grad_weight_M, ctx.ragged)[inverse_NK]
        return grad_x_ND, grad_weight_NK, grad_gate_up, grad_down, None, None, None

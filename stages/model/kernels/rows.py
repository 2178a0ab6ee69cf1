"""Products of rows that are sorted by expert: each expert owns one slice of them.

Shapes: M routed rows, E experts, I and O widths of what goes in and comes out, N tokens, K experts per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.kernels.dispatch import Operation
from stages.model.kernels.routing import on_cpu


class Products(NamedTuple):
    """The two products that carry all the work of the experts, forward and backward."""

    rows_times_experts: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer_per_expert: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]


def loop_rows(x_MI: Tensor, weight_EIO: Tensor, load_E: Tensor) -> Tensor:
    """Each row of expert e times weight[e] -> [M, O]; the weight is cast to the rows' dtype."""
    out_MO = x_MI.new_empty(x_MI.shape[0], weight_EIO.shape[-1])
    rows_E = load_E.long().tolist()
    for x, weight, out in zip(x_MI.split(rows_E), weight_EIO, out_MO.split(rows_E), strict=True):
        if len(x):  # cast here: the weight stays in cache, and decoding touches only the chosen experts
            torch.mm(x, weight.to(x.dtype), out=out)
    return out_MO


def loop_outer(a_MO: Tensor, b_MI: Tensor, load_E: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of each expert's weight, a[rows of e]^T b[rows of e] -> [E, O, I]."""
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


def grouped_rows(x_MI: Tensor, weight_EIO: Tensor, load_E: Tensor) -> Tensor:
    return F.grouped_mm(x_MI, weight_EIO.to(x_MI.dtype), offs=_ends(load_E))


def grouped_outer(a_MO: Tensor, b_MI: Tensor, load_E: Tensor, dtype: torch.dtype) -> Tensor:
    return F.grouped_mm(a_MO.t(), b_MI, offs=_ends(load_E)).to(dtype)


def _ends(load_E: Tensor) -> Tensor:
    """Where each expert's rows end. In integers: CUDA's float cumsum is refused by deterministic algorithms."""
    return load_E.to(torch.int32).cumsum(0, dtype=torch.int32)


PRODUCTS = {
    "loop": Products(loop_rows, loop_outer),  # fastest on CPU
    "grouped": Products(grouped_rows, grouped_outer),  # for CUDA: one kernel, never waits for counts on the host
}


# On CPU oneDNN compiles a bfloat16 product for each number of rows that it has not met lately, which takes longer than
# the product itself; and an expert's load is another in every step. Rounded up it is one of few.
BLOCK_ROWS = 32


def pads_rows(x_ND: Tensor, index_NK: Tensor, experts: int) -> bool:
    """Not where an expert has few rows, as in decoding: there they would be most of the work."""
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16 and index_NK.numel() >= experts * BLOCK_ROWS


def pad_expert_rows(
    order_M: Tensor, inverse_M: Tensor, weight_M: Tensor, load_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order, inverse, weights and loads with each expert's rows rounded up to whole blocks.

    A padding row is a copy of the first token's row at weight zero: its result is never gathered, and its gradients
    are zero.
    """
    own_E = load_E.long()
    room_E = (own_E + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    shift_E = (room_E - own_E).cumsum(0) - (room_E - own_E)
    place_M = torch.arange(len(order_M)) + shift_E.repeat_interleave(own_E)
    rows = int(room_E.sum())
    order = order_M.new_zeros(rows).scatter_(0, place_M, order_M)
    weight = weight_M.new_zeros(rows).scatter_(0, place_M, weight_M)
    place_M = torch.cat([place_M, place_M.new_tensor([rows])])  # of what no expert takes: after the last row
    return order, place_M[inverse_M], weight, room_E


# The (weighted) sum of each token's K rows: rows [M, D], inverse order [N, K], weights [N, K] or None -> [N, D]
sum_over_choices = Operation("sum_over_choices")


@sum_over_choices.kernel(when=on_cpu)
def by_embedding_bag(y_MD: Tensor, inverse_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """Gathers and sums at once, a fifth of the time in bfloat16."""
    return F.embedding_bag(inverse_NK, y_MD, mode="sum", per_sample_weights=weight_NK)


@sum_over_choices.kernel()
def by_index(y_MD: Tensor, inverse_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    y_NKD = y_MD.index_select(0, inverse_NK.flatten()).unflatten(0, inverse_NK.shape)
    return (y_NKD if weight_NK is None else y_NKD.mul_(weight_NK.unsqueeze(-1))).sum(dim=1)

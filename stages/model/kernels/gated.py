"""silu(gate) * up of h = [gate, up] (Shazeer 2020), and its gradient.

Shapes: N rows, F width of gate and of up, h [N, 2F].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.kernels.dispatch import Operation

gated_silu = Operation("gated_silu")
gated_silu_backward = Operation("gated_silu_backward")


@gated_silu.kernel(when=lambda h_N2F: h_N2F.device.type == "cpu")
def in_place(h_N2F: Tensor) -> Tensor:
    gate, up = h_N2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@gated_silu.kernel()
def to_be_compiled(h_N2F: Tensor) -> Tensor:
    """torch 2.11 compiles a Function with an output written in place wrongly: its gradient is 0."""
    gate, up = h_N2F.chunk(2, dim=-1)
    return F.silu(gate) * up


@gated_silu_backward.kernel(when=lambda grad_NF, h_N2F, silu_NF: h_N2F.device.type == "cpu")
def into_one_tensor(grad_NF: Tensor, h_N2F: Tensor, silu_NF: Tensor) -> Tensor:
    gate, up = h_N2F.chunk(2, dim=-1)
    grad_N2F = torch.empty_like(h_N2F)
    grad_gate, grad_up = grad_N2F.chunk(2, dim=-1)
    torch.mul(grad_NF, silu_NF, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_NF * up, gate, grad_input=grad_gate)
    return grad_N2F


@gated_silu_backward.kernel()
def joined(grad_NF: Tensor, h_N2F: Tensor, silu_NF: Tensor) -> Tensor:
    """The compiler writes both halves in one pass, and traces no out=."""
    gate, up = h_N2F.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad_NF * up, gate), grad_NF * silu_NF], dim=-1)


class GatedSilu(torch.autograd.Function):
    """Keeps only h for backward; plain autograd keeps twice as much."""

    @staticmethod
    def forward(ctx, h_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(h_N2F)
        return gated_silu(h_N2F)

    @staticmethod
    def backward(ctx, grad_NF: Tensor) -> Tensor:
        (h_N2F,) = ctx.saved_tensors
        return gated_silu_backward(grad_NF, h_N2F, F.silu(h_N2F.chunk(2, dim=-1)[0]))

"""The units that pruning can take out of a model, and how a family describes those of the parts that families share.

Shape legend: N tokens, M tokens of one expert, D width, U units, F neurons of an MLP, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.experts import MoE
from stages.model.layers import SwiGLU

OutputNorms = Callable[[Tensor], tuple[Tensor, Tensor]]


class Mixture(Protocol):
    """What a mixture of experts shows of itself: SwiGLUs, gate rows first, and the routing of x_ND."""

    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]

    def gates(self, x_ND: Tensor) -> Any:
        """Something with `weight_NK` and `expert_index_NK`."""


class Cut(NamedTuple):
    """Where the units are in one tensor of the state dict: its dimension `dim` is [parts, units, any size]."""

    tensor: str
    dim: int
    parts: int = 1  # gate and up in one matrix are two


@dataclass(frozen=True)
class Prunable:
    """Units of one place in a model, any of which may leave: the heads of one attention, the neurons of one MLP.

    A score gives one number for each unit: [U], or [E, U] where the units stand in each of E stacked matrices.
    """

    kind: str  # heads | neurons | experts: the word in `sparsify.*.keep_<kind>` and `sparsify.score.<kind>`
    name: str  # unique in the model
    units: int
    module: nn.Module  # whose first input a score may watch or mask
    cuts: tuple[Cut, ...]
    # From that input: for each unit the norm of what it adds to the residual stream, summed over the tokens that use
    # it, and the number of these tokens (both float64 on the CPU, of shapes that divide).
    output_norms: OutputNorms
    stacked: bool = False  # the units stand in each of E matrices, the first dimension of the tensors


def heads(attention: nn.Module, at: str, units: int, by_rows: tuple[str, ...]) -> Prunable:
    """`units` groups of heads: rows of the matrices `by_rows` of the attention, columns of its `output`."""
    parts = [(name, kind) for name in by_rows for kind, _ in getattr(attention, name).named_parameters()]
    cuts = (*(Cut(f"{at}.{name}.{kind}", 0) for name, kind in parts), Cut(f"{at}.output.weight", 1))
    return Prunable("heads", f"{at}.heads", units, attention.output, cuts, head_norms(attention.output, units))


def swiglu_neurons(mlp: SwiGLU, at: str) -> Prunable:
    cuts = Cut(f"{at}.gate_up.weight", 0, parts=2), Cut(f"{at}.down.weight", 1)
    return Prunable("neurons", f"{at}.neurons", mlp.down.in_features, mlp.down, cuts, neuron_norms(mlp.down))


def expert_neurons(moe: MoE, at: str) -> Prunable:
    """The neurons inside each routed expert; every expert keeps as many, each its own."""
    cuts, norms = (Cut(f"{at}.gate_up", 1, parts=2), Cut(f"{at}.down", 2)), expert_neuron_norms(moe)
    return Prunable("neurons", f"{at}.experts.neurons", moe.down.shape[2], moe, cuts, norms, stacked=True)


def experts(moe: MoE, at: str) -> Prunable:
    cuts = tuple(Cut(f"{at}.{name}", 0) for name in ("router_weight", "bias", "gate_up", "down"))
    return Prunable("experts", f"{at}.experts", len(moe.router_weight), moe, cuts, expert_norms(moe))


# ---- `output_norms` of the four


def head_norms(output: nn.Linear, units: int) -> OutputNorms:
    def norms(x: Tensor) -> tuple[Tensor, Tensor]:
        x_UNd = x.detach().flatten(0, -2).unflatten(-1, (units, -1)).transpose(0, 1).float()
        weight_UDd = output.weight.detach().unflatten(1, (units, -1)).transpose(0, 1).float()
        # ||W x||^2 = x^T (W^T W) x, which never holds what all units write, [U, N, D]
        norm_UN = (x_UNd @ (weight_UDd.mT @ weight_UDd) * x_UNd).sum(dim=-1).clamp(min=0).double().sqrt()
        return norm_UN.sum(dim=1).cpu(), torch.tensor(float(norm_UN.shape[1]), dtype=torch.float64)

    return norms


def neuron_norms(down: nn.Linear) -> OutputNorms:
    def norms(a: Tensor) -> tuple[Tensor, Tensor]:
        a_NF = a.detach().flatten(0, -2)
        tokens = torch.tensor(float(len(a_NF)), dtype=torch.float64)
        return a_NF.double().abs().sum(dim=0).cpu() * column_norms(down.weight), tokens

    return norms


def expert_neuron_norms(moe: Mixture) -> OutputNorms:
    def norms(x: Tensor) -> tuple[Tensor, Tensor]:
        sums = expert_sums(moe, x.detach().flatten(0, -2))
        return sums.activation_EF * column_norms(moe.down), sums.tokens_E[:, None]

    return norms


def expert_norms(moe: Mixture) -> OutputNorms:
    def norms(x: Tensor) -> tuple[Tensor, Tensor]:
        sums = expert_sums(moe, x.detach().flatten(0, -2))
        return sums.output_E, sums.tokens_E

    return norms


class ExpertSums(NamedTuple):
    """Sums over the tokens that chose each expert, float64. The gates g are the model's own, bias and all."""

    tokens_E: Tensor
    gate_E: Tensor  # g, route_scale included
    output_E: Tensor  # g * ||f(x)||
    activation_EF: Tensor  # |a|
    gated_activation_EF: Tensor  # g * |a|


@torch.no_grad()
def expert_sums(moe: Mixture, x_ND: Tensor) -> ExpertSums:
    gates = moe.gates(x_ND)
    x_ND = x_ND.float()
    rows = []
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(moe.gate_up, moe.down, strict=True)):
        token_M, choice_M = (gates.expert_index_NK == expert).nonzero(as_tuple=True)
        gate_MF, up_MF = F.linear(x_ND[token_M], gate_up_2FD.float()).chunk(2, dim=-1)
        a_MF = F.silu(gate_MF) * up_MF
        output_M = F.linear(a_MF, down_DF.float()).norm(dim=-1)
        g_M, a_MF = gates.weight_NK[token_M, choice_M].double(), a_MF.double().abs()
        tokens = torch.tensor(len(token_M), dtype=torch.float64)
        rows.append((tokens, g_M.sum(), g_M @ output_M.double(), a_MF.sum(dim=0), g_M @ a_MF))
    return ExpertSums(*(torch.stack([part.cpu() for part in column]) for column in zip(*rows, strict=True)))


def column_norms(down: Tensor) -> Tensor:
    """||W_down[:, j]||: [F] of one MLP's [D, F], or [E, F] of the experts' [E, D, F]."""
    return down.detach().double().cpu().norm(dim=-2)

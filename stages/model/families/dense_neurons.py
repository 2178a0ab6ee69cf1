"""MLPs and mixtures of experts as the neurons of one SwiGLU, for the `dense_source` of a family.

Contribution of a neuron: E|g a_j| * ||down_j||, g the gate of its expert. The mean gate that scales `down` is the
marginal scale of Kim et al. 2026 (2605.28207).

Shape legend: N tokens, D width, F neurons, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.families.family import DenseNeurons
from stages.model.families.prunable import Mixture, column_norms, expert_sums


def of_mlp(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, x_ND: Tensor, origin: str, share_N: Tensor | None = None
) -> DenseNeurons:
    """Of one SwiGLU; `share_N` scales what it adds, where the family has a gate for that."""
    a_NF = F.silu(x_ND @ gate_FD.T) * (x_ND @ up_FD.T)
    norm_F = column_norms(down_DF)
    if share_N is not None:
        a_NF, down_DF = a_NF * share_N[:, None], down_DF * share_N.mean()
    score_F = a_NF.double().abs().mean(dim=0).cpu() * norm_F
    return DenseNeurons([origin] * len(score_F), score_F, gate_FD, up_FD, down_DF)


def of_experts(moe: Mixture, x_ND: Tensor) -> DenseNeurons:
    """Of all routed experts, one after another."""
    sums = expert_sums(moe, x_ND)
    score_F = (sums.gated_activation_EF / len(x_ND) * column_norms(moe.down)).flatten()
    gate_FD, up_FD = (part.flatten(0, 1) for part in moe.gate_up.chunk(2, dim=1))
    mean_gate_E = (sums.gate_E / len(x_ND)).to(moe.down)  # 0 where not chosen; route_scale included
    down_DF = (moe.down * mean_gate_E[:, None, None]).transpose(0, 1).flatten(1)
    return DenseNeurons(["experts"] * len(score_F), score_F, gate_FD, up_FD, down_DF)


def joined(first: DenseNeurons, second: DenseNeurons) -> DenseNeurons:
    return DenseNeurons(
        first.origins + second.origins,
        torch.cat([first.score_F, second.score_F]),
        torch.cat([first.gate_FD, second.gate_FD]),
        torch.cat([first.up_FD, second.up_FD]),
        torch.cat([first.down_DF, second.down_DF], dim=1),
    )

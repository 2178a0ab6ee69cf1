"""How a dense student reads a block of DeepSeek-V3: latent attention head by head, experts as one MLP.

Shape legend: N tokens, D width, H heads, d query or key head, U value head, F neurons, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.experts import MoE
from stages.model.families.family import DenseNeurons, PlainHeads
from stages.model.families.prunable import column_norms, expert_sums
from stages.model.layers import SwiGLU


class Source:
    def plain_heads(self, block: Any, x_ND: Tensor) -> PlainHeads:
        old = block.attention
        query_NHd = old.query(x_ND).unflatten(1, (old.heads, -1))
        latent_NC, key_rope_NR = old.latent_down(x_ND).split([old.latent_width, old.rope_dim], dim=1)
        up_NHd = old.latent_up(old.latent_norm(latent_NC)).unflatten(1, (old.heads, -1))
        key_NHP, value_NHU = up_NHd.split([old.nope, old.value_dim], dim=2)
        key_rope_NHR = key_rope_NR.unsqueeze(1).expand(-1, old.heads, -1)
        key_NHd = torch.cat([key_NHP, key_rope_NHR], dim=2)
        output_HDU = old.output.weight.unflatten(1, (old.heads, -1)).transpose(0, 1)
        query, key, value = (part.transpose(0, 1) for part in (query_NHd, key_NHd, value_NHU))
        return PlainHeads(query, key, value, output_HDU, old.rope_dim)

    def dense_neurons(self, block: Any, x_ND: Tensor) -> DenseNeurons:
        """Contribution of a neuron: E|g a_j| * ||down_j||, g the gate of its expert.

        The mean gate that scales `down` is the marginal scale of Kim et al. 2026 (2605.28207).
        """
        return _neurons(block.mlp, x_ND, "mlp")


def _neurons(mlp: SwiGLU | MoE, x_ND: Tensor, origin: str) -> DenseNeurons:
    if isinstance(mlp, SwiGLU):
        gate_FD, up_FD = mlp.gate_up.weight.chunk(2, dim=0)
        a_NF = F.silu(x_ND @ gate_FD.T) * (x_ND @ up_FD.T)
        score_F = a_NF.double().abs().mean(dim=0).cpu() * column_norms(mlp.down.weight)
        return DenseNeurons([origin] * len(score_F), score_F, gate_FD, up_FD, mlp.down.weight)
    sums = expert_sums(mlp, x_ND)
    score_F = (sums.gated_activation_EF / len(x_ND) * column_norms(mlp.down)).flatten()
    gate_FD, up_FD = (part.flatten(0, 1) for part in mlp.gate_up.chunk(2, dim=1))
    mean_gate_E = (sums.gate_E / len(x_ND)).to(mlp.down)  # 0 where not chosen; route_scale included
    down_DF = (mlp.down * mean_gate_E[:, None, None]).transpose(0, 1).flatten(1)
    routed = DenseNeurons(["experts"] * len(score_F), score_F, gate_FD, up_FD, down_DF)
    if mlp.shared is None:
        return routed
    shared = _neurons(mlp.shared, x_ND, "shared")
    return DenseNeurons(
        shared.origins + routed.origins,
        torch.cat([shared.score_F, score_F]),
        torch.cat([shared.gate_FD, gate_FD]),
        torch.cat([shared.up_FD, up_FD]),
        torch.cat([shared.down_DF, down_DF], dim=1),
    )

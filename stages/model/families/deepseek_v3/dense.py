"""How a dense student reads a block of DeepSeek-V3: latent attention head by head, experts as one MLP.

Shape legend: N tokens, D width, H heads, d query or key head, U value head, F neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.model.families import dense_neurons
from stages.model.families.family import DenseNeurons, PlainHeads
from stages.model.layers import SwiGLU


class Source:
    def unfit(self, model: Any) -> str | None:
        return None

    def embedding(self, model: Any) -> Tensor:
        return model.embedding.weight

    def head(self, model: Any) -> Tensor:
        return model.head.weight

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
        mlp = block.mlp
        if isinstance(mlp, SwiGLU):
            return _of_swiglu(mlp, x_ND, "mlp")
        routed = dense_neurons.of_experts(mlp, x_ND)
        return routed if mlp.shared is None else dense_neurons.joined(_of_swiglu(mlp.shared, x_ND, "shared"), routed)


def _of_swiglu(mlp: SwiGLU, x_ND: Tensor, origin: str) -> DenseNeurons:
    gate_FD, up_FD = mlp.gate_up.weight.chunk(2, dim=0)
    return dense_neurons.of_mlp(gate_FD, up_FD, mlp.down.weight, x_ND, origin)

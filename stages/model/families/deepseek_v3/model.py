"""DeepSeek-V3: a mixture of experts with multi-head latent attention; the teacher of `pretrain`.

Decoder-only, pre-norm. Attention is MLA as DeepSeek-V2 has it without query compression: keys and values are
rebuilt from one small latent per token, and a single rotated key is shared by all heads. The first layers
have dense SwiGLU MLPs, the others DeepSeekMoE. Single-device code: parallelism is applied from outside.

Shape legend: B sequences, T tokens, S tokens seen, D width, H heads, C latent width, P = unrotated part
of a query or key head, R = rotated part, U = value head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.model.experts import MoE, Routing, balanced_bias
from stages.model.features import Features, check_layers
from stages.model.layers import (
    LayerCache,
    RMSNorm,
    Rope,
    SwiGLU,
    attend,
    for_matmuls,
    past_tokens,
    rope_table,
    rotate,
)


@dataclass(frozen=True)
class DeepseekV3Shape:
    """Everything that fixes the model's tensors and arithmetic, the same in all layers."""

    vocab_size: int
    sequence_tokens: int
    layers: int
    dense_layers: int
    width: int
    heads: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    latent_width: int
    dense_width: int
    experts: int
    experts_per_token: int
    shared_experts: int  # the shared MLP is shared_experts * expert_width wide
    expert_width: int
    gating: str  # sigmoid | softmax
    route_scale: float
    rope_theta: float
    gate_mass: float = 1.0  # below 1 a token takes its heaviest experts up to this share of the gate weight
    mean_experts_per_token: float = 0.0  # measured on calibration text where gate_mass is below 1

    @property
    def experts_at_work(self) -> float:
        """How many routed experts compute a token, on average."""
        return self.mean_experts_per_token if self.gate_mass < 1 else self.experts_per_token


class LatentAttention(nn.Module):
    def __init__(self, shape: DeepseekV3Shape):
        super().__init__()
        self.heads, self.nope, self.rope_dim = shape.heads, shape.nope_head_dim, shape.rope_head_dim
        self.value_dim, self.latent_width = shape.value_head_dim, shape.latent_width
        self.scale = (self.nope + self.rope_dim) ** -0.5
        self.query = nn.Linear(shape.width, self.heads * (self.nope + self.rope_dim), bias=False)
        self.latent_down = nn.Linear(shape.width, self.latent_width + self.rope_dim, bias=False)
        self.latent_norm = RMSNorm(self.latent_width)
        self.latent_up = nn.Linear(self.latent_width, self.heads * (self.nope + self.value_dim), bias=False)
        self.output = nn.Linear(self.heads * self.value_dim, shape.width, bias=False)

    def forward(self, x_BTD: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        x_BTD = for_matmuls(x_BTD)
        query_BTHd = self.query(x_BTD).view(B, T, self.heads, self.nope + self.rope_dim)
        query_nope, query_rope = query_BTHd.split([self.nope, self.rope_dim], dim=-1)
        query_rope = rotate(query_rope, rope)
        latent_BTC, key_rope = self.latent_down(x_BTD).split([self.latent_width, self.rope_dim], dim=-1)
        latent_BTC = self.latent_norm(latent_BTC)
        key_rope_BTR = rotate(key_rope.unsqueeze(2), rope).squeeze(2)
        if cache is not None:
            latent_BTC, key_rope_BTR = cache.append(latent_BTC, key_rope_BTR)
            if T == 1:
                return self.output(self._decode(query_nope, query_rope, latent_BTC, key_rope_BTR, cache.seen_S))
        S = latent_BTC.shape[1]
        up_BSHd = self.latent_up(latent_BTC).view(B, S, self.heads, self.nope + self.value_dim)
        key_nope, value_BSHU = up_BSHd.split([self.nope, self.value_dim], dim=-1)
        key_rope_BSHR = key_rope_BTR.to(key_nope.dtype).unsqueeze(2).expand(-1, -1, self.heads, -1)
        query = torch.cat([query_nope, query_rope], dim=-1).transpose(1, 2)
        key = torch.cat([key_nope, key_rope_BSHR], dim=-1).transpose(1, 2)
        out_BHTU = attend(query, key, value_BSHU.transpose(1, 2), self.scale)
        return self.output(out_BHTU.transpose(1, 2).reshape(B, T, self.heads * self.value_dim))

    def _decode(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent_BSC: Tensor,
        key_rope_BSR: Tensor,
        seen_S: Tensor | None,
    ) -> Tensor:
        """One new token, in latent space: latent_up is folded into query and output (DeepSeek-V2, 2.1.2).

        Cached keys and values are never rebuilt: a step reads C + R numbers per cached token for all heads.
        """
        dtype = query_nope.dtype
        latent_BSC, key_rope_BSR = latent_BSC.to(dtype), key_rope_BSR.to(dtype)
        up_HdC = self.latent_up.weight.to(dtype).view(self.heads, self.nope + self.value_dim, -1)
        query_BHC = (query_nope[:, 0].transpose(0, 1) @ up_HdC[:, : self.nope]).transpose(0, 1)
        score_BHS = query_BHC @ latent_BSC.transpose(1, 2) + query_rope[:, 0] @ key_rope_BSR.transpose(1, 2)
        score_BHS = score_BHS.float() * self.scale
        if seen_S is not None:
            score_BHS = score_BHS.masked_fill(~seen_S, -torch.inf)
        share_BHS = score_BHS.softmax(dim=-1).to(dtype)
        out_HBU = (share_BHS @ latent_BSC).transpose(0, 1) @ up_HdC[:, self.nope :].mT
        return out_HBU.transpose(0, 1).flatten(1).unsqueeze(1)


class Block(nn.Module):
    def __init__(self, shape: DeepseekV3Shape, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(shape.width)
        self.attention = LatentAttention(shape)
        self.mlp_norm = RMSNorm(shape.width)
        self.mlp: SwiGLU | MoE
        if layer < shape.dense_layers:
            self.mlp = SwiGLU(shape.width, shape.dense_width)
        else:
            self.mlp = MoE(
                shape.width,
                shape.expert_width,
                shape.experts,
                shape.experts_per_token,
                shape.shared_experts,
                shape.gating,
                shape.route_scale,
                shape.gate_mass,
            )

    def forward(
        self, x_BTD: Tensor, rope: Rope, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, cache)
        mlp_out = self.mlp(self.mlp_norm(x_BTD))
        if isinstance(self.mlp, MoE):
            return x_BTD + mlp_out[0], mlp_out[1]
        return x_BTD + mlp_out, None


class DeepseekV3(nn.Module):
    def __init__(self, shape: DeepseekV3Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def features(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, layers: Collection[int] = ()
    ) -> Features:
        """Hidden state after the final norm, the routing of each MoE layer, and the hidden states of `layers`."""
        check_layers(layers, len(self.blocks))
        x_BTD = self.embedding(tokens_BT)
        rope = rope_table(
            past_tokens(cache),
            tokens_BT.shape[1],
            self.shape.rope_head_dim,
            self.shape.rope_theta,
            x_BTD.device,
        )
        routings, hidden = [], {}
        for layer, block in enumerate(self.blocks):
            x_BTD, routing = block(x_BTD, rope, cache[layer] if cache else None)
            if routing is not None:
                routings.append(routing)
            if layer in layers:
                hidden[layer] = x_BTD
        return Features(self.norm(x_BTD), routings, hidden)

    def forward(self, tokens_BT: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        return self.head(self.features(tokens_BT, cache).x_BTD)

    def new_cache(self, batch: int, tokens: int) -> list[LayerCache]:
        """Latent cache: C + R numbers per token and layer, whatever the number of heads."""
        weight = self.head.weight
        return [
            LayerCache(
                weight.new_zeros(batch, tokens, self.shape.latent_width),
                weight.new_zeros(batch, tokens, self.shape.rope_head_dim),
            )
            for _ in self.blocks
        ]

    @torch.no_grad()
    def balance(self, loads: list[Tensor], rate: float) -> None:
        """One bias step per optimizer step, from loads summed over micro-batches and ranks."""
        if self.shape.gating != "sigmoid":
            return  # softmax has no bias
        moes = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        for moe, load_E in zip(moes, loads, strict=True):
            moe.bias.copy_(balanced_bias(moe.bias, load_E.to(moe.bias.device), rate))

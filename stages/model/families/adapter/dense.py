"""How a dense student reads a model that transformers computes: any attention head by head, any experts as one MLP.

Shape legend: N tokens, D width, H query heads, G key heads, d query or key head, R rotated part of it, U value head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.model.families import dense_neurons
from stages.model.families.adapter.model import AdapterModel, moe_of
from stages.model.families.adapter.places import head_dim
from stages.model.families.family import DenseNeurons, PlainHeads
from stages.settings.model_types import KNOWN


class Source:
    def unfit(self, model: AdapterModel) -> str | None:
        config, block = model.hub.config, model.blocks[0]
        if config.model_type == "gpt_oss":
            return "the experts of GPT-OSS have biases and a clamped (up + 1) gate, which no SwiGLU has"
        if getattr(config, "hidden_act", None) != "silu":
            return f"the MLP of {KNOWN[config.model_type]} is no SwiGLU"
        if not hasattr(block, "input_layernorm"):
            return f"{KNOWN[config.model_type]} norms what attention and MLP give, not what they read"
        return None

    def embedding(self, model: AdapterModel) -> Tensor:
        return model.embedding.weight * getattr(model.hub.config, "embedding_multiplier", 1.0)

    def head(self, model: AdapterModel) -> Tensor:
        return model.head.weight if model.head.after is None else model.head.weight / model.head.after.divisor

    def plain_heads(self, block: Any, x_ND: Tensor) -> PlainHeads:
        old, config = block.attention, block.attention.config
        found = _latent(old, config, x_ND) if getattr(config, "kv_lora_rank", None) else _grouped(old, config, x_ND)
        # a student divides by the root of its head: what else a family scales by moves into the queries
        scale = old.scaling * found.query_HNd.shape[2] ** 0.5
        query_HNd, norm_d = found.query_HNd, found.query_norm_d
        if norm_d is None:
            query_HNd = query_HNd * scale
        else:
            norm_d = norm_d * scale
        output_HDU = found.output_HDU * _residual(config)
        return found._replace(query_HNd=query_HNd, query_norm_d=norm_d, output_HDU=output_HDU)

    def dense_neurons(self, block: Any, x_ND: Tensor) -> DenseNeurons:
        found = _neurons(block, x_ND)
        return found._replace(down_DF=found.down_DF * _residual(block.attention.config))


def _residual(config: Any) -> float:
    """By what Granite multiplies before it adds to the residual stream."""
    return getattr(config, "residual_multiplier", 1.0)


def _neurons(block: Any, x_ND: Tensor) -> DenseNeurons:
    if (moe := moe_of(block)) is None:
        return _of_mlp(block.mlp, x_ND, "mlp")
    routed = dense_neurons.of_experts(moe, x_ND)
    if not moe.shared_name:
        return routed
    shared = _of_mlp(getattr(moe.block, moe.shared_name), x_ND, "shared", moe.shared_gate(x_ND))
    return dense_neurons.joined(shared, routed)


def _of_mlp(mlp: nn.Module, x_ND: Tensor, origin: str, share_N: Tensor | None = None) -> DenseNeurons:
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return dense_neurons.of_mlp(*weights, x_ND, origin, share_N)


def _latent(old: Any, config: Any, x_ND: Tensor) -> PlainHeads:
    heads, rotated, unrotated = old.num_heads, old.qk_rope_head_dim, old.qk_nope_head_dim
    query_ND = old.q_proj(x_ND) if old.q_lora_rank is None else old.q_b_proj(old.q_a_layernorm(old.q_a_proj(x_ND)))
    latent_NC, key_rope_NR = old.kv_a_proj_with_mqa(x_ND).split([old.kv_lora_rank, rotated], dim=1)
    up_NHd = old.kv_b_proj(old.kv_a_layernorm(latent_NC)).unflatten(1, (heads, -1))
    key_NHP, value_NHU = up_NHd.split([unrotated, old.v_head_dim], dim=2)
    query_NHP, query_NHR = query_ND.unflatten(1, (heads, -1)).split([unrotated, rotated], dim=2)
    if getattr(config, "rope_interleave", True):  # DeepSeek-V2 always pairs neighbours
        query_NHR, key_rope_NR = _halves(query_NHR), _halves(key_rope_NR)
    key_NHR = key_rope_NR.unsqueeze(1).expand(-1, heads, -1)
    query_NHd, key_NHd = torch.cat([query_NHP, query_NHR], dim=2), torch.cat([key_NHP, key_NHR], dim=2)
    query, key, value = (part.transpose(0, 1) for part in (query_NHd, key_NHd, value_NHU))
    return PlainHeads(query, key, value, _outputs(old, heads), rotated)


def _grouped(old: Any, config: Any, x_ND: Tensor) -> PlainHeads:
    size, heads, groups = head_dim(config), config.num_attention_heads, config.num_key_value_heads
    found, norms = {}, {}
    rotated = int(size * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    for name, count in (("q", heads), ("k", groups)):
        part_ND = getattr(old, f"{name}_proj")(x_ND)
        norm: Any = getattr(old, f"{name}_norm", None)
        by_head = norm is not None and len(norm.weight) == size
        if norm is not None and not by_head:  # OLMo's norm is over all heads at once
            part_ND = norm(part_ND)
        part_NHd = part_ND.unflatten(1, (count, size))
        if by_head and rotated == size:
            norms[name] = norm.weight
        elif by_head:
            part_NHd = norm(part_NHd)
        found[name] = torch.cat([part_NHd[..., rotated:], part_NHd[..., :rotated]], dim=2).transpose(0, 1)
    value_GNU = old.v_proj(x_ND).unflatten(1, (groups, size)).transpose(0, 1)
    key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (found["k"], value_GNU))
    return PlainHeads(found["q"], key, value, _outputs(old, heads), rotated, groups, norms.get("q"), norms.get("k"))


def _halves(part: Tensor) -> Tensor:
    """Rotated neighbours (2i, 2i + 1) as the pairs (i, i + R/2) that the student has."""
    return part.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _outputs(old: Any, heads: int) -> Tensor:
    return old.o_proj.weight.unflatten(1, (heads, -1)).transpose(0, 1)

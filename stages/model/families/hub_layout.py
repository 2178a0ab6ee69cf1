"""What config.json and the tensor names of Llama, Qwen and DeepSeek-V3 have in common in transformers.

Gate and up are one matrix here and two there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from stages.files.artifacts import Refusal
from stages.model.families.family import Unsupported
from stages.model.kernels.norm import NORM_EPSILON
from stages.model.layers import INIT_STD

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# our field -> the name in config.json
COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "sequence_tokens": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "rope_theta": "rope_theta",
}

# what our arithmetic takes for granted; a folder that says otherwise is refused
COMMON_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": NORM_EPSILON,
}


def config_fields(shape: Any, names: dict[str, str]) -> dict[str, Any]:
    """The config.json of a shape: what is common to all, and its fields under their names there."""
    # rope_parameters is what transformers 5 reads, rope_theta what everything older reads
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}}
    common = {"attention_dropout": 0.0, "initializer_range": INIT_STD, "use_cache": True, "tie_word_embeddings": False}
    return rope | COMMON_FIXED | common | {hub: getattr(shape, ours) for ours, hub in names.items()}


def read_fields(kind: type, names: dict[str, str], fixed: dict[str, Any], config: dict[str, Any], path: Path) -> Any:
    """The shape that a config.json describes; a value of another type, or another than the fixed one, is refused."""
    for key, only in fixed.items():
        if config.get(key, only) != only:
            raise Unsupported(f"{path}: {key} is {config[key]!r}, only {only!r} is supported")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise Refusal(f"{path}: tie_word_embeddings is {tied!r}, expected bool: restore the file")
    rope = config.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default" and not config.get("rope_scaling")
    if not plain or rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        raise Unsupported(f"{path}: scaled or partial rotary positions are not supported, only rope_type 'default'")
    config = {"rope_theta": rope.get("rope_theta")} | config
    given: dict[str, Any] = {}
    for name, wanted in get_type_hints(kind).items():
        found: Any = config.get(names[name])
        allowed = (int, float) if wanted is float else wanted
        of_kind = isinstance(found, allowed) and isinstance(found, bool) is (wanted is bool)
        if not of_kind or found in (math.inf, -math.inf):
            raise Refusal(f"{path}: {names[name]} is {found!r}, expected {wanted.__name__}: restore the file")
        given[name] = float(found) if wanted is float else found
    return kind(**given)


def to_hub(
    model: Any,
    attention: dict[str, str],
    weight_to_hub: Callable[[str, Tensor], Tensor],
    mlp_to_hub: Callable[[Any, str], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """All tensors by their names there. `attention` maps our names of its modules; the functions map what differs."""
    hub = {EMBEDDING: model.embedding.weight}
    for index, block in enumerate(model.blocks):
        layer = f"model.layers.{index}"
        hub[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        for ours, theirs in attention.items():
            for kind, part in getattr(block.attention, ours).named_parameters():  # weight, and bias where there is one
                hub[f"{layer}.self_attn.{theirs}.{kind}"] = weight_to_hub(ours, part)
        hub[f"{layer}.post_attention_layernorm.weight"] = block.mlp_norm.weight
        hub |= mlp_to_hub(block.mlp, f"{layer}.mlp")
    hub["model.norm.weight"] = model.norm.weight
    return hub if model.head.weight is model.embedding.weight else hub | {HEAD: model.head.weight}


def from_hub(
    hub: dict[str, Tensor],
    model: Any,
    attention: dict[str, str],
    weight_from_hub: Callable[[str, Tensor], Tensor],
    mlp_from_hub: Callable[[dict[str, Tensor], Any, str, str], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The inverse of `to_hub`, of tensors in float32, each of which leaves `hub` when it is read."""
    state = {"embedding.weight": hub.pop(EMBEDDING)}
    for index, block in enumerate(model.blocks):
        layer, ours_at = f"model.layers.{index}", f"blocks.{index}"
        state[f"{ours_at}.attention_norm.weight"] = hub.pop(f"{layer}.input_layernorm.weight")
        for ours, theirs in attention.items():
            for kind, _ in getattr(block.attention, ours).named_parameters():
                part = hub.pop(f"{layer}.self_attn.{theirs}.{kind}")
                state[f"{ours_at}.attention.{ours}.{kind}"] = weight_from_hub(ours, part)
        state[f"{ours_at}.mlp_norm.weight"] = hub.pop(f"{layer}.post_attention_layernorm.weight")
        state |= mlp_from_hub(hub, block.mlp, f"{layer}.mlp", f"{ours_at}.mlp")
    state["norm.weight"] = hub.pop("model.norm.weight")
    tied = model.head.weight is model.embedding.weight
    return state | {"head.weight": state["embedding.weight"] if tied else hub.pop(HEAD)}


def same_weight(_: str, weight: Tensor) -> Tensor:
    """For a family whose attention weights have one layout here and there."""
    return weight


def swiglu_to_hub(mlp: nn.Module, at: str) -> dict[str, Tensor]:
    return gate_up_to_hub(mlp.gate_up.weight, mlp.down.weight, at)


def swiglu_from_hub(hub: dict[str, Tensor], _: nn.Module, at: str, ours_at: str) -> dict[str, Tensor]:
    gate_up, down = gate_up_from_hub(hub, at)
    return {f"{ours_at}.gate_up.weight": gate_up, f"{ours_at}.down.weight": down}


def gate_up_to_hub(gate_up_2FD: Tensor, down_DF: Tensor, at: str) -> dict[str, Tensor]:
    gate, up = gate_up_2FD.chunk(2, dim=0)
    return {f"{at}.gate_proj.weight": gate, f"{at}.up_proj.weight": up, f"{at}.down_proj.weight": down_DF}


def gate_up_from_hub(hub: dict[str, Tensor], at: str) -> tuple[Tensor, Tensor]:
    gate_up = torch.cat([hub.pop(f"{at}.gate_proj.weight"), hub.pop(f"{at}.up_proj.weight")])
    return gate_up, hub.pop(f"{at}.down_proj.weight")

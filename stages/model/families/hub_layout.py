"""What config.json and the tensor names of Llama, Qwen3 and DeepSeek-V3 have in common in transformers.

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
    """The config.json of a shape: its fields under their names there, and what is common to all."""
    # rope_parameters is what transformers 5 reads, rope_theta what everything older reads
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}}
    common = {"attention_dropout": 0.0, "initializer_range": INIT_STD, "use_cache": True, "tie_word_embeddings": False}
    return {hub: getattr(shape, ours) for ours, hub in names.items()} | rope | COMMON_FIXED | common


def read_fields(kind: type, names: dict[str, str], fixed: dict[str, Any], config: dict[str, Any], path: Path) -> Any:
    """The shape that a config.json describes; a value of another type, or another than the fixed one, is refused."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise Unsupported(f"{path}: {key} is {config[key]!r}, only {value!r} is supported")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise Refusal(f"{path}: tie_word_embeddings is {tied!r}, expected bool: restore the file")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise Unsupported(f"{path}: scaled rotary positions are not supported, only rope_type 'default'")
    config = {"rope_theta": rope.get("rope_theta")} | config
    given: dict[str, Any] = {}
    for name, wanted in get_type_hints(kind).items():
        value = config.get(names[name])
        allowed = (int, float) if wanted is float else wanted
        if not isinstance(value, allowed) or isinstance(value, bool) or value in (math.inf, -math.inf):
            raise Refusal(f"{path}: {names[name]} is {value!r}, expected {wanted.__name__}: restore the file")
        given[name] = float(value) if wanted is float else value
    return kind(**given)


def to_hub(
    model: Any,
    attention: dict[str, str],
    weight_to_hub: Callable[[str, Tensor], Tensor],
    mlp_to_hub: Callable[[Any, str], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """All tensors by their names there. `attention` maps our names of its modules; the functions map what differs."""
    hub = {"model.embed_tokens.weight": model.embedding.weight}
    for index, block in enumerate(model.blocks):
        layer = f"model.layers.{index}"
        hub[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        for ours, theirs in attention.items():
            hub[f"{layer}.self_attn.{theirs}.weight"] = weight_to_hub(ours, getattr(block.attention, ours).weight)
        hub[f"{layer}.post_attention_layernorm.weight"] = block.mlp_norm.weight
        hub |= mlp_to_hub(block.mlp, f"{layer}.mlp")
    return hub | {"model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}


def from_hub(
    hub: dict[str, Tensor],
    model: Any,
    attention: dict[str, str],
    weight_from_hub: Callable[[str, Tensor], Tensor],
    mlp_from_hub: Callable[[dict[str, Tensor], Any, str, str], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The inverse of `to_hub`."""
    hub = {name: part.float() for name, part in hub.items()}
    state = {"embedding.weight": hub.pop("model.embed_tokens.weight")}
    for index, block in enumerate(model.blocks):
        layer, ours_at = f"model.layers.{index}", f"blocks.{index}"
        state[f"{ours_at}.attention_norm.weight"] = hub.pop(f"{layer}.input_layernorm.weight")
        for ours, theirs in attention.items():
            weight = hub.pop(f"{layer}.self_attn.{theirs}.weight")
            state[f"{ours_at}.attention.{ours}.weight"] = weight_from_hub(ours, weight)
        state[f"{ours_at}.mlp_norm.weight"] = hub.pop(f"{layer}.post_attention_layernorm.weight")
        state |= mlp_from_hub(hub, block.mlp, f"{layer}.mlp", f"{ours_at}.mlp")
    return state | {"norm.weight": hub.pop("model.norm.weight"), "head.weight": hub.pop("lm_head.weight")}


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

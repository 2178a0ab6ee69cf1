"""Names and layout of a model's tensors in transformers against ours.

Gate and up are one matrix here and two there; experts are stacked here and one by one there; and DeepSeek pairs
neighbours (2i, 2i+1) for rotation where we pair halves (i, i + R/2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.model.experts import MoE
from stages.model.layers import SwiGLU
from stages.model.student import Student
from stages.model.teacher import Teacher, TeacherShape

_ATTENTION = {
    Teacher: {
        "query": "q_proj",
        "latent_down": "kv_a_proj_with_mqa",
        "latent_norm": "kv_a_layernorm",
        "latent_up": "kv_b_proj",
        "output": "o_proj",
    },
    Student: {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
        "query_norm": "q_norm",
        "key_norm": "k_norm",
    },
}


def to_hub(model: Teacher | Student) -> dict[str, Tensor]:
    hub = {"model.embed_tokens.weight": model.embedding.weight}
    for index, block in enumerate(model.blocks):
        layer = f"model.layers.{index}"
        hub[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        for ours, theirs in _ATTENTION[type(model)].items():
            weight = getattr(block.attention, ours).weight
            if isinstance(model, Teacher):
                weight = _reorder_rope(ours, weight, model.shape, to_hub=True)
            hub[f"{layer}.self_attn.{theirs}.weight"] = weight
        hub[f"{layer}.post_attention_layernorm.weight"] = block.mlp_norm.weight
        hub |= _mlp_to_hub(block.mlp, f"{layer}.mlp")
    return hub | {"model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}


def _mlp_to_hub(mlp: SwiGLU | MoE, at: str) -> dict[str, Tensor]:
    if isinstance(mlp, SwiGLU):
        gate, up = mlp.gate_up.weight.chunk(2, dim=0)
        return {
            f"{at}.gate_proj.weight": gate,
            f"{at}.up_proj.weight": up,
            f"{at}.down_proj.weight": mlp.down.weight,
        }
    hub = {f"{at}.gate.weight": mlp.router_weight, f"{at}.gate.e_score_correction_bias": mlp.bias}
    for index, (gate_up, down) in enumerate(zip(mlp.gate_up, mlp.down, strict=True)):
        gate, up = gate_up.chunk(2, dim=0)
        expert = f"{at}.experts.{index}"
        hub |= {
            f"{expert}.gate_proj.weight": gate,
            f"{expert}.up_proj.weight": up,
            f"{expert}.down_proj.weight": down,
        }
    return hub | (_mlp_to_hub(mlp.shared, f"{at}.shared_experts") if mlp.shared is not None else {})


def from_hub(hub: dict[str, Tensor], model: Teacher | Student) -> dict[str, Tensor]:
    """The inverse of to_hub."""
    hub = {name: part.float() for name, part in hub.items()}
    state = {"embedding.weight": hub.pop("model.embed_tokens.weight")}
    for index, block in enumerate(model.blocks):
        layer, ours_at = f"model.layers.{index}", f"blocks.{index}"
        state[f"{ours_at}.attention_norm.weight"] = hub.pop(f"{layer}.input_layernorm.weight")
        for ours, theirs in _ATTENTION[type(model)].items():
            weight = hub.pop(f"{layer}.self_attn.{theirs}.weight")
            if isinstance(model, Teacher):
                weight = _reorder_rope(ours, weight, model.shape, to_hub=False)
            state[f"{ours_at}.attention.{ours}.weight"] = weight
        state[f"{ours_at}.mlp_norm.weight"] = hub.pop(f"{layer}.post_attention_layernorm.weight")
        state |= _mlp_from_hub(hub, block.mlp, f"{layer}.mlp", f"{ours_at}.mlp")
    return state | {"norm.weight": hub.pop("model.norm.weight"), "head.weight": hub.pop("lm_head.weight")}


def _mlp_from_hub(hub: dict[str, Tensor], mlp: SwiGLU | MoE, at: str, ours_at: str) -> dict[str, Tensor]:
    def pop(at: str) -> tuple[Tensor, Tensor]:
        gate_up = torch.cat([hub.pop(f"{at}.gate_proj.weight"), hub.pop(f"{at}.up_proj.weight")])
        return gate_up, hub.pop(f"{at}.down_proj.weight")

    if isinstance(mlp, SwiGLU):
        gate_up, down = pop(at)
        return {f"{ours_at}.gate_up.weight": gate_up, f"{ours_at}.down.weight": down}
    experts = [pop(f"{at}.experts.{index}") for index in range(len(mlp.gate_up))]
    state = {
        f"{ours_at}.router_weight": hub.pop(f"{at}.gate.weight"),
        f"{ours_at}.bias": hub.pop(f"{at}.gate.e_score_correction_bias"),
        f"{ours_at}.gate_up": torch.stack([gate_up for gate_up, _ in experts]),
        f"{ours_at}.down": torch.stack([down for _, down in experts]),
    }
    if mlp.shared is not None:
        state |= _mlp_from_hub(hub, mlp.shared, f"{at}.shared_experts", f"{ours_at}.shared")
    return state


def _reorder_rope(name: str, weight: Tensor, shape: TeacherShape, to_hub: bool) -> Tensor:
    """Halves to neighbours (to_hub) or back, on the rotated rows of query heads and shared key."""
    if name not in ("query", "latent_down"):
        return weight
    fixed = shape.nope_head_dim if name == "query" else shape.latent_width
    head_rows = weight.view(-1, fixed + shape.rope_head_dim, weight.shape[-1])
    rotated = head_rows[:, fixed:].unflatten(1, (2, -1) if to_hub else (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([head_rows[:, :fixed], rotated], dim=1).flatten(0, 1)

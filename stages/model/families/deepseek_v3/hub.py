"""config.json and tensor names of transformers' DeepseekV3ForCausalLM against ours.

Experts are stacked here and one by one there; and DeepSeek pairs neighbours (2i, 2i+1) for rotation where we pair
halves (i, i + R/2). Softmax gating has no equal there, as transformers always applies a sigmoid, nor has a number of
experts that differs by token: such a model has a model type of its own, which AutoModel refuses. Its weights are laid
out alike: with the type changed to deepseek_v3, transformers runs a model of a varying number with the largest one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.model.experts import MoE
from stages.model.families import hub_layout
from stages.model.families.deepseek_v3.model import DeepseekV3, DeepseekV3Shape
from stages.model.layers import SwiGLU
from stages.settings.model_types import CONFIDENCE_TYPE, SOFTMAX_TYPE

MODEL_TYPE = "deepseek_v3"

_FIELDS = hub_layout.COMMON_FIELDS | {
    "dense_layers": "first_k_dense_replace",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "value_head_dim": "v_head_dim",
    "latent_width": "kv_lora_rank",
    "dense_width": "intermediate_size",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "expert_width": "moe_intermediate_size",
    "gating": "scoring_func",
    "route_scale": "routed_scaling_factor",
}
_VARYING = {"gate_mass": "offramp_gate_mass", "mean_experts_per_token": "offramp_mean_experts_per_token"}
_FIXED = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "num_nextn_predict_layers": 0,
}
_ATTENTION = {
    "query": "q_proj",
    "latent_down": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm",
    "latent_up": "kv_b_proj",
    "output": "o_proj",
}


def config_of(shape: DeepseekV3Shape) -> dict[str, Any]:
    softmax, varying = shape.gating == "softmax", shape.gate_mass < 1
    model_type = SOFTMAX_TYPE if softmax else CONFIDENCE_TYPE if varying else MODEL_TYPE
    architectures = {SOFTMAX_TYPE: "OfframpSoftmaxTeacher", CONFIDENCE_TYPE: "OfframpConfidenceTeacher"}
    return (
        hub_layout.config_fields(shape, _FIELDS | (_VARYING if varying else {}))
        | _FIXED
        | {
            "architectures": [architectures.get(model_type, "DeepseekV3ForCausalLM")],
            "model_type": model_type,
            "num_key_value_heads": shape.heads,
            "topk_method": "greedy" if softmax else "noaux_tc",
            "moe_layer_freq": 1,
        }
    )


def shape_from(config: dict[str, Any], path: Path) -> DeepseekV3Shape:
    fixed_count = {"offramp_gate_mass": 1.0, "offramp_mean_experts_per_token": 0.0}
    config = {"scoring_func": "sigmoid"} | fixed_count | config
    return hub_layout.read_fields(DeepseekV3Shape, _FIELDS | _VARYING, hub_layout.COMMON_FIXED | _FIXED, config, path)


def to_hub(model: DeepseekV3) -> dict[str, Tensor]:
    def reorder(name: str, weight: Tensor) -> Tensor:
        return _reorder_rope(name, weight, model.shape, to_hub=True)

    return hub_layout.to_hub(model, _ATTENTION, reorder, _mlp_to_hub)


def from_hub(hub: dict[str, Tensor], model: DeepseekV3) -> dict[str, Tensor]:
    def reorder(name: str, weight: Tensor) -> Tensor:
        return _reorder_rope(name, weight, model.shape, to_hub=False)

    return hub_layout.from_hub(hub, model, _ATTENTION, reorder, _mlp_from_hub)


def _mlp_to_hub(mlp: SwiGLU | MoE, at: str) -> dict[str, Tensor]:
    if isinstance(mlp, SwiGLU):
        return hub_layout.swiglu_to_hub(mlp, at)
    hub = {f"{at}.gate.weight": mlp.router_weight, f"{at}.gate.e_score_correction_bias": mlp.bias}
    for index, (gate_up, down) in enumerate(zip(mlp.gate_up, mlp.down, strict=True)):
        hub |= hub_layout.gate_up_to_hub(gate_up, down, f"{at}.experts.{index}")
    return hub | (_mlp_to_hub(mlp.shared, f"{at}.shared_experts") if mlp.shared is not None else {})


def _mlp_from_hub(hub: dict[str, Tensor], mlp: SwiGLU | MoE, at: str, ours_at: str) -> dict[str, Tensor]:
    if isinstance(mlp, SwiGLU):
        return hub_layout.swiglu_from_hub(hub, mlp, at, ours_at)
    experts = [hub_layout.gate_up_from_hub(hub, f"{at}.experts.{index}") for index in range(len(mlp.gate_up))]
    state = {
        f"{ours_at}.router_weight": hub.pop(f"{at}.gate.weight"),
        f"{ours_at}.bias": hub.pop(f"{at}.gate.e_score_correction_bias"),
        f"{ours_at}.gate_up": torch.stack([gate_up for gate_up, _ in experts]),
        f"{ours_at}.down": torch.stack([down for _, down in experts]),
    }
    if mlp.shared is not None:
        state |= _mlp_from_hub(hub, mlp.shared, f"{at}.shared_experts", f"{ours_at}.shared")
    return state


def _reorder_rope(name: str, weight: Tensor, shape: DeepseekV3Shape, to_hub: bool) -> Tensor:
    """Halves to neighbours (to_hub) or back, on the rotated rows of query heads and shared key."""
    if name not in ("query", "latent_down"):
        return weight
    fixed = shape.nope_head_dim if name == "query" else shape.latent_width
    head_rows = weight.view(-1, fixed + shape.rope_head_dim, weight.shape[-1])
    rotated = head_rows[:, fixed:].unflatten(1, (2, -1) if to_hub else (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([head_rows[:, :fixed], rotated], dim=1).flatten(0, 1)

"""DeepSeek-V3 as a family: its rules, its cost and what can be pruned in it (the Protocol is in ../family.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.model.families import prunable
from stages.model.families.deepseek_v3 import dense, hub
from stages.model.families.deepseek_v3.confidence import mixtures
from stages.model.families.deepseek_v3.model import DeepseekV3, DeepseekV3Shape
from stages.model.families.family import DenseSource, Routing
from stages.model.families.prunable import Prunable
from stages.model.layers import initialise
from stages.settings import shapes
from stages.settings.model_types import CONFIDENCE_TYPE, SOFTMAX_TYPE

MAY_BE_ZERO = ("dense_layers", "shared_experts", "nope_head_dim", "mean_experts_per_token")


class DeepseekV3Family:
    name = "deepseek_v3"
    model_types: tuple[str, ...] = (hub.MODEL_TYPE, SOFTMAX_TYPE, CONFIDENCE_TYPE)
    shape_type: type = DeepseekV3Shape
    dense_source: DenseSource | None = dense.Source()
    dense_target = False

    def build(self, shape: DeepseekV3Shape) -> DeepseekV3:
        return DeepseekV3(shape)

    def initialise(self, model: DeepseekV3, seed: int) -> None:
        initialise(model.to_empty(device="cpu"), model.shape.layers, seed)

    def broken_rules(self, shape: DeepseekV3Shape) -> Iterator[tuple[str, str]]:
        yield from shapes.too_small(shape, may_be_zero=MAY_BE_ZERO)
        if shape.gating not in ("sigmoid", "softmax"):
            yield "gating", "must be sigmoid or softmax"
        if not 0 < shape.gate_mass <= 1:
            yield "gate_mass", "must be above 0 and at most 1"
        if shape.gate_mass < 1 and not 1 <= shape.mean_experts_per_token <= shape.experts_per_token:
            yield "mean_experts_per_token", f"must be from 1 to experts_per_token ({shape.experts_per_token})"
        yield from shapes.deepseek_v3(shape)

    def config_of(self, shape: DeepseekV3Shape) -> dict[str, Any]:
        return hub.config_of(shape)

    def shape_from(self, config: dict[str, Any], path: Path) -> DeepseekV3Shape:
        return hub.shape_from(config, path)

    def read(self, *_: Any) -> None:
        """Its folders are read by `from_hub`."""

    def to_hub(self, model: DeepseekV3) -> dict[str, Tensor]:
        return hub.to_hub(model)

    def from_hub(self, tensors: dict[str, Tensor], model: DeepseekV3) -> dict[str, Tensor]:
        return hub.from_hub(tensors, model)

    def flops_per_token(self, shape: DeepseekV3Shape, context_tokens: int) -> dict[str, float]:
        D, keys = shape.width, (context_tokens + 1) / 2
        key_dim = shape.nope_head_dim + shape.rope_head_dim
        attention: float = 2 * D * shape.heads * key_dim
        attention += 2 * D * (shape.latent_width + shape.rope_head_dim)
        attention += 2 * shape.latent_width * shape.heads * (shape.nope_head_dim + shape.value_head_dim)
        attention += 4 * shape.heads * max(key_dim, shape.value_head_dim) * keys  # the narrower is padded
        attention += 2 * shape.heads * shape.value_head_dim * D
        moe_layers = shape.layers - shape.dense_layers
        shared_width = shape.shared_experts * shape.expert_width
        return {
            "attention": shape.layers * attention,
            "mlp": 6 * D * (shape.dense_layers * shape.dense_width + moe_layers * shared_width),
            "experts": 6 * D * moe_layers * shape.experts_at_work * shape.expert_width,
            "router": 2 * D * moe_layers * shape.experts,
            "head": 2 * D * shape.vocab_size,
        }

    def active_parameters(self, model: DeepseekV3) -> int:
        idle = 0
        for moe in mixtures(model):
            n_experts = len(moe.router_weight)
            routed = moe.gate_up.numel() + moe.down.numel()
            idle += routed // n_experts * (n_experts - moe.experts_per_token)
        return sum(parameter.numel() for parameter in model.parameters()) - idle

    def routing(self, shape: DeepseekV3Shape) -> Routing | None:
        return Routing(shape.gating, shape.route_scale) if shape.dense_layers < shape.layers else None

    def prunable(self, model: DeepseekV3) -> list[Prunable]:
        places = []
        for index, block in enumerate(model.blocks):
            at = f"blocks.{index}"
            # the latent is shared by all heads and stays whole
            places.append(prunable.heads(block.attention, f"{at}.attention", model.shape.heads, ("query", "latent_up")))
            if index < model.shape.dense_layers:
                places.append(prunable.swiglu_neurons(block.mlp, f"{at}.mlp"))
                continue
            if block.mlp.shared is not None:
                places.append(prunable.swiglu_neurons(block.mlp.shared, f"{at}.mlp.shared"))
            places += [prunable.expert_neurons(block.mlp, f"{at}.mlp"), prunable.experts(block.mlp, f"{at}.mlp")]
        return places

    def pruned_shape(self, shape: DeepseekV3Shape, kept: Callable[[str, int], int]) -> DeepseekV3Shape:
        # transformers' router adds up the two best experts of a group, and cannot run a mixture of one
        experts = max(kept("experts", shape.experts), min(2, shape.experts))
        return replace(
            shape,
            heads=kept("heads", shape.heads),
            dense_width=kept("neurons", shape.dense_width),
            expert_width=kept("neurons", shape.expert_width),  # the shared experts' too
            experts=experts,
            experts_per_token=min(kept("experts_per_token", shape.experts_per_token), experts),
        )

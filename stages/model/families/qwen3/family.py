"""Qwen3 as a family: Hugging Face mapping, cost and what can be pruned in it (the Protocol is in ../family.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.model.families import hub_layout, prunable
from stages.model.families.family import DenseSource, Routing
from stages.model.families.prunable import Prunable
from stages.model.families.qwen3.model import Qwen3, Qwen3Shape
from stages.model.layers import initialise
from stages.settings import shapes

_FIELDS = hub_layout.COMMON_FIELDS | {
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
}
_FIXED = {"use_sliding_window": False}
_ATTENTION = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
}


class Qwen3Family:
    name = "qwen3"
    model_types: tuple[str, ...] = ("qwen3",)
    shape_type: type = Qwen3Shape
    dense_source: DenseSource | None = None
    dense_target = True

    def build(self, shape: Qwen3Shape) -> Qwen3:
        return Qwen3(shape)

    def initialise(self, model: Qwen3, seed: int) -> None:
        initialise(model.to_empty(device="cpu"), model.shape.layers, seed)

    def broken_rules(self, shape: Qwen3Shape) -> Iterator[tuple[str, str]]:
        yield from shapes.too_small(shape)
        yield from shapes.qwen3(shape)

    def config_of(self, shape: Qwen3Shape) -> dict[str, Any]:
        own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        return hub_layout.config_fields(shape, _FIELDS) | own | _FIXED

    def shape_from(self, config: dict[str, Any], path: Path) -> Qwen3Shape:
        return hub_layout.read_fields(Qwen3Shape, _FIELDS, hub_layout.COMMON_FIXED | _FIXED, config, path)

    def read(self, *_: Any) -> None:
        """Its folders are read by `from_hub`."""

    def to_hub(self, model: Qwen3) -> dict[str, Tensor]:
        return hub_layout.to_hub(model, _ATTENTION, hub_layout.same_weight, hub_layout.swiglu_to_hub)

    def from_hub(self, tensors: dict[str, Tensor], model: Qwen3) -> dict[str, Tensor]:
        return hub_layout.from_hub(tensors, model, _ATTENTION, hub_layout.same_weight, hub_layout.swiglu_from_hub)

    def flops_per_token(self, shape: Qwen3Shape, context_tokens: int) -> dict[str, float]:
        D, keys = shape.width, (context_tokens + 1) / 2
        queries, groups = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = 2 * D * (queries + 2 * groups) + 4 * queries * keys + 2 * queries * D
        return {
            "attention": shape.layers * attention,
            "mlp": 6 * D * shape.layers * shape.mlp_width,
            "head": 2 * D * shape.vocab_size,
        }

    def active_parameters(self, model: Qwen3) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def routing(self, shape: Qwen3Shape) -> Routing | None:
        return None

    def prunable(self, model: Qwen3) -> list[Prunable]:
        """A key/value head stays or goes with all its query heads."""
        places = []
        for index, block in enumerate(model.blocks):
            at, rows = f"blocks.{index}", ("query", "key", "value")
            places.append(prunable.heads(block.attention, f"{at}.attention", model.shape.kv_heads, rows))
            places.append(prunable.swiglu_neurons(block.mlp, f"{at}.mlp"))
        return places

    def pruned_shape(self, shape: Qwen3Shape, kept: Callable[[str, int], int]) -> Qwen3Shape:
        groups = kept("heads", shape.kv_heads)
        heads = groups * (shape.heads // shape.kv_heads)
        return replace(shape, kv_heads=groups, heads=heads, mlp_width=kept("neurons", shape.mlp_width))

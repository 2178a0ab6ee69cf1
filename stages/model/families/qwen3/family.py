"""Qwen3, Qwen2, Llama and Mistral as one family: Hugging Face mapping, cost, what can be pruned (see ../family.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.model.families import hub_layout, prunable
from stages.model.families.family import DenseSource, Routing, Unsupported
from stages.model.families.prunable import Prunable
from stages.model.families.qwen3.model import Qwen3, Qwen3Shape
from stages.model.kernels.norm import NORM_EPSILON
from stages.model.layers import initialise
from stages.settings import shapes

_FIELDS = hub_layout.COMMON_FIELDS | {
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "kind": "model_type",
    "attention_bias": "attention_bias",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
_FIXED: dict[str, dict[str, Any]] = {  # what our arithmetic takes for granted
    "qwen3": {"use_sliding_window": False},
    "qwen2": {"use_sliding_window": False},
    "llama": {"mlp_bias": False},
    "mistral": {"sliding_window": None},
}
_ROPE_THETA = 10000.0  # of transformers, where config.json is silent
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}


class Qwen3Family:
    name = "qwen3"
    model_types: tuple[str, ...] = tuple(_ARCHITECTURES)
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
        if shape.kind not in _ARCHITECTURES:
            yield "kind", f"must be one of {', '.join(_ARCHITECTURES)}"
        if shape.attention_bias and shape.kind in ("qwen2", "mistral"):
            yield "attention_bias", f"must be false in a {shape.kind}"
        if shape.kind == "llama" and shape.width % shape.heads:  # transformers' own rule
            yield "heads", f"must divide width ({shape.width}) in a llama"

    def config_of(self, shape: Qwen3Shape) -> dict[str, Any]:
        config = hub_layout.config_fields(shape, _FIELDS)
        return config | {"architectures": [_ARCHITECTURES[shape.kind]]} | _FIXED[shape.kind]

    def shape_from(self, config: dict[str, Any], path: Path) -> Qwen3Shape:
        kind = config["model_type"]
        defaults = {"attention_bias": False, "tie_word_embeddings": False, "rms_norm_eps": NORM_EPSILON}
        given = defaults | {key: value for key, value in config.items() if value is not None}
        if kind != "qwen3":
            rope = config.get("rope_parameters")
            rope_theta = rope.get("rope_theta") if isinstance(rope, dict) else None
            given.setdefault("rope_theta", _ROPE_THETA if rope_theta is None else rope_theta)
            heads, width = given.get("num_attention_heads"), given.get("hidden_size")
            given.setdefault("num_key_value_heads", heads)
            if isinstance(heads, int) and isinstance(width, int) and heads > 0:
                given.setdefault("head_dim", width // heads)
        window, longest = given.get("sliding_window"), given.get("max_position_embeddings")
        if kind == "mistral" and isinstance(window, int) and isinstance(longest, int) and window >= longest:
            del given["sliding_window"]  # it hides nothing
        fixed = {"hidden_act": "silu"} | _FIXED[kind]
        shape = hub_layout.read_fields(Qwen3Shape, _FIELDS, fixed, given, path)
        layers = given.get("layer_types", [])
        if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
            raise Unsupported(f"{path}: layer_types has others than full_attention, which alone is supported")
        return shape

    def read(self, *_: Any) -> None:
        """Its folders are read by `from_hub`."""

    def to_hub(self, model: Qwen3) -> dict[str, Tensor]:
        return hub_layout.to_hub(model, _attention(model), hub_layout.same_weight, hub_layout.swiglu_to_hub)

    def from_hub(self, tensors: dict[str, Tensor], model: Qwen3) -> dict[str, Tensor]:
        return hub_layout.from_hub(
            tensors, model, _attention(model), hub_layout.same_weight, hub_layout.swiglu_from_hub
        )

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
        smaller = replace(shape, kv_heads=groups, heads=heads, mlp_width=kept("neurons", shape.mlp_width))
        if shape.kind == "llama" and not shape.attention_bias and shape.width % heads:
            return replace(smaller, kind="mistral")  # the same arithmetic, without transformers' rule that heads divide
        return smaller


def _attention(model: Qwen3) -> dict[str, str]:
    """Our names of the attention's modules, and theirs."""
    return _ATTENTION | (_HEAD_NORMS if model.shape.norms_heads else {})

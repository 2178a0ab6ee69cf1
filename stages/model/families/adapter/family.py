"""The families that transformers computes, as one family of ours (the Protocol is in ../family.py).

Cost and pruning read the modules of a model of the shape, which is built without memory for its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.model.families.adapter import dense, places, reading
from stages.model.families.adapter.model import AdapterModel, moe_of
from stages.model.families.adapter.shape import AdapterShape, config_of, shape_of
from stages.model.families.family import DenseSource, Routing
from stages.model.families.prunable import Prunable
from stages.settings.model_types import KNOWN


class AdapterFamily:
    name = "transformers"
    model_types: tuple[str, ...] = tuple(KNOWN)
    shape_type: type = AdapterShape
    dense_source: DenseSource | None = dense.Source()
    dense_target = False

    def build(self, shape: AdapterShape) -> AdapterModel:
        return AdapterModel(reading.empty(shape), shape)

    def initialise(self, model: AdapterModel, seed: int) -> None:
        """As the family's own class draws its weights."""
        reading.materialise(model.hub)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.hub.initialize_weights()
        model.hub.tie_weights()

    def broken_rules(self, shape: AdapterShape) -> Iterator[tuple[str, str]]:
        """None: transformers says itself what it cannot build."""
        return iter(())

    # ---- Hugging Face

    def config_of(self, shape: AdapterShape) -> dict[str, Any]:
        return config_of(shape)

    def shape_from(self, config: dict[str, Any], path: Path) -> AdapterShape:
        return shape_of(config, path)

    def read(self, folder: Path, shape: AdapterShape, recorded_sha256: str | None) -> AdapterModel:
        return AdapterModel(reading.read(folder, shape, recorded_sha256), shape)

    def to_hub(self, model: AdapterModel) -> dict[str, Tensor]:
        """As `save_pretrained` would name and lay them out."""
        return reading.on_disk(model.hub)

    def from_hub(self, tensors: dict[str, Tensor], model: AdapterModel) -> dict[str, Tensor]:
        raise NotImplementedError("transformers reads its own folders: use read")

    # ---- cost

    def flops_per_token(self, shape: AdapterShape, context_tokens: int) -> dict[str, float]:
        model, config = _empty(shape)
        parts = {"attention": 0.0, "mlp": 0.0, "experts": 0.0, "router": 0.0}
        for layer, block in enumerate(model.blocks):
            parts["attention"] += 2 * _weights(block.attention)
            parts["attention"] += _scores_per_key(config) * _keys(config, layer, context_tokens)
            moe = moe_of(block)
            if moe is None:
                parts["mlp"] += 2 * _weights(block.mlp)
                continue
            routed = moe.gate_up.numel() + moe.down.numel()
            parts["experts"] += 2 * routed / len(moe.down) * config.num_experts_per_tok
            parts["router"] += 2 * moe.router.weight.numel()
            parts["mlp"] += 2 * _weights(block.mlp)  # shared experts and their gate
        return {name: value for name, value in parts.items() if value} | {"head": 2 * model.head.weight.numel()}

    def active_parameters(self, model: AdapterModel) -> int:
        idle = 0
        for moe in filter(None, map(moe_of, model.blocks)):
            routed = sum(part.numel() for part in moe.experts.parameters())
            idle += routed // len(moe.down) * (len(moe.down) - model.hub.config.num_experts_per_tok)
        return sum(parameter.numel() for parameter in model.parameters()) - idle

    def routing(self, shape: AdapterShape) -> Routing | None:
        model, config = _empty(shape)
        moes = [moe for moe in map(moe_of, model.blocks) if moe is not None]
        if not moes:
            return None
        sigmoid = hasattr(moes[0].router, "e_score_correction_bias")
        return Routing("sigmoid" if sigmoid else "softmax", getattr(config, "routed_scaling_factor", 1.0))

    # ---- pruning

    def prunable(self, model: AdapterModel) -> list[Prunable]:
        return places.prunable(model)

    def pruned_shape(self, shape: AdapterShape, kept: Callable[[str, int], int]) -> AdapterShape:
        return places.pruned_shape(shape, _empty(shape)[0], kept)


@functools.lru_cache(maxsize=8)
def _empty(shape: AdapterShape) -> tuple[AdapterModel, Any]:
    """A model on the meta device, whose modules say what there is, and transformers' config of it."""
    model = AdapterModel(reading.empty(shape), shape)
    return model, model.hub.config


def _weights(module: nn.Module) -> int:
    """Of the matrices that meet every token; routers and experts hold theirs otherwise."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _scores_per_key(config: Any) -> float:
    """Operations of a token with one key before it: scores, and the mixing of values."""
    if getattr(config, "kv_lora_rank", None):
        return 2 * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 4 * config.num_attention_heads * places.head_dim(config)


def _keys(config: Any, layer: int, context_tokens: int) -> float:
    """How many keys a token sees, averaged over the positions of a context; a window shows only the last ones."""
    window: int = getattr(config, "sliding_window", None) or context_tokens
    types = getattr(config, "layer_types", None)
    slides = types[layer] == "sliding_attention" if types else True
    if not slides or window >= context_tokens:
        return (context_tokens + 1) / 2
    return (window * (window + 1) / 2 + (context_tokens - window) * window) / context_tokens

"""Rules that join the numbers of one model's shape: settings and models on disk are held against the same ones.

Each yields (field, rule) where a rule is broken; `prefix` stands before the name of another field in the text.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

Broken = Iterator[tuple[str, str]]


def too_small(shape: Any, may_be_zero: tuple[str, ...] = ()) -> Broken:
    """For shapes that do not come from settings, whose bounds are in the schema."""
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if not isinstance(value, (str, bool)) and not value >= (0 if field.name in may_be_zero else 1e-9):
            yield field.name, "is too small"


def deepseek_v3(shape: Any, prefix: str = "") -> Broken:
    if shape.experts_per_token > shape.experts:
        yield "experts_per_token", f"must be at most {prefix}experts ({shape.experts})"
    if shape.dense_layers > shape.layers:
        yield "dense_layers", f"must be at most {prefix}layers ({shape.layers})"
    if shape.rope_head_dim % 2:
        yield "rope_head_dim", "must be even: rotation works on pairs"


def qwen3(shape: Any, prefix: str = "") -> Broken:
    if shape.heads % shape.kv_heads:
        yield "heads", f"must be a multiple of {prefix}kv_heads ({shape.kv_heads})"
    if shape.head_dim % 2:
        yield "head_dim", "must be even: rotation works on pairs"

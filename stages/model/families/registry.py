"""The model families by name, by shape and by the `model_type` of a config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.files.artifacts import Refusal
from stages.model.families.deepseek_v3.family import DeepseekV3Family
from stages.model.families.family import Family
from stages.model.families.qwen3.family import Qwen3Family

FAMILIES: list[Family] = [DeepseekV3Family(), Qwen3Family()]


def family_of(shape: Any) -> Family:
    """The family whose models have shapes of this type."""
    for family in FAMILIES:
        if type(shape) is family.shape_type:
            return family
    raise TypeError(f"{type(shape).__name__} is the shape of no family: add its family to FAMILIES")


def family_of_type(model_type: Any, path: Path) -> Family:
    """The family that reads config.json files of this `model_type`; `path` is for the message."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(word for family in FAMILIES for word in family.model_types)
    raise Refusal(f"{path}: model_type {model_type!r} is not supported, only {known}")

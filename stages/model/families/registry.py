"""The model families by name, by shape and by the `model_type` of a config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.files.artifacts import Refusal
from stages.model.families.adapter.family import AdapterFamily
from stages.model.families.adapter.shape import MARK
from stages.model.families.deepseek_v3.family import DeepseekV3Family
from stages.model.families.family import Family, Unsupported
from stages.model.families.qwen3.family import Qwen3Family

FAMILIES: list[Family] = [DeepseekV3Family(), Qwen3Family(), AdapterFamily()]  # our own classes first: they are faster


def family_of(shape: Any) -> Family:
    """The family whose models have shapes of this type."""
    for family in FAMILIES:
        if type(shape) is family.shape_type:
            return family
    raise TypeError(f"{type(shape).__name__} is the shape of no family: add its family to FAMILIES")


def shape_of(config: dict[str, Any], path: Path) -> Any:
    """The shape that a config.json describes, of the first family that takes it; `path` is for messages.

    What our own classes wrote is read by them or refused: a field that was changed there is damage, no other family.
    """
    model_type = config.get("model_type")
    families = [family for family in FAMILIES if model_type in family.model_types]
    if not families:
        known = ", ".join(dict.fromkeys(word for family in FAMILIES for word in family.model_types))
        raise Refusal(f"{path}: model_type {model_type!r} is not supported, only {known}")
    if config.get(MARK):
        families = families[-1:]
    elif "weights_sha256" in config:
        families = families[:1]
    for family in families[:-1]:
        try:
            return family.shape_from(config, path)
        except Unsupported:
            continue
    return families[-1].shape_from(config, path)

"""The shape of a model that transformers computes: its config.json, read and written without transformers.

Only the families of stages/settings/model_types.py are taken. Their classes are transformers' own: nothing in a folder
is executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.files.artifacts import Refusal

MARK = "offramp_adapter"  # in a folder that we wrote: read by the adapter again, though an own class has its type
FIELDS = {  # ours -> the name in config.json, the same in all these families
    "vocab_size": "vocab_size",
    "sequence_tokens": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
}
# No part of the architecture: a padding token would keep a row of the embedding from learning, the rest names a folder.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_ONE_FOLDER = (
    *_TOKENS,
    "weights_sha256",
    "tokenizer_sha256",
    "config_sha256",
    "dtype",
    "transformers_version",
    MARK,
)
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with an entry for each layer


@dataclass(frozen=True)
class AdapterShape:
    """A config.json. The numbers stand beside it, and win over it, so that another depth is a `replace` away."""

    vocab_size: int
    sequence_tokens: int
    layers: int
    width: int
    config_json: str  # canonical, so that equal configs are equal shapes

    @property
    def rope_theta(self) -> float | None:
        """The base of the rotary angles; None where they are scaled, differ by layer, or are not for every layer."""
        config = json.loads(self.config_json)
        rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
        scaled = rope.get("rope_type", "default") != "default" or config.get("rope_scaling")
        every = all(config.get("no_rope_layers") or [1])
        return rope.get("rope_theta") if not scaled and every else None


def shape_of(config: dict[str, Any], path: Path) -> AdapterShape:
    """The shape that a config.json describes; what this adapter does not take is refused by name."""
    numbers = {}
    for ours, theirs in FIELDS.items():
        value = config.get(theirs)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refusal(f"{path}: {theirs} is {value!r}, expected a number from 1 on: restore the file")
        numbers[ours] = value
    rest = {key: value for key, value in config.items() if key not in _OF_ONE_FOLDER}
    return AdapterShape(**numbers, config_json=json.dumps(rest, sort_keys=True))


def config_of(shape: AdapterShape) -> dict[str, Any]:
    """The inverse. Lists by layer are repeated or cut to its depth."""
    config = json.loads(shape.config_json) | {theirs: getattr(shape, ours) for ours, theirs in FIELDS.items()}
    for key in _BY_LAYER:
        if by_layer := config.get(key):
            config[key] = [by_layer[layer % len(by_layer)] for layer in range(shape.layers)]
    return config | dict.fromkeys(_TOKENS) | {MARK: True}

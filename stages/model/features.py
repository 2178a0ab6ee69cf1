"""What a model's `features` returns: the last hidden state, the routings, and the hidden states that were asked for.

Shapes: B sequences, T tokens, D width.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from stages.model.experts import Routing


class Features(NamedTuple):
    x_BTD: Tensor  # after the final norm: what the head reads
    routings: list[Routing]  # of each MoE layer in order; empty where there is none
    hidden: dict[int, Tensor]  # layer -> [B, T, D], the residual stream after that block; of the named layers alone


def check_layers(asked: Collection[int], layers: int) -> None:
    """A layer that does not exist would give no hidden state, and a loss that lacks a term."""
    if wrong := [layer for layer in asked if layer not in range(layers)]:
        raise ValueError(f"layers {wrong}: this model's layers are 0 to {layers - 1}")

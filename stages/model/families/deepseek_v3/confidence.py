"""The number of experts per token by the router's confidence: the share of gate weight that gives a mean count.

    settle(model, mean_experts=3, batches)     # as many operations as three experts for every token

A token takes its heaviest experts until they hold `gate_mass` of its weight. One mass serves all layers.
Shapes: N tokens, K experts per token at most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stages.files.artifacts import Refusal
from stages.model.calibration import read_batches
from stages.model.experts import MoE, share_before

ROUNDS, HALVINGS = 3, 40  # a layer's gates depend on the counts in those before it: found anew with the mass in force


def settle(model: Any, mean_experts: float, batches: list[Tensor]) -> None:
    """Sets gate_mass by bisection, so that a token takes so many experts on average, and the mean that it measures.

    The count is over the tokens of `batches` [B, T+1] and all mixture layers. Refused outside [1, experts_per_token].
    """
    most = model.shape.experts_per_token
    if not 1 <= mean_experts <= most:
        raise Refusal(f"a mean of {mean_experts:g} experts per token is not from 1 to experts_per_token ({most})")
    mass = 1.0
    for _ in range(ROUNDS):
        mass = bisected(shares_before(model, batches), mean_experts)
        _set(model, mass, mean_experts)
    counted = (shares_before(model, batches) < mass).sum(dim=-1).double().mean().item()
    _set(model, mass, counted)


def bisected(before_NK: Tensor, mean_experts: float) -> float:
    """The mass below 1 at which the mean count is nearest from below: each token takes the experts before which less
    weight stands.
    """
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (before_NK < middle).sum(dim=-1).double().mean().item() <= mean_experts:
            low = middle
        else:
            high = middle
    return low


@torch.no_grad()
def shares_before(model: Any, batches: list[Tensor]) -> Tensor:
    """For each token of each mixture layer, and each of its K experts, the share of weight that heavier ones hold."""
    found: list[Tensor] = []

    def see(moe, inputs):
        x_ND = inputs[0].reshape(-1, inputs[0].shape[-1])
        found.append(share_before(moe.gates(x_ND).weight_NK).cpu())

    read_batches(model, batches, [moe.register_forward_pre_hook(see) for moe in mixtures(model)])
    return torch.cat(found)


def mixtures(model: Any) -> list[MoE]:
    """The mixture-of-experts layers in order."""
    return [block.mlp for block in model.blocks[model.shape.dense_layers :]]


def _set(model: Any, mass: float, mean_experts: float) -> None:
    model.shape = replace(model.shape, gate_mass=mass, mean_experts_per_token=max(1.0, mean_experts))
    for moe in mixtures(model):
        moe.gate_mass = mass

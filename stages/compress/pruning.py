"""Structured pruning: a smaller model made of the units that matter. Nothing is masked or zeroed: rows, columns and
whole experts leave the tensors.

    scores = importance(model, calibration_batches, {"heads": "taylor", "neurons": "contribution"})
    smaller = prune(model, {"heads": 0.75, "neurons": 0.6}, scores)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stages.files.artifacts import Refusal
from stages.model.families.prunable import Cut
from stages.model.families.registry import family_of
from stages.model.hub import empty_model

NEURON_MULTIPLE = 8  # which matrix units and grouped kernels want


@torch.no_grad()
def prune(
    model: Any, keep: Mapping[str, float], scores: Mapping[str, Tensor], neuron_multiple: int = NEURON_MULTIPLE
) -> Any:
    """A new model of the same family that keeps the most important share of each structure, all layers alike.

    `keep` has the share, in (0, 1], of each structure that shall shrink; `scores` is what `importance` gives. The
    neurons left of an MLP are a multiple of `neuron_multiple`, where there are twice as many.
    """
    family = family_of(model.shape)
    smaller = empty_model(pruned_shape(model.shape, keep, neuron_multiple))
    left = {place.name: place.units for place in family.prunable(smaller)}
    dense: dict[str, Tensor] = model.state_dict()
    state: dict[str, Tensor] = {}
    # the neurons inside experts before experts: their scores have a row for each expert of the dense model
    for place in sorted(family.prunable(model), key=lambda place: not place.stacked):
        index = most_important(scores[place.name], left[place.name])
        for cut in place.cuts:
            state[cut.tensor] = _selected(state.get(cut.tensor, dense[cut.tensor]), cut, place.units, index)
    # the dense model goes on living: nothing is shared
    state = {name: state[name] if name in state else part.clone() for name, part in dense.items()}
    smaller.load_state_dict(state, strict=True, assign=True)
    return smaller.requires_grad_().train(model.training)


def pruned_shape(shape: Any, keep: Mapping[str, float], neuron_multiple: int = NEURON_MULTIPLE) -> Any:
    """The shape that is left; a share that the family does not know is refused unless it keeps everything."""
    known = set()

    def kept(structure: str, total: int) -> int:
        known.add(structure)
        return _kept(structure, keep.get(structure, 1.0), total, neuron_multiple)

    family = family_of(shape)
    smaller = family.pruned_shape(shape, kept)
    for structure, share in keep.items():
        if structure not in known and share != 1:
            raise Refusal(f"keep_{structure} = {share}: a model of the family {family.name} has none: set it to 1")
    return smaller


def _kept(structure: str, share: float, total: int, neuron_multiple: int) -> int:
    if not 0 < share <= 1:
        raise Refusal(f"keep_{structure} = {share}: the share to keep must be above 0 and at most 1")
    count = max(1, int(share * total + 0.5))
    if structure != "neurons" or count < 2 * neuron_multiple or count == total:
        return count
    return min(total, (count + neuron_multiple // 2) // neuron_multiple * neuron_multiple)


def most_important(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last dimension, in their old order; among equals the first ones stay."""
    return score.sort(descending=True, stable=True).indices[..., :count].sort().values


def _selected(tensor: Tensor, cut: Cut, units: int, index: Tensor) -> Tensor:
    """The tensor with only the units of `index`: [U'], or [E, U'] with a row for each matrix of a stack."""
    index, view = index.to(tensor.device), tensor.unflatten(cut.dim, (cut.parts, units, -1))
    if index.dim() == 1:
        chosen = view.index_select(cut.dim + 1, index)
    else:
        chosen = torch.stack([one.index_select(cut.dim, row) for one, row in zip(view, index, strict=True)])
    return chosen.flatten(cut.dim, cut.dim + 2)

"""Pruning scores: which units of a model matter on calibration text. One function each, chosen by a word.

    scores = importance(model, calibration_batches, {"heads": "taylor", "neurons": "contribution", "experts": "reap"})

To add one: write the function, name it in `SCORES`, and its word in `SparsifyScore` of stages/settings/schema.py.

Shape legend: B sequences, T tokens, U units of one place, E experts, d size of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.files.artifacts import Refusal
from stages.model.calibration import read_batches
from stages.model.families.prunable import Prunable
from stages.model.families.registry import family_of

# Of a model, places of one kind and batches of tokens [B, T+1]: a score [U], or [E, U], for each place, float64 on the
# CPU. Only ratios inside one tensor mean anything. The model is in eval mode and is left as it was.
Score = Callable[[Any, list[Prunable], list[Tensor]], list[Tensor]]


def importance(model: Any, batches: Iterable[Tensor], words: Mapping[str, str]) -> dict[str, Tensor]:
    """The scores of every place in the model by its name; `words` has the score of each kind to be measured."""
    batches = list(batches)
    if not batches:
        raise Refusal("no calibration batch to measure importance on: raise sparsify.calibration_sequences")
    places = family_of(model.shape).prunable(model)
    found: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        for kind, word in words.items():
            of_kind = [place for place in places if place.kind == kind]
            scores = SCORES[kind][word](model, of_kind, batches) if of_kind else []
            found |= {place.name: score for place, score in zip(of_kind, scores, strict=True)}
    finally:
        model.train(was_training)
    return found


def taylor(model: Any, places: list[Prunable], batches: list[Tensor]) -> list[Tensor]:
    """|dL/dmask| summed over sequences, for a mask of ones on the output of each unit.

    The gradient of such a mask is sum(gradient * activation), the first-order change of the loss when the
    unit goes (Michel et al. 2019). The activation's norm alone was five times worse in our probe.
    """
    totals = [torch.zeros(place.units, dtype=torch.float64) for place in places]
    for tokens_BT1 in batches:
        tokens_BT1 = tokens_BT1.to(model.head.weight.device)
        for total_U, gradient_U in zip(totals, _mask_gradients(model, tokens_BT1, places), strict=True):
            total_U += gradient_U
    # gradients shrink and grow with depth: normalised, so that no one compares layers by accident
    return [total_U / total_U.norm().clamp(min=1e-30) for total_U in totals]


def _mask_gradients(model: Any, tokens_BT1: Tensor, places: list[Prunable]) -> list[Tensor]:
    tokens_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    shapes = [(len(tokens_BT), 1, place.units, 1) for place in places]
    masks = [torch.ones(shape, device=tokens_BT.device, requires_grad=True) for shape in shapes]
    hooks = [_mask_input(place.module, mask) for place, mask in zip(places, masks, strict=True)]
    try:
        with torch.enable_grad(), _frozen(model):
            logits_BTV = model(tokens_BT).float()
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss / targets_BT.shape[1], masks)
    finally:
        for hook in hooks:
            hook.remove()
    return [gradient.flatten(1).double().abs().sum(dim=0).cpu() for gradient in gradients]


def _mask_input(module: nn.Module, mask_B1U1: Tensor) -> Any:
    def multiply(_, inputs):
        x_BTUd = inputs[0].unflatten(-1, (mask_B1U1.shape[2], -1))
        return ((x_BTUd * mask_B1U1.to(x_BTUd.dtype)).flatten(-2),)

    return module.register_forward_pre_hook(multiply)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights without gradients for a while, so that the backward pass carries only what the masks need."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def contribution(model: Any, places: list[Prunable], batches: list[Tensor]) -> list[Tensor]:
    """The mean norm of what a unit adds to the residual stream, over the tokens that use it; 0 where none does.

    Of a neuron E|a_j| * ||W_down[:, j]||; of an expert E[g ||f(x)|| | chosen], which is REAP (Lasby et al. 2025).
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(place: Prunable) -> Any:
        def see(_, inputs):
            norms, tokens = place.output_norms(inputs[0])
            old_norms, old_tokens = sums.get(place.name, (0, 0))
            sums[place.name] = old_norms + norms, old_tokens + tokens

        return place.module.register_forward_pre_hook(see)

    read_batches(model, batches, [watch(place) for place in places])
    return [norms / tokens.clamp(min=1) for norms, tokens in (sums[place.name] for place in places)]


@torch.no_grad()
def magnitude(model: Any, places: list[Prunable], _: list[Tensor]) -> list[Tensor]:
    """The norm of all weights of a unit (Li et al. 2017, "Pruning Filters", there as a sum of sizes); needs no text."""
    weights, scores = dict(model.named_parameters()), []
    for place in places:
        squares: Any = 0
        for cut in place.cuts:
            if cut.tensor in weights:  # a buffer, as the router's bias, is no weight
                size = weights[cut.tensor].double().square().unflatten(cut.dim, (cut.parts, place.units, -1))
                stacked = {0} if place.stacked else set()
                squares = squares + size.sum(dim=[d for d in range(size.dim()) if d not in stacked | {cut.dim + 1}])
        scores.append(squares.sqrt().cpu())
    return scores


SCORES: dict[str, dict[str, Score]] = {
    "heads": {"taylor": taylor, "contribution": contribution, "magnitude": magnitude},
    "neurons": {"contribution": contribution, "magnitude": magnitude},
    "experts": {"reap": contribution, "magnitude": magnitude},
}

"""A student cut out of a dense teacher: layers, key/value heads and neurons leave until a budget of parameters is met.

    student, kept = cut_student(teacher, parameters_share=0.5, keep_layers=1.0, keep_heads=1.0, batches)

Layers go first, those that turn the residual stream least: 1 - cos of what enters and what leaves (ShortGPT, Men et al.
2024, arXiv 2403.03853). Heads and neurons follow by their scores on what is left; as many neurons stay as the budget
allows. Shapes: L layers, B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.compress.pruning import NEURON_MULTIPLE, most_important, prune, pruned_shape
from stages.compress.scores import importance
from stages.files.artifacts import Refusal
from stages.model.calibration import read_batches
from stages.model.families.registry import FAMILIES, family_of
from stages.model.hub import empty_model

SCORES = {"heads": "taylor", "neurons": "contribution"}


def cut_student(
    teacher: Any, parameters_share: float, keep_layers: float, keep_heads: float, batches: Iterable[Tensor]
) -> tuple[Any, dict]:
    """The smaller model of the teacher's own family, and what was kept of each structure.

    `batches` are calibration tokens [B, T+1]. A teacher that is no dense model of our classes, and a budget that the
    other parts alone exceed, are refused.
    """
    refuse_uncuttable(teacher)
    batches = list(batches)
    total, influence_L = parameters_of(teacher.shape), layer_influence(teacher, batches)
    layers = most_important(influence_L, max(1, round(keep_layers * len(influence_L)))).tolist()
    shorter = with_layers(teacher, layers)
    shares = {"heads": keep_heads, "neurons": neurons_share(shorter, keep_heads, parameters_share, total)}
    student = prune(shorter, shares, importance(shorter, batches, SCORES))
    places = family_of(student.shape).prunable(student)
    kept = {kind: next(place.units for place in places if place.kind == kind) for kind in shares}
    return student, {"layers": layers, **kept, "parameters_share": parameters_of(student.shape) / total}


def refuse_uncuttable(teacher: Any) -> None:
    family = family_of(teacher.shape)
    if not family.dense_target:
        known = ", ".join(word for each in FAMILIES if each.dense_target for word in each.model_types)
        raise Refusal(
            f"distill.init = pruned: no student is cut out of a {family.name} teacher, only out of a dense one"
            f" ({known}): set distill.init to teacher or random"
        )


def layer_influence(model: Any, batches: list[Tensor]) -> Tensor:
    """1 - cos of the residual stream before and after each block, mean over all tokens, float64 [L]."""
    total_L = torch.zeros(len(model.blocks), dtype=torch.float64)

    def watch(layer: int) -> Any:
        def see(_, inputs, outputs):
            cos_BT = F.cosine_similarity(inputs[0].double(), outputs[0].double(), dim=-1)
            total_L[layer] += (1 - cos_BT).sum().cpu()

        return model.blocks[layer].register_forward_hook(see)

    read_batches(model, batches, [watch(layer) for layer in range(len(model.blocks))])
    return total_L / max(sum(tokens_BT1[:, :-1].numel() for tokens_BT1 in batches), 1)


def with_layers(model: Any, layers: list[int]) -> Any:
    """A copy that has only these blocks, in this order."""
    shorter = empty_model(replace(model.shape, layers=len(layers)))
    dense = model.state_dict()
    state = {name: part.clone() for name, part in dense.items() if not name.startswith("blocks.")}
    for new, old in enumerate(layers):
        at = f"blocks.{old}."
        found = {name: part for name, part in dense.items() if name.startswith(at)}
        state |= {f"blocks.{new}.{name.removeprefix(at)}": part.clone() for name, part in found.items()}
    shorter.load_state_dict(state, strict=True, assign=True)
    return shorter.requires_grad_().train(model.training)


def neurons_share(model: Any, keep_heads: float, parameters_share: float, total: int) -> float:
    """The largest share of the neurons with which the model has at most so much of `total` parameters; multiples of
    eight stay."""
    budget = int(parameters_share * total)
    places = family_of(model.shape).prunable(model)
    neurons = next(place.units for place in places if place.kind == "neurons")

    def parameters(count: int) -> int:
        return parameters_of(pruned_shape(model.shape, {"heads": keep_heads, "neurons": count / neurons}))

    if parameters(neurons) <= budget:
        return 1.0
    few, many = 0, -(-neurons // NEURON_MULTIPLE)  # multiples that fit, and that do not
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if parameters(middle * NEURON_MULTIPLE) <= budget else (few, middle)
    if few == 0:
        least = parameters(min(NEURON_MULTIPLE, neurons))
        enough = math.ceil(1000 * least / total) / 1000
        raise Refusal(
            f"student.parameters_share: {budget:,} parameters are too few: with keep_layers and keep_heads as they are"
            f" and hardly a neuron the student has {least:,}: set it to {enough:g} or more,"
            " or lower the two (in params.yaml, student: {parameters_share: ...})"
        )
    return few * NEURON_MULTIPLE / neurons


def parameters_of(shape: Any) -> int:
    """Of a model of this shape; a tied head counts once."""
    return sum(parameter.numel() for parameter in empty_model(shape).parameters())

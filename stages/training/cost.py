"""What training costs in floating-point operations, by formula, so that the number is the same on every machine.

Forward passes by the formula of the family; a backward pass takes twice the operations of its forward pass (Kaplan et
al. 2020, "Scaling Laws for Neural Language Models", section 2.1); the matrix products of Muon. Not counted: elementwise
work, validation, and what a kernel computes again to save memory. A test holds a step against the operations it runs.
"""

from typing import Any

from stages.model.families.registry import family_of
from stages.training.optimizers import COEFFICIENTS, parameters_by_kind

FORWARD_AND_BACKWARD = 3  # forward passes


def forward_flops(shape: Any, tokens: int, sequence_tokens: int) -> float:
    """Of a forward pass over so many tokens, in sequences of `sequence_tokens`."""
    return sum(family_of(shape).flops_per_token(shape, sequence_tokens).values()) * tokens


def step_flops(model: Any, tokens: int, sequence_tokens: int, teacher: Any = None, optimizer: str = "muon") -> int:
    """Of an optimizer step over so many tokens; with a teacher, whose forward pass gives the soft targets.

    `optimizer` is the setting `optimizer.name`: AdamW multiplies no matrices.

    The weights of the models are not read: they may be on the meta device.
    """
    passes = FORWARD_AND_BACKWARD * forward_flops(model.shape, tokens, sequence_tokens)
    if teacher is not None:
        passes += forward_flops(teacher.shape, tokens, sequence_tokens)
    return round(passes) + (muon_flops(model) if optimizer == "muon" else 0)


def muon_flops(model: Any) -> int:
    """Of orthogonalising one update of each matrix [M, N]; with m the smaller side and n the larger one, an iteration
    takes the products m·n·m, m·m·m and m·m·n."""
    matrices, doubled, *_ = parameters_by_kind(model)
    total = 0
    for on_top, parameters in ((1, matrices), (2, doubled)):
        for parameter in parameters:
            m, n = sorted((parameter.shape[-2] // on_top, parameter.shape[-1]))
            total += parameter.numel() // (m * n) * 2 * (2 * m * m * n + m**3)
    return len(COEFFICIENTS) * total

"""What training costs in floating-point operations, by formula, so that the number is the same on every machine.

Forward passes by the formula of the family; a backward pass takes twice the operations of its forward pass (Kaplan et
al. 2020, "Scaling Laws for Neural Language Models", section 2.1); the matrix products of Muon. Not counted: elementwise
work, validation, and what a kernel computes again to save memory. A test holds a step against the operations it runs.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from stages.files.artifacts import Refusal, read_json
from stages.files.weight_files import CONFIG, WeightFiles
from stages.model.families.registry import family_of
from stages.model.hub import shape_from
from stages.model.layers import has_bfloat16
from stages.training.optimizers import COEFFICIENTS, parameters_by_kind

FORWARD_AND_BACKWARD = 3  # forward passes
TIMED_TOKENS, TIMED_WIDTH, TIMED_PRODUCTS = 512, 1024, 5  # of the matrix product that a speed is told from


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


# ---- before a model is loaded


def expectation(folder: Path, files: WeightFiles, sequence_tokens: int) -> str:
    """Memory and speed that the model of a folder will take, in words: from its headers, and from matrix products that
    are timed now, whose speed no forward pass exceeds."""
    try:
        flops = forward_flops(shape_from(read_json(folder / CONFIG), folder / CONFIG), 1, sequence_tokens)
    except Refusal:  # of none of our classes: loading it will say whether the adapter can
        flops = 2.0 * files.parameters
    speeds = {"float32": flops_per_second(torch.float32)}
    if has_bfloat16("cpu"):
        speeds["bfloat16"] = flops_per_second(torch.bfloat16)
    told = " and ".join(f"{speed / flops:,.0f} in {name}" for name, speed in speeds.items())
    return (
        f"{files.parameters:,} parameters, {files.bytes:,} bytes in memory and {files.largest_file_bytes:,} more while"
        f" loading; at most {told} tokens/s forward on a rank's processor, by matrix products of {TIMED_TOKENS} x"
        f" {TIMED_WIDTH} x {TIMED_WIDTH} timed now"
    )


def flops_per_second(dtype: torch.dtype) -> float:
    """Median of a few matrix products on this process's threads."""
    x, weight = torch.ones(TIMED_TOKENS, TIMED_WIDTH, dtype=dtype), torch.ones(TIMED_WIDTH, TIMED_WIDTH, dtype=dtype)
    seconds = []
    for _ in range(TIMED_PRODUCTS + 1):
        started = time.perf_counter()
        x @ weight
        seconds.append(time.perf_counter() - started)
    return 2 * TIMED_TOKENS * TIMED_WIDTH**2 / max(statistics.median(seconds[1:]), 1e-9)

"""What a forward pass costs: floating-point operations per token, by formula and by counting, and parameters.

Two independent methods that the tests hold equal: `flops_per_token` reads the shape of the model by the formula of its
family, and `counted_flops_per_token` watches the operations it really runs. A multiply-add is two operations. Attention
is counted where the causal mask allows it: position t sees t + 1 keys, (T + 1) / 2 on average over T.
Elementwise work (norms, rotations, activations) is in neither count.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.model.families.registry import family_of
from stages.model.operations import Counter


def flops_per_token(shape: Any, context_tokens: int) -> dict[str, float]:
    """Forward operations per token by part and in total, averaged over the positions of a context of so many tokens."""
    parts = family_of(shape).flops_per_token(shape, context_tokens)
    return {name: float(value) for name, value in parts.items()} | {"total": float(sum(parts.values()))}


@torch.no_grad()
def counted_flops_per_token(model: nn.Module, context_tokens: int) -> float:
    """Operations that a real forward pass over one context runs, per token."""
    device = next(model.parameters()).device
    tokens_BT = (torch.arange(context_tokens, device=device) % model.shape.vocab_size)[None]
    with Counter() as counter:
        model(tokens_BT)
    return counter.get_total_flops() / context_tokens


def total_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token uses: of the routed experts, only those that it is sent to."""
    return family_of(model.shape).active_parameters(model)


def interleaved_seconds(actions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, np.ndarray]:
    """Seconds of each action, one of each in turn, so that a busy moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repetition in range(repetitions + 1):
        for name, action in actions.items():
            _wait_for_device()
            start = time.perf_counter()
            action()
            _wait_for_device()
            if repetition:  # the first time warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_and_quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_quartile_low": float(low), f"{name}_quartile_high": float(high)}


def median_ratio(
    above: np.ndarray, below: np.ndarray, seed: int, resamples: int = 1000
) -> tuple[float, float, float]:
    """How many times longer `above` takes, with a 95% interval: the ratio of each repetition, done in turn, counts.

    What slows a repetition slows both: the ratio of the medians has an interval a third wider here.
    """
    ratios = above / below
    generator = np.random.Generator(np.random.PCG64(seed))
    resampled = np.median(generator.choice(ratios, size=(resamples, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)

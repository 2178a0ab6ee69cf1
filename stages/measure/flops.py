"""What a forward pass costs: floating-point operations per token, by formula and by counting, and parameters.

Two independent methods that the tests hold equal: `flops_per_token` reads the shape of the model by the formula of its
family, and `counted_flops_per_token` watches the operations it really runs. A multiply-add is two operations. Attention
is counted where the causal mask allows it: position t sees t + 1 keys, (T + 1) / 2 on average over T.
Elementwise work (norms, rotations, activations) is in neither count.

Letters: B sequences, H heads, S queries, T keys, d query and key head, v value head.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.model.families.registry import family_of

aten = torch.ops.aten


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


class Counter(FlopCounterMode):
    """torch's counter, corrected where it is wrong (2.13): zero for attention on CPU and for grouped matmul,
    and the whole square where attention is causal."""

    def __init__(self):
        mapping = {kernel: _attention_formula(kernel, 0, products=2) for kernel in ATTENTION_FORWARD}
        # Backward: scores once more, then the gradients of values, scores, queries and keys.
        mapping |= {kernel: _attention_formula(kernel, 1, products=5) for kernel in ATTENTION_BACKWARD}
        mapping |= {operation: _grouped_matmul for operation in GROUPED_MATMUL}
        super().__init__(display=False, custom_mapping=mapping)


def _named(*names: str) -> list:
    return [getattr(aten, name) for name in names if hasattr(aten, name)]


ATTENTION_FORWARD = _named(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
ATTENTION_BACKWARD = _named(
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)
GROUPED_MATMUL = _named("_grouped_mm")


def _attention_formula(kernel, queries_at: int, products: int):
    """Operations of an attention kernel: two products forward (scores, mixed values), five backward.

    Queries [B, H, S, d], keys [B, G, T, d], values [B, G, T, v]; where `is_causal` stands differs by kernel.
    """
    causal_at = [argument.name for argument in kernel.default._schema.arguments].index("is_causal")

    def formula(*shapes, out_shape=None, **named) -> int:
        (B, H, S, d), (_, _, T, _), (_, _, _, v) = shapes[queries_at : queries_at + 3]
        causal = named.get("is_causal", shapes[causal_at] if len(shapes) > causal_at else False)
        pairs = S * (S + 1) // 2 if causal and S == T else S * T
        return B * H * pairs * (d + v) * products

    return formula


def _grouped_matmul(a, b, *rest, out_shape=None, **named) -> int:
    """Rows of `a` meet their group's matrix in `b`; in the backward pass groups lie along the inner side."""
    if len(a) == 3 and len(b) == 2:
        return 2 * a[1] * a[2] * b[1]
    return 2 * math.prod(a) * b[-1]


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

"""Floating-point operations of training and what share of the chip's peak they reach. FLOPs are counted, not timed."""

from typing import Any

Number = Any  # a float, or a quantity with a unit


def training_flops_per_token(
    active_parameters: float, layers: int, width: int, sequence_tokens: int, causal: bool = True
) -> float:
    """Forward and backward FLOPs of one token: 6 N + 12 L d s, half of the second where attention is causal.

    `active_parameters` are those that one token passes through. Sources: Kaplan et al. 2020 (arXiv 2001.08361), 6 N;
    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B, attention. Recomputation is not counted: this is model
    FLOPs, the numerator of MFU. MegaScale and llm-foundry count attention in full (causal=False).
    """
    attention = 12 * layers * width * sequence_tokens
    return 6 * active_parameters + (attention / 2 if causal else attention)


def model_flops_utilization(
    tokens_per_second_per_chip: Number, flops_per_token: Number, peak_flops_per_second: Number
) -> Number:
    """Share of the peak that useful FLOPs reach (PaLM, arXiv 2204.02311, appendix B)."""
    return tokens_per_second_per_chip * flops_per_token / peak_flops_per_second


def compute_seconds(
    tokens: Number, flops_per_token: Number, peak_flops_per_second: Number, utilization: float
) -> Number:
    """Seconds that one chip needs for the tokens when it reaches this share of its peak."""
    return tokens * flops_per_token / (peak_flops_per_second * utilization)


def routed_parameters(total_parameters: float, active_parameters: float, experts: int, experts_per_token: int) -> float:
    """Parameters of all routed experts, from what is published: R with total = D + R and active = D + R k / E."""
    return (total_parameters - active_parameters) / (1 - experts_per_token / experts)

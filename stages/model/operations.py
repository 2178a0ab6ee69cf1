"""Floating-point operations that a piece of code really runs, counted as it runs. A multiply-add is two.

Letters: B sequences, H heads, S queries, T keys, d query and key head, v value head.
"""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


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

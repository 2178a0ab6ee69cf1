"""Causal attention of the last T of S positions.

Shapes: B sequences, H heads, T queries, S keys, d width of a query or key head, v width of a value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.model.kernels.dispatch import Operation

causal_attention = Operation("causal_attention")


def whole_sequence_in_bfloat16_on_cpu(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSv: Tensor, scale: float, seen_S: Tensor | None
) -> bool:
    queries, keys = query_BHTd.shape[-2], key_BHSd.shape[-2]
    return query_BHTd.device.type == "cpu" and query_BHTd.dtype == torch.bfloat16 and queries == keys > 1


@causal_attention.kernel(when=whole_sequence_in_bfloat16_on_cpu)
def blockwise(
    query_BHTd: Tensor, key_BHTd: Tensor, value_BHTv: Tensor, scale: float, seen_S: Tensor | None
) -> Tensor:
    return BlockwiseAttention.apply(query_BHTd, key_BHTd, value_BHTv, scale)


@causal_attention.kernel()
def fused(query_BHTd: Tensor, key_BHSd: Tensor, value_BHSv: Tensor, scale: float, seen_S: Tensor | None) -> Tensor:
    """PyTorch's kernels, which need key and value heads of one size: the narrower is padded with zeros, which
    changes neither scores nor values.
    """
    queries, keys = query_BHTd.shape[-2], key_BHSd.shape[-2]
    key_dim, value_dim = key_BHSd.shape[-1], value_BHSv.shape[-1]
    if value_dim < key_dim:
        value_BHSv = F.pad(value_BHSv, (0, key_dim - value_dim))
    elif value_dim > key_dim:
        pad = (0, value_dim - key_dim)
        query_BHTd, key_BHSd = F.pad(query_BHTd, pad), F.pad(key_BHSd, pad)
    mask = None if seen_S is None else seen_S.unsqueeze(0)
    if 1 < queries < keys:  # a chunk that continues a cache
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query_BHTd.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        query_BHTd, key_BHSd, value_BHSv, attn_mask=mask, is_causal=1 < queries == keys, scale=scale
    )
    return out[..., :value_dim]


class BlockwiseAttention(torch.autograd.Function):
    """Causal self-attention, a block of queries at a time against the keys up to its end -> [B, H, T, v].

    For bfloat16 on CPU, where PyTorch's fused kernel takes twice as long (its backward most of it). The shares
    are computed again for backward, so only the inputs are kept: less than the fused kernel keeps.
    """

    @staticmethod
    def forward(ctx, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTv: Tensor, scale: float) -> Tensor:
        query, key, value = (part.flatten(0, 1) for part in (query_BHTd, key_BHTd, value_BHTv))
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        out = torch.empty_like(value)
        for start, end in query_blocks(query):
            out[:, start:end] = causal_shares(query, key, start, end, scale) @ value[:, :end]
        return out.view(value_BHTv.shape)

    @staticmethod
    def backward(ctx, grad_BHTv: Tensor) -> tuple:
        query, key, value = ctx.saved_tensors
        grad = grad_BHTv.flatten(0, 1)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start, end in query_blocks(query):
            share, grad_out = causal_shares(query, key, start, end, ctx.scale), grad[:, start:end]
            grad_value[:, :end] += share.mT @ grad_out
            grad_score = torch._softmax_backward_data(grad_out @ value[:, :end].mT, share, -1, share.dtype)
            grad_query[:, start:end] = (grad_score @ key[:, :end]).mul_(ctx.scale)
            grad_key[:, :end].add_(grad_score.mT @ query[:, start:end], alpha=ctx.scale)
        shape = grad_BHTv.shape[:2]
        return *(part.unflatten(0, shape) for part in (grad_query, grad_key, grad_value)), None


def query_blocks(query_GTd: Tensor, block: int = 128) -> list[tuple[int, int]]:
    """First and one-past-last query of each block: smaller ones skip more of the masked half, larger ones call less."""
    tokens = query_GTd.shape[1]
    return [(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def causal_shares(query_GTd: Tensor, key_GTd: Tensor, start: int, end: int, scale: float) -> Tensor:
    """What each query from start to end gives to each key before end, G = B*H -> [G, end - start, end]."""
    mask = torch.zeros(end - start, end, dtype=query_GTd.dtype)
    mask[:, start:].fill_(-torch.inf).triu_(1)
    return torch.baddbmm(mask, query_GTd[:, start:end], key_GTd[:, :end].mT, alpha=scale).softmax(dim=-1)

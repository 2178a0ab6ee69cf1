"""The parts that teacher and student share: RMSNorm, rotary positions, SwiGLU, attention, the decode cache.

Shape legend: B sequences, T tokens of a sequence, N = B*T, D width, F width inside an MLP, H heads,
R rotated dimensions of a head, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6  # what DeepSeek-V3 and Qwen3 use; their latent and head norms have it fixed in code
INIT_STD = 0.02
EMBEDDING_STD = 0.1  # what blocks add early in training would drown a smaller one (tuned: LOG.md)
FEW_NUMBERS = 1 << 14  # as in decoding: up to so many an operation of PyTorch takes less time than calling it

Rope = tuple[Tensor, Tensor]  # cosines and sines, each [T, R/2]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in float32 whatever autocast says."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.numel() < FEW_NUMBERS:  # has a kernel of its own, or is over before ours has begun
            return F.rms_norm(x.float(), self.weight.shape, self.weight, NORM_EPSILON)
        return FewPassRMSNorm.apply(x.float(), self.weight)


class FewPassRMSNorm(torch.autograd.Function):
    """On CPU `F.rms_norm` is a chain of small operations, each a pass over memory; this takes a third of its time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(NORM_EPSILON).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse_rms)
        return (x * inverse_rms).mul_(weight_D)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_D, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        grad_normed = grad * normed
        grad_weight_D = grad_normed.flatten(0, -2).sum(0)
        along = (grad_normed @ weight_D).unsqueeze(-1).div_(x.shape[-1])
        grad_x = (grad * weight_D).addcmul_(normed, along, value=-1).mul_(inverse_rms)
        return grad_x, grad_weight_D


def for_matmuls(x: Tensor) -> Tensor:
    """x in autocast's dtype, once: left alone, autocast casts it anew for each matmul that reads it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """For one of two on CPU: where passes are short, each waits longer for the second than that saves.

    Where there are more, which was not measured, all take part.
    """
    if device.type != "cpu" or torch.get_num_threads() != 2:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(2)


def has_bfloat16(device_type: str) -> bool:
    """Do the device's matrix units take bfloat16? Where they do not, it is emulated and slow."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_compile() -> bool:
    """Triton makes the GPU's kernels, and needs a C compiler for what starts them."""
    compilers = os.environ.get("CC", "gcc"), "gcc", "clang"
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


def rope_table(start: int | Tensor, tokens: int, rotated: int, theta: float, device: torch.device | None) -> Rope:
    """Cosines and sines of positions start..start+tokens; computed each forward: no buffer to go stale."""
    frequency_R = theta ** -(torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated)
    position_T = start + torch.arange(tokens, dtype=torch.float32, device=device)
    angle_TR = torch.outer(position_T, frequency_R)
    return angle_TR.cos(), angle_TR.sin()


def rotate(x_BTHR: Tensor, rope: Rope) -> Tensor:
    """Turns the pair (i, i + R/2) of each head by its position's angle (Su et al. 2021, half-split)."""
    cos_T1R, sin_T1R = (part.unsqueeze(1).to(x_BTHR.dtype) for part in rope)
    first, second = x_BTHR.chunk(2, dim=-1)
    return torch.cat([first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R], dim=-1)


def gated_silu(h_M2F: Tensor) -> Tensor:
    """silu(gate) * up of h = [gate, up]."""
    gate, up = h_M2F.chunk(2, dim=-1)
    if h_M2F.device.type != "cpu":  # torch 2.11 compiles a Function with an output written in place wrongly: gradient 0
        return F.silu(gate) * up
    return F.silu(gate).mul_(up)


class GatedSilu(torch.autograd.Function):
    """The same. Keeps only h for backward; plain autograd keeps twice as much."""

    @staticmethod
    def forward(ctx, h_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(h_N2F)
        return gated_silu(h_N2F)

    @staticmethod
    def backward(ctx, grad_NF: Tensor) -> Tensor:
        (h_N2F,) = ctx.saved_tensors
        return gated_silu_backward(grad_NF, h_N2F, F.silu(h_N2F.chunk(2, dim=-1)[0]))


def gated_silu_backward(grad_NF: Tensor, h_N2F: Tensor, silu_NF: Tensor) -> Tensor:
    gate, up = h_N2F.chunk(2, dim=-1)
    if h_N2F.device.type != "cpu":  # the compiler writes both halves in one pass, and traces no out=
        return torch.cat([torch.ops.aten.silu_backward(grad_NF * up, gate), grad_NF * silu_NF], dim=-1)
    grad_N2F = torch.empty_like(h_N2F)
    grad_gate, grad_up = grad_N2F.chunk(2, dim=-1)
    torch.mul(grad_NF, silu_NF, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_NF * up, gate, grad_input=grad_gate)
    return grad_N2F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix, gate rows first."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(GatedSilu.apply(self.gate_up(x)))


def attend(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSv: Tensor, scale: float, seen_S: Tensor | None = None
) -> Tensor:
    """Causal attention of the last T of S positions -> [B, H, T, v]; where `seen_S` is given, of one to those.

    PyTorch's fused kernels need key and value heads of one size: the narrower is padded with zeros, which
    changes neither scores nor values.
    """
    queries, keys = query_BHTd.shape[-2], key_BHSd.shape[-2]
    if query_BHTd.device.type == "cpu" and query_BHTd.dtype == torch.bfloat16 and queries == keys > 1:
        return BlockwiseAttention.apply(query_BHTd, key_BHSd, value_BHSv, scale)
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


class LayerCache:
    """What decoding keeps of one layer: buffers [B, capacity, ...], filled up to `length`."""

    seen_S: Tensor | None = None  # which of the positions that `append` returns are filled; None: all

    def __init__(self, *buffers: Tensor):
        self.buffers = buffers
        self.length: int | Tensor = 0

    def grow(self, tokens: int) -> None:
        capacity = self.buffers[0].shape[1]
        if self.length + tokens > capacity:
            raise ValueError(f"the cache holds {capacity} tokens; {self.length + tokens} were fed to it")
        self.length += tokens

    def append(self, *new: Tensor) -> list[Tensor]:
        """Writes the new positions and returns every position so far."""
        start = self.length
        self.grow(new[0].shape[1])
        for buffer, part in zip(self.buffers, new, strict=True):
            buffer[:, start : self.length] = part
        return [buffer[:, : self.length] for buffer in self.buffers]


class GraphLayerCache(LayerCache):
    """The buffers of another as a CUDA graph sees them, where no shape may change from one replay to the next.

    `length` is a number in the device's memory; one token is written there, and every position is returned.
    """

    def __init__(self, cache: LayerCache, length: Tensor, seen_S: Tensor):
        super().__init__(*cache.buffers)
        self.length, self.place_1, self.seen_S = length, length.view(1), seen_S

    def append(self, *new: Tensor) -> list[Tensor]:
        for buffer, part in zip(self.buffers, new, strict=True):
            buffer.index_copy_(1, self.place_1, part.to(buffer.dtype))
        return list(self.buffers)


def past_tokens(cache: list[LayerCache] | None) -> int | Tensor:
    return cache[0].length if cache else 0


def initialise(model: nn.Module, layers: int, seed: int) -> None:
    """Normal weights of std 0.02, 0.1 in the embedding; matrices that write to the residual stream are scaled by
    1/sqrt(2 layers).

    The scale keeps the residual stream's variance independent of depth (GPT-2). The generator is the model's
    own, so the weights depend on the seed (and the kind of device) alone and nobody else's random numbers are used up.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # norms
                continue
            residual = ".output." in name or name.removesuffix(".weight").endswith(".down")
            std = EMBEDDING_STD if name.startswith("embedding") else INIT_STD
            parameter.normal_(0.0, std / ((2 * layers) ** 0.5 if residual else 1.0), generator=generator)
        for buffer in model.buffers():
            buffer.zero_()

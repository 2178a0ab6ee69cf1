"""The parts that teacher and student share: RMSNorm, rotary positions, SwiGLU, attention, the decode cache.

Shape legend: B sequences, T tokens of a sequence, N = B*T, D width, F width inside an MLP, H heads,
R rotated dimensions of a head, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor, nn

from stages.model.kernels.attention import causal_attention
from stages.model.kernels.gated import GatedSilu
from stages.model.kernels.norm import NORM_EPSILON, rms_norm

INIT_STD = 0.02
EMBEDDING_STD = 0.1  # what blocks add early in training would drown a smaller one (tuned: LOG.md)

Rope = tuple[Tensor, Tensor]  # cosines and sines, each [T, R/2]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in float32 whatever autocast says."""

    def __init__(self, width: int, epsilon: float = NORM_EPSILON):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight, self.epsilon)


def for_matmuls(x: Tensor) -> Tensor:
    """x in autocast's dtype, once: left alone, autocast casts it anew for each matmul that reads it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
    """Causal attention of the last T of S positions -> [B, H, T, v]; where `seen_S` is given, of one to those."""
    return causal_attention(query_BHTd, key_BHSd, value_BHSv, scale, seen_S)


class LayerCache:
    """What decoding keeps of one layer: buffers [B, capacity, ...], filled up to `length`."""

    seen_S: Tensor | None = None  # which of the positions that `append` returns are filled; None: all
    graphs = True  # its buffers stay where they are: a CUDA graph may read them

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
    tied = "head.weight" not in dict(model.named_parameters())  # logits of such an embedding would start too large
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)  # the others are norms
                continue
            residual = ".output." in name or name.removesuffix(".weight").endswith(".down")
            std = EMBEDDING_STD if name.startswith("embedding") and not tied else INIT_STD
            parameter.normal_(0.0, std / ((2 * layers) ** 0.5 if residual else 1.0), generator=generator)
        for buffer in model.buffers():
            buffer.zero_()

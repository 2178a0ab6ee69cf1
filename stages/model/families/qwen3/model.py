"""Qwen3, a dense transformer that any runtime can serve and the student of `distill`, and its near relations.

Decoder-only, pre-norm, grouped-query attention, rotary positions, SwiGLU. Qwen3 norms the heads of queries and keys;
Llama and Mistral do not; Qwen2 does not either, and adds biases to queries, keys and values.

Shape legend: B sequences, T tokens, D width, H query heads, G key/value heads, d head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stages.model.features import Features, check_layers
from stages.model.kernels.norm import NORM_EPSILON
from stages.model.layers import (
    LayerCache,
    RMSNorm,
    Rope,
    SwiGLU,
    attend,
    for_matmuls,
    past_tokens,
    rope_table,
    rotate,
)


@dataclass(frozen=True)
class Qwen3Shape:
    """Everything that fixes the model's tensors; after pruning heads * head_dim may differ from width."""

    vocab_size: int
    sequence_tokens: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    kind: str = "qwen3"  # qwen3 | qwen2 | llama | mistral: `model_type` in config.json
    attention_bias: bool = False  # of all four matrices of the attention
    tied: bool = False  # the head is the embedding
    norm_epsilon: float = NORM_EPSILON

    @property
    def norms_heads(self) -> bool:
        return self.kind == "qwen3"

    @property
    def adds_input_biases(self) -> bool:
        """To queries, keys and values."""
        return self.attention_bias or self.kind == "qwen2"


class GroupedQueryAttention(nn.Module):
    def __init__(self, shape: Qwen3Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        bias = shape.adds_input_biases
        self.query = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=bias)
        self.key = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=bias)
        self.value = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=bias)
        self.output = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=shape.attention_bias)
        self.norms_heads = shape.norms_heads
        if self.norms_heads:
            self.query_norm = RMSNorm(shape.head_dim, shape.norm_epsilon)
            self.key_norm = RMSNorm(shape.head_dim, shape.norm_epsilon)

    def forward(self, x_BTD: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        x_BTD = for_matmuls(x_BTD)
        query_BTHd = self.query(x_BTD).view(B, T, self.heads, self.head_dim)
        key_BTGd = self.key(x_BTD).view(B, T, self.kv_heads, self.head_dim)
        value_BTGd = self.value(x_BTD).view(B, T, self.kv_heads, self.head_dim)
        if self.norms_heads:  # back to the projection's dtype: norms work in float32, attention in what autocast chose
            query_BTHd = self.query_norm(query_BTHd).to(value_BTGd.dtype)
            key_BTGd = self.key_norm(key_BTGd).to(value_BTGd.dtype)
        query_BTHd, key_BTGd = rotate(query_BTHd, rope), rotate(key_BTGd, rope)
        if cache is not None:
            key_BTGd, value_BTGd = (part.to(query_BTHd.dtype) for part in cache.append(key_BTGd, value_BTGd))
        per_group = self.heads // self.kv_heads
        if per_group > 1:
            key_BTGd = key_BTGd.repeat_interleave(per_group, dim=2)
            value_BTGd = value_BTGd.repeat_interleave(per_group, dim=2)
        query, key, value = (part.transpose(1, 2) for part in (query_BTHd, key_BTGd, value_BTGd))
        out_BHTd = attend(query, key, value, self.head_dim**-0.5, cache.seen_S if cache else None)
        return self.output(out_BHTd.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class Block(nn.Module):
    def __init__(self, shape: Qwen3Shape):
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, shape.norm_epsilon)
        self.attention = GroupedQueryAttention(shape)
        self.mlp_norm = RMSNorm(shape.width, shape.norm_epsilon)
        self.mlp = SwiGLU(shape.width, shape.mlp_width)

    def forward(self, x_BTD: Tensor, rope: Rope, cache: LayerCache | None = None) -> tuple[Tensor, None]:
        """The second value stands where a mixture's block has its routing: callers treat both alike."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), None


class Qwen3(nn.Module):
    def __init__(self, shape: Qwen3Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_epsilon)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.shape.tied:
            self.head.weight = self.embedding.weight

    def load_state_dict(self, *args: Any, **how: Any) -> Any:
        """With `assign=True` each of two names would get a matrix of its own."""
        result = super().load_state_dict(*args, **how)
        self._tie()
        return result

    def _apply(self, *args: Any, **how: Any) -> Any:
        """Likewise where weights leave the meta device."""
        super()._apply(*args, **how)
        self._tie()
        return self

    def features(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, layers: Collection[int] = ()
    ) -> Features:
        """Hidden state after the final norm, no routings, and the hidden states of `layers`."""
        check_layers(layers, len(self.blocks))
        x_BTD = self.embedding(tokens_BT)
        rope = rope_table(
            past_tokens(cache), tokens_BT.shape[1], self.shape.head_dim, self.shape.rope_theta, x_BTD.device
        )
        hidden = {}
        for layer, block in enumerate(self.blocks):
            x_BTD, _ = block(x_BTD, rope, cache[layer] if cache else None)
            if layer in layers:
                hidden[layer] = x_BTD
        return Features(self.norm(x_BTD), [], hidden)

    def forward(self, tokens_BT: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        return self.head(self.features(tokens_BT, cache).x_BTD)

    def new_cache(self, batch: int, tokens: int) -> list[LayerCache]:
        size = (batch, tokens, self.shape.kv_heads, self.shape.head_dim)
        weight = self.head.weight
        return [LayerCache(weight.new_zeros(size), weight.new_zeros(size)) for _ in self.blocks]

    def balance(self, loads: list[Tensor], rate: float) -> None:
        """A dense model has no experts to balance."""

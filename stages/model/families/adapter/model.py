"""A causal LM of transformers behind our `Model` Protocol: same class, same arithmetic, our names for its parts.

Shape legend: B sequences, T tokens, N = B*T, D width, K experts per token, E experts, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.experts import Routing, balanced_bias
from stages.model.families.adapter.shape import AdapterShape
from stages.model.features import Features, check_layers
from stages.model.kernels.routing import loads
from stages.model.layers import LayerCache
from stages.model.operations import GROUPED_MATMUL

OURS = {"embed_tokens": "embedding", "layers": "blocks"}  # transformers' name -> ours; what is not here keeps its own


@dataclass(frozen=True)
class LogitMap:
    """What a family makes of its head's products: cap * tanh(z / divisor / cap)."""

    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.divisor != 1:
            z = z / self.divisor
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative, from what the map gave."""
        if self.cap is None:
            return torch.full_like(logits, 1 / self.divisor)
        return (1 - (logits / self.cap).square()) / self.divisor


class Head(nn.Module):
    """Logits. `weight` alone gives them only where `after` is None."""

    def __init__(self, lm_head: nn.Linear, after: LogitMap | None):
        super().__init__()
        self.lm_head, self.after = lm_head, after

    @property
    def weight(self) -> Tensor:
        return self.lm_head.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.lm_head(x)
        return z if self.after is None else self.after(z)


class AdapterCache(LayerCache):
    """One layer of transformers' cache; all layers of a model stand in one."""

    graphs = False  # it grows by concatenation, which no CUDA graph can replay

    def __init__(self, whole: Any, layer: int):
        self.whole, self.layer = whole, layer

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.whole.get_seq_length(self.layer)

    @length.setter
    def length(self, tokens: int) -> None:
        surplus = self.length - tokens
        if surplus > 0:
            self.whole.layers[self.layer].crop(-surplus)


class Chosen(NamedTuple):
    """The routing of tokens, as the hook on `experts` sees it whatever the router does."""

    weight_NK: Tensor
    expert_index_NK: Tensor


class Mixture:
    """The parts of a mixture of experts that the warm start and pruning read, as those of our own `MoE`."""

    def __init__(self, block: nn.Module):
        self.block, self.experts = block, block.experts
        self.router = block.gate if hasattr(block, "gate") else block.router
        self.router_name = "gate" if hasattr(block, "gate") else "router"
        self.gate_up, self.down = self.experts.gate_up_proj, self.experts.down_proj  # [E, 2F, D] and [E, D, F]

    def gates(self, x_ND: Tensor) -> Chosen:
        found: list[Chosen] = []
        hook = self.experts.register_forward_pre_hook(lambda _, inputs: found.append(Chosen(inputs[2], inputs[1])))
        try:
            self.block.forward(x_ND[None])  # not a call: the hook that asks watches this block
        finally:
            hook.remove()
        return found[0]

    @property
    def shared_name(self) -> str | None:
        names = [name for name in ("shared_experts", "shared_expert") if hasattr(self.block, name)]
        return names[0] if names else None

    def shared_gate(self, x_ND: Tensor) -> Tensor:
        """The mean share of the shared expert's output that is added: 1 but in Qwen2-MoE."""
        if not hasattr(self.block, "shared_expert_gate"):
            return x_ND.new_ones(len(x_ND))
        return F.sigmoid(self.block.shared_expert_gate(x_ND)).squeeze(-1)


def moe_of(block: nn.Module) -> Mixture | None:
    """The mixture of experts of a block; None where its MLP is dense."""
    return Mixture(block.mlp) if hasattr(block.mlp, "experts") else None


class AdapterModel(nn.Module):
    """The parts stand here under our names; `hub` is the whole as transformers calls it, and owns nothing else."""

    compiles = False  # never tried

    def __init__(self, hub: Any, shape: AdapterShape):
        super().__init__()
        self.shape = shape
        self.__dict__["hub"] = hub  # not a submodule: its parts are, and no tensor has two names
        for name, part in hub.model.named_children():
            self.add_module(OURS.get(name, name), part)
        config = hub.config
        after = LogitMap(getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None))
        self.head = Head(hub.lm_head, None if after == LogitMap() else after)
        # What transformers' code writes over, so that activation checkpointing cannot keep it: some routers divide what
        # topk gave, and GPT-OSS adds biases to its experts' products.
        self.changed_in_place = frozenset(
            operation.default
            for operation in (torch.ops.aten.topk, *(GROUPED_MATMUL if config.model_type == "gpt_oss" else ()))
        )
        self.__dict__["seen"] = None  # the routings of the forward pass in progress
        for block in self.blocks:
            _name_parts(block)
            if (moe := moe_of(block)) is not None:
                moe.experts.register_forward_pre_hook(self._see)

    def _see(self, experts: nn.Module, inputs: tuple) -> None:
        if self.seen is None and not torch.is_grad_enabled():
            return
        # A block that is recomputed for its gradient must do what it did, but its load is not counted again.
        routing = _routing(inputs[1], inputs[2], len(experts.down_proj))
        if self.seen is not None:
            self.seen.append(routing)

    def features(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, layers: Collection[int] = ()
    ) -> Features:
        """Hidden state after the final norm, the routing of each MoE layer, and the hidden states of `layers`."""
        check_layers(layers, len(self.blocks))
        hidden: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            return lambda _, __, out: hidden.update({layer: out[0] if isinstance(out, tuple) else out})

        hooks = [self.blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        whole = cache[0].whole if cache else None  # type: ignore[attr-defined]
        self.__dict__["seen"] = []
        try:
            x_BTD = self.hub.model(tokens_BT, past_key_values=whole, use_cache=whole is not None).last_hidden_state
            return Features(x_BTD, self.seen, hidden)
        finally:
            self.__dict__["seen"] = None
            for hook in hooks:
                hook.remove()

    def forward(self, tokens_BT: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        return self.head(self.features(tokens_BT, cache).x_BTD)

    def new_cache(self, batch: int, tokens: int) -> list[LayerCache]:
        from transformers import DynamicCache

        whole = DynamicCache()  # without the config: a sliding window's cache could not forget tokens
        return [AdapterCache(whole, layer) for layer in range(len(self.blocks))]

    @torch.no_grad()
    def balance(self, loads: list[Tensor], rate: float) -> None:
        """The biases of DeepSeek-V3 and GLM-4-MoE; the other families' routers have none."""
        moes = [moe for moe in map(moe_of, self.blocks) if moe is not None]
        for moe, load_E in zip(moes, loads, strict=True):
            if (bias := getattr(moe.router, "e_score_correction_bias", None)) is not None:
                bias.copy_(balanced_bias(bias, load_E.to(bias.device), rate))

    def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
        result = super().load_state_dict(*arguments, **named)
        self.hub.tie_weights()  # assigned tensors are no longer one
        return result


def _name_parts(block: nn.Module) -> None:
    """Our names for the parts of a block, beside its own and not in its state dict."""
    names = {"attention": "self_attn", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if hasattr(block, "pre_feedforward_layernorm"):
        names["mlp_norm"] = "pre_feedforward_layernorm"
    if hasattr(block, "block_sparse_moe"):
        names["mlp"] = "block_sparse_moe"
    if not hasattr(block, "input_layernorm"):  # OLMo-2 norms what a part gives, not what it reads
        names |= {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
    for ours, theirs in names.items():
        block.__dict__[ours] = getattr(block, theirs)


def _routing(index_NK: Tensor, weight_NK: Tensor, experts: int) -> Routing:
    """The balance loss is that of GShard over the chosen experts' gates, as transformers' routers keep no others."""
    load_E = loads(index_NK, experts)[0]
    balance = None
    if torch.is_grad_enabled():
        gate_NK = weight_NK.float() / (weight_NK.float().sum(dim=-1, keepdim=True) + 1e-20)
        share_E = torch.zeros_like(load_E).index_add(0, index_NK.flatten(), gate_NK.flatten()) / len(index_NK)
        balance = (load_E / load_E.mean() * share_E).sum()
    return Routing(index_NK, load_E, balance)

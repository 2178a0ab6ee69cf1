"""What can be pruned in a model that transformers computes: heads, neurons of MLPs and experts, experts.

Shape legend: N tokens, U units, D width, d head, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from stages.files.artifacts import Refusal
from stages.model.families import prunable as parts
from stages.model.families.adapter.model import AdapterModel, Mixture, moe_of
from stages.model.families.adapter.shape import AdapterShape
from stages.model.families.prunable import Cut, Prunable
from stages.settings.model_types import KNOWN

EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")  # names in config.json, by family
LATENT_ROWS = ("q_proj", "q_b_proj", "kv_b_proj")
GROUPED_ROWS = ("q_proj", "k_proj", "v_proj")


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def head_units(config: Any) -> int:
    """A key/value head stays or goes with all its query heads; the latent of DeepSeek is shared by all heads."""
    return config.num_attention_heads if getattr(config, "kv_lora_rank", None) else config.num_key_value_heads


def prunable(model: AdapterModel) -> list[Prunable]:
    config, places = model.hub.config, []
    for index, block in enumerate(model.blocks):
        at = f"blocks.{index}"
        places.append(_heads(block.attention, f"{at}.self_attn", f"{at}.attention.heads", config))
        moe = moe_of(block)
        name = "block_sparse_moe" if hasattr(block, "block_sparse_moe") else "mlp"
        if moe is None:
            places.append(_neurons(block.mlp, f"{at}.mlp"))
            continue
        if config.model_type == "gpt_oss":
            continue
        if moe.shared_name:
            places.append(_neurons(getattr(moe.block, moe.shared_name), f"{at}.mlp.{moe.shared_name}"))
        places += _experts(moe, f"{at}.{name}")
    return places


def _heads(attention: nn.Module, at: str, name: str, config: Any) -> Prunable:
    units, cuts = head_units(config), [Cut(f"{at}.o_proj.weight", 1)]
    for row in LATENT_ROWS if getattr(config, "kv_lora_rank", None) else GROUPED_ROWS:
        if (linear := getattr(attention, row, None)) is not None:
            cuts.append(Cut(f"{at}.{row}.weight", 0))
            if linear.bias is not None:
                cuts.append(Cut(f"{at}.{row}.bias", 0))
    if hasattr(attention, "sinks"):
        cuts.append(Cut(f"{at}.sinks", 0))
    return Prunable("heads", name, units, attention.o_proj, tuple(cuts), parts.head_norms(attention.o_proj, units))


def _neurons(mlp: nn.Module, at: str) -> Prunable:
    cuts = [Cut(f"{at}.down_proj.weight", 1)]
    for row in ("gate_proj", "up_proj"):
        cuts.append(Cut(f"{at}.{row}.weight", 0))
        if getattr(mlp, row).bias is not None:
            cuts.append(Cut(f"{at}.{row}.bias", 0))
    down = mlp.down_proj
    return Prunable("neurons", f"{at}.neurons", down.in_features, down, tuple(cuts), parts.neuron_norms(down))


def _experts(moe: Mixture, at: str) -> list[Prunable]:
    stacks = (f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj")
    inside = Cut(stacks[0], 1, parts=2), Cut(stacks[1], 2)
    rows = [*stacks, f"{at}.{moe.router_name}.weight"]
    if hasattr(moe.router, "e_score_correction_bias"):
        rows.append(f"{at}.{moe.router_name}.e_score_correction_bias")
    experts, _, neurons = moe.down.shape
    return [
        Prunable(
            "neurons", f"{at}.experts.neurons", neurons, moe.block, inside, parts.expert_neuron_norms(moe), stacked=True
        ),
        Prunable(
            "experts",
            f"{at}.experts",
            experts,
            moe.block,
            tuple(Cut(name, 0) for name in rows),
            parts.expert_norms(moe),
        ),
    ]


def pruned_shape(shape: AdapterShape, model: AdapterModel, kept: Callable[[str, int], int]) -> AdapterShape:
    """The config of what is left; `model` has the shape, without weights."""
    config = model.hub.config
    values: dict[str, Any] = {}
    heads, units = config.num_attention_heads, head_units(config)
    if (groups := kept("heads", units)) != units:
        if _norms_all_heads(model.blocks[0].attention, config):
            raise Refusal(f"keep_heads: {KNOWN[config.model_type]} norms the queries and keys of all heads together, so"
                          " that one that leaves would change the others: set keep_heads to 1")  # fmt: skip
        values["num_attention_heads"] = groups * (heads // units)
        values["num_key_value_heads"] = groups
        if not getattr(config, "kv_lora_rank", None):
            values["head_dim"] = head_dim(config)  # no longer width / heads
    moes = [moe for moe in map(moe_of, model.blocks) if moe is not None]
    if config.model_type == "gpt_oss":
        _refuse_gpt_oss(kept)
    else:
        values |= _neuron_counts(config, len(moes) < len(model.blocks), bool(moes), kept)
        if moes:
            values |= _expert_counts(config, len(moes[0].down), kept)
    return _changed(shape, {name: value for name, value in values.items() if value != getattr(config, name, None)})


def _norms_all_heads(attention: nn.Module, config: Any) -> bool:
    """As OLMo does; Qwen3 norms each head by itself."""
    norm = getattr(attention, "q_norm", None)
    return norm is not None and len(norm.weight) > head_dim(config)


def _refuse_gpt_oss(kept: Callable[[str, int], int]) -> None:
    for structure, total in (("neurons", 1000), ("experts", 1000), ("experts_per_token", 1000)):
        if kept(structure, total) != total:
            raise Refusal(
                f"keep_{structure}: GPT-OSS is not pruned there, as its experts have biases and a clamped (up + 1)"
                f" gate, of which the scores know nothing: set keep_{structure} to 1"
            )


def _neuron_counts(config: Any, some_dense: bool, some_moe: bool, kept: Callable[[str, int], int]) -> dict[str, int]:
    """The widths of MLPs by their names in config.json. DeepSeek's shared experts are as wide as a routed one each."""
    names = ["moe_intermediate_size"] if some_moe and hasattr(config, "moe_intermediate_size") else []
    if some_dense or not names:
        names.append("intermediate_size")
    if some_moe and getattr(config, "shared_expert_intermediate_size", None):
        names.append("shared_expert_intermediate_size")
    return {name: kept("neurons", getattr(config, name)) for name in names}


def _expert_counts(config: Any, experts: int, kept: Callable[[str, int], int]) -> dict[str, int]:
    left = kept("experts", experts)
    if left != experts and (getattr(config, "n_group", None) or 1) > 1:
        raise Refusal(f"keep_experts: this {KNOWN[config.model_type]} chooses among {config.n_group} groups of equally"
                      " many experts, which pruning would leave uneven: set keep_experts to 1")  # fmt: skip
    if getattr(config, "topk_group", None):
        left = max(left, min(2, experts))  # its router adds up the two best experts of a group
    name = next(name for name in EXPERT_COUNTS if name in config.to_dict())
    per_token = kept("experts_per_token", config.num_experts_per_tok)
    return {name: left, "num_experts_per_tok": min(per_token, left)}


def _changed(shape: AdapterShape, values: dict[str, Any]) -> AdapterShape:
    config = json.loads(shape.config_json) | values
    return AdapterShape(**{**vars(shape), "config_json": json.dumps(config, sort_keys=True)})

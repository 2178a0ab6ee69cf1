"""Structured pruning: which heads, neurons and experts matter on calibration text, and a smaller model made
of those that do. Nothing is masked or zeroed: rows, columns and whole experts leave the tensors.

    scores = importance(model, calibration_batches)
    smaller = prune(model, Keep(keep_heads=0.75, keep_neurons=0.6), scores)

Shape legend: B sequences, T tokens, N = B*T, M tokens of one expert, D width, H heads, G key/value groups,
U prunable attention units (the teacher's heads, the student's groups), F neurons of an MLP, E experts,
K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.files.artifacts import Refusal
from stages.model.experts import MoE
from stages.model.layers import SwiGLU
from stages.model.student import Student, StudentShape
from stages.model.teacher import Teacher, TeacherShape


@dataclass(frozen=True)
class Keep:
    """Shares to keep, each in (0, 1]. A student has no experts: the last two mean nothing to it."""

    keep_heads: float = 1.0
    keep_neurons: float = 1.0
    keep_experts: float = 1.0
    keep_experts_per_token: float = 1.0


@dataclass(frozen=True)
class Importance:
    """One entry per block, float64 on the CPU; only ratios inside one tensor mean anything."""

    heads: list[Tensor]  # teacher [H]; student [G]: a group stays or goes with all its query heads
    neurons: list[dict[str, Tensor]]  # "mlp" or "shared": [F]; "experts": [E, F]
    experts: list[Tensor | None]  # [E]; None in a dense block


# ---- what matters ------------------------------------------------------------------------------------------


def importance(model: Teacher | Student, batches: Iterable[Tensor]) -> Importance:
    """Importance of every structure over batches of tokens [B, T+1]; the model is left as it was."""
    heads = [torch.zeros(attention_units(model.shape), dtype=torch.float64) for _ in model.blocks]
    meters = [_Meter(block.mlp) for block in model.blocks]
    was_training, sequences = model.training, 0
    model.eval()
    try:
        for tokens_BT1 in batches:
            tokens_BT1 = tokens_BT1.to(model.embedding.weight.device)
            for total_U, taylor_U in zip(heads, _head_taylor(model, tokens_BT1, meters), strict=True):
                total_U += taylor_U
            sequences += len(tokens_BT1)
    finally:
        model.train(was_training)
    if not sequences:
        raise Refusal("no calibration batch to measure importance on: raise sparsify.calibration_sequences")
    return Importance(
        # gradients shrink and grow with depth: normalised, so that no one compares layers by accident
        heads=[total_U / total_U.norm().clamp(min=1e-30) for total_U in heads],
        neurons=[meter.neurons() for meter in meters],
        experts=[meter.experts() for meter in meters],
    )


def attention_units(shape: TeacherShape | StudentShape) -> int:
    return shape.heads if isinstance(shape, TeacherShape) else shape.kv_heads


def _head_taylor(model: Teacher | Student, tokens_BT1: Tensor, meters: list[_Meter]) -> list[Tensor]:
    """Per block, |dL/dmask| summed over sequences, for a mask of ones on the output of each unit.

    The gradient of such a mask is sum(gradient * activation), the first-order change of the loss when the
    unit goes (Michel et al. 2019). The activation's norm alone was five times worse in our probe.
    """
    tokens_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    mask_shape = (len(tokens_BT), 1, attention_units(model.shape), 1)
    masks = [torch.ones(mask_shape, device=tokens_BT.device, requires_grad=True) for _ in model.blocks]
    hooks = [_masked(block.attention.output, mask) for block, mask in zip(model.blocks, masks, strict=True)]
    hooks += [hook for meter in meters for hook in meter.hooks()]
    try:
        with torch.enable_grad(), _frozen(model):
            logits_BTV = model(tokens_BT).float()
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss / targets_BT.shape[1], masks)
    finally:
        for hook in hooks:
            hook.remove()
    return [gradient.flatten(1).double().abs().sum(dim=0).cpu() for gradient in gradients]


def _masked(output: nn.Linear, mask_B1U1: Tensor):
    def multiply(_, inputs):
        x_BTUd = inputs[0].unflatten(-1, (mask_B1U1.shape[2], -1))
        return ((x_BTUd * mask_B1U1.to(x_BTUd.dtype)).flatten(-2),)

    return output.register_forward_pre_hook(multiply)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights without gradients for a while, so that the backward pass carries only what the masks need."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class ExpertSums(NamedTuple):
    """Sums over the tokens that chose each expert, float64. The gates g are the model's own, bias and all."""

    tokens_E: Tensor
    gate_E: Tensor  # g, route_scale included
    output_E: Tensor  # g * ||f(x)||
    activation_EF: Tensor  # |a|
    gated_activation_EF: Tensor  # g * |a|


@torch.no_grad()
def expert_sums(moe: MoE, x_ND: Tensor) -> ExpertSums:
    gates = moe.gates(x_ND)
    x_ND = x_ND.float()
    rows = []
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(moe.gate_up, moe.down, strict=True)):
        token_M, choice_M = (gates.expert_index_NK == expert).nonzero(as_tuple=True)
        gate_MF, up_MF = F.linear(x_ND[token_M], gate_up_2FD.float()).chunk(2, dim=-1)
        a_MF = F.silu(gate_MF) * up_MF
        output_M = F.linear(a_MF, down_DF.float()).norm(dim=-1)
        g_M, a_MF = gates.weight_NK[token_M, choice_M].double(), a_MF.double().abs()
        tokens = torch.tensor(len(token_M), dtype=torch.float64)
        rows.append((tokens, g_M.sum(), g_M @ output_M.double(), a_MF.sum(dim=0), g_M @ a_MF))
    return ExpertSums(*(torch.stack([part.cpu() for part in column]) for column in zip(*rows, strict=True)))


def column_norms(down: Tensor) -> Tensor:
    """||W_down[:, j]||: [F] of one MLP's [D, F], or [E, F] of the experts' [E, D, F]."""
    return down.detach().double().cpu().norm(dim=-2)


class _Meter:
    """Collects, over the tokens that one block's MLP sees, what neuron and expert importance are made of."""

    def __init__(self, mlp: SwiGLU | MoE):
        self.moe = mlp if isinstance(mlp, MoE) else None
        dense = {"mlp": mlp} if self.moe is None else {"shared": self.moe.shared}
        self.dense = {name: part for name, part in dense.items() if part is not None}
        self.activation = {k: torch.zeros(v.down.in_features).double() for k, v in self.dense.items()}
        self.tokens = 0
        self.routed: ExpertSums | None = None

    def hooks(self) -> list:
        found = [v.down.register_forward_pre_hook(self._see_dense(k)) for k, v in self.dense.items()]
        if self.moe is not None:
            found.append(self.moe.register_forward_pre_hook(self._see_routed))
        return found

    def _see_dense(self, name: str):
        def see(_, inputs):
            a_NF = inputs[0].detach().flatten(0, -2)
            self.activation[name] += a_NF.double().abs().sum(dim=0).cpu()
            self.tokens += len(a_NF)

        return see

    def _see_routed(self, moe: MoE, inputs) -> None:
        new = expert_sums(moe, inputs[0].detach().flatten(0, -2))
        old = self.routed
        self.routed = new if old is None else ExpertSums(*(a + b for a, b in zip(old, new, strict=True)))

    def neurons(self) -> dict[str, Tensor]:
        """E|a_j| * ||W_down[:, j]||: how much a neuron adds to the residual stream where it is used."""
        found = {
            name: self.activation[name] / max(self.tokens, 1) * column_norms(part.down.weight)
            for name, part in self.dense.items()
        }
        if self.moe is not None and self.routed is not None:
            mean_EF = self.routed.activation_EF / self.routed.tokens_E.clamp(min=1)[:, None]
            found["experts"] = mean_EF * column_norms(self.moe.down)
        return found

    def experts(self) -> Tensor | None:
        """REAP: E[g ||f(x)|| | chosen] (Lasby et al. 2025). An expert that nobody chose has 0."""
        return None if self.routed is None else self.routed.output_E / self.routed.tokens_E.clamp(min=1)


# ---- a smaller model ---------------------------------------------------------------------------------------


@torch.no_grad()
def prune(model: Teacher | Student, keep: Keep, scores: Importance) -> Teacher | Student:
    """A new model of the same class that keeps the most important share of each structure, all layers alike.

    `keep` is a Keep or any object with the fields that concern this model (a student: heads and neurons).
    """
    shape = pruned_shape(model.shape, keep)
    state = {}
    for name, part in model.state_dict().items():
        if not name.startswith("blocks."):
            state[name] = part.clone()  # the dense model goes on living: nothing is shared
    for index, block in enumerate(model.blocks):
        units = most_important(scores.heads[index], attention_units(shape))
        parts = {f"attention.{k}": v for k, v in _fewer_heads(block.attention, units, model.shape).items()}
        parts |= {f"mlp.{k}": v for k, v in _smaller_mlp(block.mlp, scores, index, shape).items()}
        for name in ("attention_norm.weight", "mlp_norm.weight"):
            parts[name] = block.get_parameter(name).clone()
        state |= {f"blocks.{index}.{name}": part for name, part in parts.items()}
    with torch.device("meta"):  # no memory and no random numbers for weights that are overwritten
        smaller = Teacher(shape) if isinstance(shape, TeacherShape) else Student(shape)
    smaller.load_state_dict(state, strict=True, assign=True)
    return smaller.requires_grad_().train(model.training)


def pruned_shape(shape: TeacherShape | StudentShape, keep: Keep) -> TeacherShape | StudentShape:
    units = _kept("keep_heads", keep.keep_heads, attention_units(shape))
    if isinstance(shape, StudentShape):
        width = _kept_neurons(keep.keep_neurons, shape.mlp_width)
        return replace(shape, kv_heads=units, heads=units * (shape.heads // shape.kv_heads), mlp_width=width)
    experts = _kept("keep_experts", keep.keep_experts, shape.experts)
    chosen = _kept("keep_experts_per_token", keep.keep_experts_per_token, shape.experts_per_token)
    return replace(
        shape,
        heads=units,
        dense_width=_kept_neurons(keep.keep_neurons, shape.dense_width),
        expert_width=_kept_neurons(keep.keep_neurons, shape.expert_width),  # the shared experts' too
        experts=experts,
        experts_per_token=min(chosen, experts),
    )


def most_important(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, in their old order; among equals the first ones stay."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def _kept(name: str, share: float, total: int) -> int:
    if not 0 < share <= 1:
        raise Refusal(f"{name} = {share}: the share to keep must be above 0 and at most 1")
    return max(1, int(share * total + 0.5))


def _kept_neurons(share: float, width: int) -> int:
    """A multiple of 8 from 16 on, which matrix units and grouped kernels want."""
    count = _kept("keep_neurons", share, width)
    return count if count < 16 or count == width else min(width, (count + 4) // 8 * 8)


def _fewer_heads(attention: nn.Module, units_U: Tensor, shape) -> dict[str, Tensor]:
    """The teacher's latent is shared by all heads and stays whole; of the student, whole groups go."""
    total = attention_units(shape)
    by_rows = ("query", "latent_up") if isinstance(shape, TeacherShape) else ("query", "key", "value")
    state = {}
    for name, part in attention.state_dict().items():
        units = units_U.to(part.device)
        if name.removesuffix(".weight") in by_rows:
            state[name] = part.unflatten(0, (total, -1))[units].flatten(0, 1)
        elif name == "output.weight":
            state[name] = part.unflatten(1, (total, -1))[:, units].flatten(1, 2)
        else:
            state[name] = part.clone()
    return state


def _smaller_mlp(mlp: SwiGLU | MoE, scores: Importance, index: int, shape) -> dict[str, Tensor]:
    neurons = scores.neurons[index]
    if isinstance(mlp, SwiGLU):
        width = shape.dense_width if isinstance(shape, TeacherShape) else shape.mlp_width
        return _fewer_neurons(mlp, most_important(neurons["mlp"], width))
    state = {}
    if mlp.shared is not None:
        kept_F = most_important(neurons["shared"], shape.shared_experts * shape.expert_width)
        state = {f"shared.{name}": part for name, part in _fewer_neurons(mlp.shared, kept_F).items()}
    experts_E = most_important(scores.experts[index], shape.experts).tolist()
    gate_up, down = [], []
    for expert in experts_E:
        kept_F = most_important(neurons["experts"][expert], shape.expert_width).to(mlp.down.device)
        gate_up.append(mlp.gate_up[expert].unflatten(0, (2, -1))[:, kept_F].flatten(0, 1))
        down.append(mlp.down[expert][:, kept_F])
    state |= {"gate_up": torch.stack(gate_up), "down": torch.stack(down)}
    return state | {"router_weight": mlp.router_weight[experts_E], "bias": mlp.bias[experts_E]}


def _fewer_neurons(mlp: SwiGLU, kept_F: Tensor) -> dict[str, Tensor]:
    kept_F = kept_F.to(mlp.down.weight.device)
    return {
        "gate_up.weight": mlp.gate_up.weight.unflatten(0, (2, -1))[:, kept_F].flatten(0, 1),
        "down.weight": mlp.down.weight[:, kept_F],
    }

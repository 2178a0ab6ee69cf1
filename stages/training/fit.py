"""What a training stage asks of its ranks: fits, one after another, each a model, an objective and a recipe.

Plain torch, no Lightning here: stages build `Fit`s, `stages.training.rank` runs them under the Lightning Trainer.
Shapes: B sequences, T tokens, N = B*T, E experts.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.model.divergences import DIVERGENCES
from stages.model.layers import can_compile
from stages.model.losses import DistillationLoss, after_head, next_token

VALIDATION_BATCH = 8  # sequences that a rank validates on at a time


@dataclass
class Outcome:
    """One forward pass: the loss to descend, its parts to log, and the load [E] of every MoE layer."""

    loss: Tensor
    parts: dict[str, Tensor]
    loads: list[Tensor] = field(default_factory=list)


Objective = Callable[[nn.Module, Tensor], Outcome]


@dataclass
class Fit:
    """One training run. `out` is the folder, relative to the place, that receives the model."""

    name: str
    model: nn.Module
    objective: Objective
    steps: int
    batch_sequences: int  # of all ranks together
    learning_rate_scale: float
    validate_every_steps: int
    validation_sequences: int
    out: str
    bias_update_rate: float = 0.0  # of the auxiliary-loss-free balancing (MoE only)
    finish: Callable[[nn.Module], None] = lambda model: None  # settles what the trained model is saved with
    notes: dict = field(default_factory=dict)  # figures known before the fit, kept with its results
    prepared_flops: int = 0  # operations before the first step: calibration, warm start
    unknown_before: bool = False  # it was trained elsewhere, for what nobody here knows


def split_targets(tokens_BT1: Tensor) -> tuple[Tensor, Tensor]:
    return tokens_BT1[:, :-1], tokens_BT1[:, 1:].reshape(-1)


class NextToken:
    """Cross-entropy on the data, plus the weighted balance loss of a mixture of experts."""

    def __init__(self, balance_loss_weight: float = 0.0):
        self.balance_loss_weight = balance_loss_weight

    def __call__(self, model: nn.Module, tokens_BT1: Tensor) -> Outcome:
        inputs_BT, targets_N = split_targets(tokens_BT1)
        x_BTD, routings, _ = model.features(inputs_BT)
        cross_entropy = next_token(x_BTD.flatten(0, 1), model.head.weight, targets_N, after=after_head(model))
        loss, parts = add_balance_loss(cross_entropy, routings, self.balance_loss_weight)
        return Outcome(loss, {"cross_entropy": cross_entropy.detach()} | parts, [r.load_E for r in routings])


class Distillation:
    """Soft targets of a frozen teacher at a temperature, mixed with cross-entropy on the data.

    The balance loss of a mixture of experts is shown, and no part of the loss.
    """

    def __init__(
        self, teacher: nn.Module, divergence: str, temperature: float, soft_weight: float, chunk_tokens: int
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.loss = DistillationLoss(DIVERGENCES[divergence], temperature, soft_weight, chunk_tokens)

    def __call__(self, model: nn.Module, tokens_BT1: Tensor) -> Outcome:
        inputs_BT, targets_N = split_targets(tokens_BT1)
        with torch.no_grad():
            teacher_x_ND = self.teacher.features(inputs_BT).x_BTD.flatten(0, 1)
        x_BTD, routings, _ = model.features(inputs_BT)
        heads = model.head.weight, teacher_x_ND, self.teacher.head.weight
        loss, parts = self.loss(
            x_BTD.flatten(0, 1), *heads, targets_N, after_head(model), after_head(self.teacher)
        )
        if routings:
            parts["balance_loss"] = mean_balance_loss(routings).detach()
        return Outcome(loss, parts, [r.load_E for r in routings])


def add_balance_loss(loss: Tensor, routings: list, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    if not routings:
        return loss, {}
    balance_loss = mean_balance_loss(routings)
    return loss + weight * balance_loss, {"balance_loss": balance_loss.detach()}


def mean_balance_loss(routings: list) -> Tensor:
    return torch.stack([r.balance_loss for r in routings]).mean()


def compile_blocks(model: nn.Module) -> None:
    """Fuses what lies between a block's matrix products, for GPUs: a third of a step, for half a minute once.

    One graph for all blocks of a kind, compiled when they first run.
    """
    if can_compile() and getattr(model, "compiles", True):
        for block in model.blocks:
            block.compile(dynamic=False)


def settle_cublas_workspaces() -> None:
    """Gives cuBLAS fixed workspaces, in which it sums in one order; before anything else is computed on the GPU.

    CUBLAS_WORKSPACE_CONFIG is set for this call only: PyTorch's deterministic algorithms demand to see it once. Left
    there it is parsed anew, by a regular expression, for each matrix product, which takes longer than launching it.
    The workspaces stay fixed without it: PyTorch hands each cuBLAS handle one of its own.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    square = torch.zeros(16, 16, device="cuda")
    square @ square
    torch.use_deterministic_algorithms(before)
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]


@torch.no_grad()
def validation_nats(model: nn.Module, batches: list[Tensor], loads: list[list[Tensor]] | None = None) -> Tensor:
    """Sum of next-token losses in nats over the batches [B, T+1], as a float64 scalar.

    `loads`, where it is given, receives the load [E] of every MoE layer, batch by batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for tokens_BT1 in batches:
        inputs_BT, targets_N = split_targets(tokens_BT1.to(model.head.weight.device))
        x_BTD, routings, _ = model.features(inputs_BT)
        if loads is not None:
            loads.append([routing.load_E for routing in routings])
        nats = next_token(x_BTD.flatten(0, 1), model.head.weight, targets_N, after=after_head(model))
        total += nats.double().cpu() * targets_N.numel()
    return total


def limited(sequences: int, ranks: int, limit: int | float) -> int:
    """How many of the sequences to validate on `trainer.limit_val_batches` leaves: batches of each rank, or a share."""
    batches = math.ceil(math.ceil(sequences / ranks) / VALIDATION_BATCH)
    kept = limit if isinstance(limit, int) else max(1, int(batches * limit))
    return min(sequences, kept * VALIDATION_BATCH * ranks)


def max_violation(load_E: Tensor) -> float:
    """Largest load over the mean load, minus one; 0 is perfect balance (Wang et al. 2024, MaxVio)."""
    return (load_E.max() / load_E.mean() - 1).item()

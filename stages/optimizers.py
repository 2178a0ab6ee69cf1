"""Muon for matrices, AdamW for the rest, and the schedule both follow.

`torch.optim.Muon` takes single matrices; the routed experts of a layer are a stack of them, so `StackedMuon`
does the same arithmetic on [..., M, N] with one batched matrix product per iteration.
"""

import math

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of Muon (Jordan et al. 2024), as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(update_SMN: Tensor, iterations: int = 5) -> Tensor:
    """U V^T of each matrix of the stack, approximately, by Newton-Schulz in bfloat16."""
    x = update_SMN.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """Muon on parameters [M, N] or stacks [..., M, N]; each matrix of a stack is orthogonalised by itself."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                rows, columns = p.shape[-2:]
                update = orthogonalise(update.view(-1, rows, columns)).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def make_optimizers(model: nn.Module, settings, learning_rate_scale: float) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW]: hidden matrices to Muon; embedding, head, router, norms to AdamW, without decay on vectors."""
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif name.startswith(("embedding", "head")) or "router" in name:
            others.append(p)
        else:
            matrices.append(p)
    muon = StackedMuon(
        matrices, settings.muon_learning_rate * learning_rate_scale, settings.muon_momentum, settings.weight_decay
    )
    adamw = torch.optim.AdamW(
        [{"params": others, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.adamw_learning_rate * learning_rate_scale,
        betas=(settings.adamw_beta1, settings.adamw_beta2),
        fused=True,
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adamw]


def learning_rate_factor(step: int, steps: int, warmup_share: float, decay_share: float) -> float:
    """Warm-up, plateau, linear decay (WSD); step counts from 0 and every factor is above zero."""
    warmup = max(1, round(steps * warmup_share))
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)

"""One optimizer, Muon for matrices and AdamW for the rest, and the schedule both follow.

`torch.optim.Muon` takes single matrices; the routed experts of a layer are a stack of them, so `MuonAdamW`
does the same arithmetic on [..., M, N] with one batched matrix product per iteration.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stages.model.layers import for_matmuls

# a, b, c of each iteration p(x) = ax + bx^3 + cx^5: the best three in turn for singular values from 0.01 of the norm
# on, by the construction of Polar Express (Amsel et al. 2025). They end between 0.73 and 1.27; Muon's customary five
# iterations take them no nearer.
COEFFICIENTS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
NORM_MARGIN = 1.01  # above one the first polynomial diverges, and bfloat16 rounds


def orthogonalise(update: Tensor) -> Tensor:
    """U V^T of each matrix [..., M, N], approximately, by odd polynomials of it, in autocast's dtype.

    The iteration is good enough in bfloat16, but on a CPU without units for it that takes 13 times as long.
    """
    x = for_matmuls(update).reshape(-1, *update.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7) * NORM_MARGIN
    x = x / norm.to(x.dtype)  # CUDA's autocast has norms in float32
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(update.shape)


def orthogonalise_each(updates: list[Tensor]) -> list[Tensor]:
    """Each of the updates [..., M, N]; on a GPU those of one shape at once, for there their launches take the time."""
    if not (updates and updates[0].is_cuda):
        return [orthogonalise(update) for update in updates]
    return orthogonalise_by_shape(updates)


def orthogonalise_by_shape(updates: list[Tensor]) -> list[Tensor]:
    of_shape: dict[torch.Size, list[int]] = {}
    for i, update in enumerate(updates):
        of_shape.setdefault(update.shape[-2:], []).append(i)
    results = list(updates)
    for same in of_shape.values():
        stacks = [for_matmuls(updates[i]).flatten(end_dim=-3) for i in same]
        parts = orthogonalise(torch.cat(stacks)).split([len(stack) for stack in stacks])
        for i, part in zip(same, parts, strict=True):
            results[i] = part.view_as(updates[i])
    return results


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the groups with `use_muon`, fused AdamW on the others, in the order of the groups.

    Muon takes parameters [M, N] or stacks [..., M, N]; each matrix of a stack is orthogonalised by itself. A group's
    `matrices` says how many stand on top of each other in M: 2 for gate and up of a SwiGLU.

    Under DDP every rank has the same gradients, so the ranks share the orthogonalisation out among them and
    exchange the updates: on CPU the same bits as one process, for a fraction of its time.
    """

    def __init__(self, groups: list[dict], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        muon = {"use_muon": False, "momentum": momentum, "matrices": 1}
        adam = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}  # `fused`: torch restores the step on the device
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay} | muon | adam)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if group["use_muon"]:
                self._step_muon(group, with_gradient)
            else:
                self._step_adamw(group, with_gradient)
        return loss

    def _step_muon(self, group: dict, parameters: list[Tensor]) -> None:
        updates = [self._momentum_update(p, group["momentum"]) for p in parameters]
        updates = [u.unflatten(-2, (group["matrices"], -1)) for u in updates]
        for p, update in zip(parameters, orthogonalised_by_the_ranks(updates), strict=True):
            rows, columns = update.shape[-2:]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.reshape(p.shape), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _momentum_update(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum)  # Nesterov

    def _step_adamw(self, group: dict, parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        adamw(
            parameters,
            [p.grad for p in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised_by_the_ranks(updates: list[Tensor]) -> list[Tensor]:
    """Each update [..., M, N] orthogonalised by one rank and sent to the others, in bfloat16."""
    parallel = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    if world_size == 1:
        return [found.bfloat16() for found in orthogonalise_each(updates)]  # rounded as if it had been sent
    shares = fair_shares([update.numel() * min(update.shape[-2:]) for update in updates], world_size)
    sent = []  # every rank does its own share before it waits for another's
    for owner, share in enumerate(shares):
        if owner == rank:
            sent.append(torch.cat([x.flatten() for x in orthogonalise_each([updates[i] for i in share])]).bfloat16())
        else:
            size = sum(updates[i].numel() for i in share)
            sent.append(updates[0].new_empty(size, dtype=torch.bfloat16))
    results = list(updates)
    for owner, (share, flat) in enumerate(zip(shares, sent, strict=True)):
        dist.broadcast(flat, src=owner)
        for i, piece in zip(share, flat.split([updates[i].numel() for i in share]), strict=True):
            results[i] = piece.view_as(updates[i])
    return results


def fair_shares(costs: list[int], ranks: int) -> list[list[int]]:
    """Which rank does which: largest cost first, each to the least busy rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(shares, key=lambda share: sum(costs[j] for j in share)).append(i)
    return [share for share in shares if share]


def parameters_by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices; matrices of which two stand on top of each other; embedding, head and router; vectors."""
    matrices, doubled, others, vectors = [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.endswith("bias"):  # those of experts are stacked
            vectors.append(p)
        elif name.startswith(("embedding", "head")) or "router" in name or name.endswith(".gate.weight"):
            others.append(p)
        elif "gate_up" in name:
            doubled.append(p)
        else:
            matrices.append(p)
    return matrices, doubled, others, vectors


def make_optimizer(model: nn.Module, settings, learning_rate_scale: float) -> MuonAdamW:
    """Hidden matrices to Muon; embedding, head, router, norms to AdamW, without decay on vectors."""
    matrices, doubled, others, vectors = parameters_by_kind(model)
    muon = {"use_muon": True, "lr": settings.muon_learning_rate * learning_rate_scale}
    adam = {"lr": settings.adamw_learning_rate * learning_rate_scale}
    adam["betas"] = (settings.adamw_beta1, settings.adamw_beta2)
    groups = [
        muon | {"params": matrices},
        muon | {"params": doubled, "matrices": 2},
        adam | {"params": others},
        adam | {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = MuonAdamW(groups, momentum=settings.muon_momentum, weight_decay=settings.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(step: int, steps: int, warmup_share: float, decay_share: float) -> float:
    """Warm-up, plateau, linear decay (WSD); step counts from 0 and every factor is above zero."""
    warmup = max(1, round(steps * warmup_share))
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)

"""The losses of the pipeline, chunked over tokens so that full logits never stand in memory.

Shapes: N tokens, D width, V vocabulary, C tokens of a chunk. Everything in nats per token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stages.model.divergences import Divergence, forward_kl
from stages.model.layers import can_compile, for_matmuls


class LogitMap(Protocol):
    """What a family makes of x W^T, number by number: a scale, a soft cap. `model.head.after` has it."""

    def __call__(self, z: Tensor) -> Tensor: ...

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative, from what the map gave."""


def after_head(model: nn.Module) -> LogitMap | None:
    """What the logits of a model are beyond x W^T; None for nothing, as in our own classes."""
    return getattr(model.head, "after", None)


def next_token(
    x_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    chunk_tokens: int | None = None,
    after: LogitMap | None = None,
) -> Tensor:
    """Mean cross-entropy of softmax(after(x W^T)) against the next tokens, in nats."""
    chunk_tokens = chunk_tokens or (8192 if x_ND.is_cuda else 1024)  # a GPU is idle between small products
    loss, _, _ = _ChunkedLoss.apply(x_ND, head_VD, targets_N, None, None, None, chunk_tokens, after, None)
    return loss


@dataclass(frozen=True)
class DistillationLoss:
    """soft_weight * divergence(teacher, student) + (1 - soft_weight) * CE(data), means over N tokens."""

    divergence: Divergence
    temperature: float
    soft_weight: float
    chunk_tokens: int  # whose logits, [C, V] of student and teacher, stand in memory together

    def __call__(
        self,
        x_ND: Tensor,
        head_VD: Tensor,
        teacher_x_ND: Tensor,
        teacher_head_VD: Tensor,
        targets_N: Tensor,
        after: LogitMap | None = None,
        teacher_after: LogitMap | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its two parts. Teacher and student may differ in D, not in V."""
        loss, hard, soft = _ChunkedLoss.apply(
            x_ND, head_VD, targets_N, teacher_x_ND, teacher_head_VD, self, self.chunk_tokens, after, teacher_after
        )
        return loss, {"cross_entropy": hard, "divergence": soft}


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradients in one pass: each chunk's logits are dropped once their gradient is known."""

    @staticmethod
    def forward(
        ctx, x_ND, head_VD, targets_N, teacher_x_ND, teacher_head_VD, distilling, chunk_tokens, after, teacher_after
    ):
        x, head = for_matmuls(x_ND), for_matmuls(head_VD)
        if distilling is not None:
            teacher_x, teacher_head = for_matmuls(teacher_x_ND), for_matmuls(teacher_head_VD)
        dx_ND = torch.empty_like(x)
        dhead_VD = torch.zeros_like(head_VD, dtype=_at_least_float32(head_VD.dtype))
        hard, soft = (x_ND.new_zeros((), dtype=_at_least_float32(x_ND.dtype)) for _ in range(2))
        for start in range(0, x_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            if distilling is None:
                dz_CV, hard_sum = _hard_gradient(x[chunk], head, targets_N[chunk], after)
            else:
                both = Chunk(
                    x[chunk], head, targets_N[chunk], teacher_x[chunk], teacher_head, after, teacher_after
                )
                dz_CV, hard_sum, soft_sum = gradient_for(distilling.divergence, x.is_cuda)(both, distilling)
                soft += soft_sum
            hard += hard_sum
            if after is not None:  # so far for the logits; now for x W^T
                dz_CV = dz_CV * after.slope(_logits(x[chunk], head, after))
            dz_CV = dz_CV.to(x.dtype)
            torch.mm(dz_CV, head, out=dx_ND[chunk])
            if x.dtype == dhead_VD.dtype:
                dhead_VD.addmm_(dz_CV.T, x[chunk])  # a sum of two would make another V x D beside it
            elif x.is_cuda:
                dhead_VD = torch.addmm(dhead_VD, dz_CV.T, x[chunk], out_dtype=torch.float32)
            else:
                dhead_VD += dz_CV.T @ x[chunk]
            del dz_CV  # before the next chunk's stands beside it
        ctx.save_for_backward(dx_ND, dhead_VD)
        ctx.n_tokens, ctx.dtype = x_ND.shape[0], x_ND.dtype
        share = distilling.soft_weight if distilling else 0.0
        loss = ((1 - share) * hard + share * soft) / ctx.n_tokens
        hard, soft = hard / ctx.n_tokens, soft / ctx.n_tokens
        ctx.mark_non_differentiable(hard, soft)
        return loss, hard, soft

    @staticmethod
    def backward(ctx, grad_loss, *_):
        dx_ND, dhead_VD = ctx.saved_tensors
        scale = grad_loss / ctx.n_tokens
        return dx_ND.to(ctx.dtype) * scale, dhead_VD * scale, None, None, None, None, None, None, None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- the gradient of one chunk's summed loss for its logits, [C, V], and the sums of the loss's parts ------------
# Any divergence is differentiated by autograd. `forward_kl`, the default, has two twins derived by hand: one that works
# in place on CPU, and plain formulas for the compiler on a GPU. Both rest on, with z the student's logits,
# d(T² KL(q || p))/dz = T (p - q) and d CE/dz = softmax(z) - onehot(y) (Hinton et al. 2015, equation 2).
#
# What these make is as large as the logits of a chunk, and in place each is dropped as soon as it has been used: two
# stand at once for the hard targets alone, four with the soft ones.


class Chunk(NamedTuple):
    x_CD: Tensor
    head_VD: Tensor
    target_C: Tensor
    teacher_x_CD: Tensor
    teacher_head_VD: Tensor
    after: LogitMap | None = None
    teacher_after: LogitMap | None = None

    def logits(self) -> Tensor:
        return _logits(self.x_CD, self.head_VD, self.after)

    def teacher_logits(self) -> Tensor:
        return _logits(self.teacher_x_CD, self.teacher_head_VD, self.teacher_after)


def gradient_for(divergence: Divergence, on_gpu: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if divergence is not forward_kl:
        return by_autograd
    return compiled_forward_kl if on_gpu else forward_kl_in_place


def by_autograd(chunk: Chunk, loss: DistillationLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Of any divergence, from its function alone."""
    z_CV, teacher_z_CV = chunk.logits(), chunk.teacher_logits()
    with torch.enable_grad(), torch.autocast(z_CV.device.type, enabled=False):
        soft = loss.divergence(z_CV.requires_grad_(), teacher_z_CV, loss.temperature).sum()
        (dz_CV,) = torch.autograd.grad(soft, z_CV)
    hard_dz_CV, hard = _cross_entropy_gradient(z_CV.detach(), chunk.target_C)
    return dz_CV.mul_(loss.soft_weight).add_(hard_dz_CV, alpha=1 - loss.soft_weight), hard, soft.detach()


def forward_kl_in_place(chunk: Chunk, loss: DistillationLoss) -> tuple[Tensor, Tensor, Tensor]:
    z_CV = chunk.logits()
    dz_CV, hard = _cross_entropy_gradient(z_CV, chunk.target_C)
    log_p_CV = z_CV.div_(loss.temperature).log_softmax(-1)
    del z_CV
    log_q_CV = chunk.teacher_logits().div_(loss.temperature).log_softmax(-1)
    q_CV = log_q_CV.exp()
    soft = loss.temperature**2 * torch.dot(q_CV.flatten(), log_q_CV.sub_(log_p_CV).flatten())
    del log_q_CV
    dsoft_CV = log_p_CV.exp_().sub_(q_CV)
    return dz_CV.mul_(1 - loss.soft_weight).add_(dsoft_CV, alpha=loss.soft_weight * loss.temperature), hard, soft


def compiled_forward_kl(chunk: Chunk, loss: DistillationLoss) -> tuple[Tensor, Tensor, Tensor]:
    z_CV = _mapped(chunk.x_CD @ chunk.head_VD.T, chunk.after)
    teacher_z_CV = _mapped(chunk.teacher_x_CD @ chunk.teacher_head_VD.T, chunk.teacher_after)
    dz_CV, hard_C, soft_C = _compiled()(z_CV, chunk.target_C, teacher_z_CV, loss.temperature, loss.soft_weight)
    return dz_CV, hard_C.sum(), soft_C.sum()


def _hard_gradient(
    x_CD: Tensor, head_VD: Tensor, target_C: Tensor, after: LogitMap | None = None
) -> tuple[Tensor, Tensor]:
    """Without a teacher."""
    if x_CD.is_cuda:
        dz_CV, hard_C, _ = _compiled()(_mapped(x_CD @ head_VD.T, after), target_C, None, 1.0, 0.0)
        return dz_CV, hard_C.sum()
    return _cross_entropy_gradient(_logits(x_CD, head_VD, after), target_C)


def _logits(x_CD: Tensor, head_VD: Tensor, after: LogitMap | None = None) -> Tensor:
    z_CV = x_CD @ head_VD.T
    return _mapped(z_CV.to(_at_least_float32(z_CV.dtype)), after)


def _mapped(z_CV: Tensor, after: LogitMap | None) -> Tensor:
    return z_CV if after is None else after(z_CV)


def _cross_entropy_gradient(z_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    p_CV = z_CV.softmax(-1)
    target_C1 = target_C[:, None]
    chosen_C1 = p_CV.gather(1, target_C1)
    hard = -chosen_C1.clamp_min(torch.finfo(p_CV.dtype).tiny).log().sum()  # an underflow counts 87 nats, not infinity
    return p_CV.scatter_(1, target_C1, chosen_C1 - 1), hard


def gradients(
    z_CV: Tensor, target_C: Tensor, teacher_z_CV: Tensor | None, temperature: float, soft_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and forward KL as plain formulas, for a compiler that makes few passes over the logits of them.

    Returns the gradient for the logits in their dtype, and cross-entropy and T² KL of each token [C].
    """
    log_p_CV = z_CV.float().log_softmax(-1)
    is_target_CV = target_C[:, None] == torch.arange(z_CV.shape[1], device=z_CV.device)
    hard_C = -torch.where(is_target_CV, log_p_CV, 0.0).sum(-1)
    dz_CV = log_p_CV.exp() - is_target_CV.float()
    if teacher_z_CV is None:
        return dz_CV.to(z_CV.dtype), hard_C, torch.zeros_like(hard_C)
    log_pT_CV = (z_CV.float() / temperature).log_softmax(-1)
    log_qT_CV = (teacher_z_CV.float() / temperature).log_softmax(-1)
    soft_C = temperature**2 * (log_qT_CV.exp() * (log_qT_CV - log_pT_CV)).sum(-1)
    dsoft_CV = temperature * (log_pT_CV.exp() - log_qT_CV.exp())
    return ((1 - soft_weight) * dz_CV + soft_weight * dsoft_CV).to(z_CV.dtype), hard_C, soft_C


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(gradients) if can_compile() else gradients

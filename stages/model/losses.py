"""The losses of the pipeline, chunked over tokens so that full logits never stand in memory.

Shapes: N tokens, D width, V vocabulary, C tokens of a chunk. Everything in nats per token.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from stages.model.layers import can_compile, for_matmuls


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradients in one pass: each chunk's logits are dropped once their gradient is known.

    With z the student's logits, p = softmax(z), and p^T, q^T the softmax at temperature T of student and teacher:
    d(T² KL(q^T || p^T))/dz = T (p^T - q^T) and d CE/dz = p - onehot(y) (Hinton et al. 2015, equation 2).
    """

    @staticmethod
    def forward(ctx, x_ND, head_VD, targets_N, teacher_x_ND, teacher_head_VD, temperature, soft_weight, chunk_tokens):
        distilling = teacher_x_ND is not None
        x, head = for_matmuls(x_ND), for_matmuls(head_VD)
        if distilling:
            teacher_x, teacher_head = for_matmuls(teacher_x_ND), for_matmuls(teacher_head_VD)
        dx_ND = torch.empty_like(x)
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        hard = x_ND.new_zeros((), dtype=torch.float32)
        soft = x_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            if x.is_cuda:
                teacher_z_CV = teacher_x[chunk] @ teacher_head.T if distilling else None
                dz_CV, hard_C, soft_C = _fused()(
                    x[chunk] @ head.T, targets_N[chunk], teacher_z_CV, temperature, soft_weight
                )
                hard, soft = hard + hard_C.sum(), soft + soft_C.sum()
            elif distilling:
                taught = teacher_x[chunk], teacher_head, temperature, soft_weight
                dz_CV = _soft_and_hard(x[chunk], head, targets_N[chunk], *taught, hard, soft)
            else:
                dz_CV = _hard(_logits(x[chunk], head), targets_N[chunk], hard)
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
        share = soft_weight if distilling else 0.0
        loss = ((1 - share) * hard + share * soft) / ctx.n_tokens
        hard, soft = hard / ctx.n_tokens, soft / ctx.n_tokens
        ctx.mark_non_differentiable(hard, soft)
        return loss, hard, soft

    @staticmethod
    def backward(ctx, grad_loss, *_):
        dx_ND, dhead_VD = ctx.saved_tensors
        scale = grad_loss / ctx.n_tokens
        return dx_ND.to(ctx.dtype) * scale, dhead_VD * scale, None, None, None, None, None, None


# What these make is as large as the logits of a chunk, and each is dropped as soon as it has been used: two stand at
# once for the hard targets alone, four with the soft ones.


def _logits(x_CD: Tensor, head_VD: Tensor) -> Tensor:
    return (x_CD @ head_VD.T).float()


def _hard(z_CV: Tensor, target_C: Tensor, hard: Tensor) -> Tensor:
    """Gradient of the cross-entropies for the logits; their sum is added to `hard`."""
    p_CV = z_CV.softmax(-1)
    target_C1 = target_C[:, None]
    chosen_C1 = p_CV.gather(1, target_C1)
    hard -= chosen_C1.clamp_min(torch.finfo(p_CV.dtype).tiny).log().sum()  # an underflow counts 87 nats, not infinity
    return p_CV.scatter_(1, target_C1, chosen_C1 - 1)


def _soft_and_hard(
    x_CD: Tensor,
    head_VD: Tensor,
    target_C: Tensor,
    teacher_x_CD: Tensor,
    teacher_head_VD: Tensor,
    temperature: float,
    soft_weight: float,
    hard: Tensor,
    soft: Tensor,
) -> Tensor:
    """Gradient of the weighted sum for the logits; the sum of T² KL is added to `soft`."""
    z_CV = _logits(x_CD, head_VD)
    dz_CV = _hard(z_CV, target_C, hard)
    log_pT_CV = z_CV.div_(temperature).log_softmax(-1)
    del z_CV
    log_qT_CV = _logits(teacher_x_CD, teacher_head_VD).div_(temperature).log_softmax(-1)
    qT_CV = log_qT_CV.exp()
    soft += temperature**2 * torch.dot(qT_CV.flatten(), log_qT_CV.sub_(log_pT_CV).flatten())
    del log_qT_CV
    return dz_CV.mul_(1 - soft_weight).add_(log_pT_CV.exp_().sub_(qT_CV), alpha=soft_weight * temperature)


def gradients(
    z_CV: Tensor, target_C: Tensor, teacher_z_CV: Tensor | None, temperature: float, soft_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as plain formulas, for a compiler that makes few passes over the logits of them.

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
def _fused() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(gradients) if can_compile() else gradients


def next_token(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy of softmax(x W^T) against the next tokens, in nats."""
    chunk_tokens = chunk_tokens or (8192 if x_ND.is_cuda else 1024)  # a GPU is idle between small products
    loss, _, _ = _ChunkedLoss.apply(x_ND, head_VD, targets_N, None, None, 1.0, 0.0, chunk_tokens)
    return loss


def distillation(
    student_x_ND: Tensor,
    student_head_VD: Tensor,
    teacher_x_ND: Tensor,
    teacher_head_VD: Tensor,
    targets_N: Tensor,
    temperature: float,
    soft_weight: float,
    chunk_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """soft_weight * T² KL(teacher^T || student^T) + (1 - soft_weight) * CE(data), means over N tokens.

    The KL is a true divergence (zero at a match), summed over V. Teacher and student may differ in D, not in V.
    """
    loss, hard, soft = _ChunkedLoss.apply(
        student_x_ND, student_head_VD, targets_N, teacher_x_ND, teacher_head_VD, temperature, soft_weight, chunk_tokens
    )
    return loss, {"cross_entropy": hard, "soft_kl": soft}

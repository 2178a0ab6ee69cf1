"""The losses of the pipeline, chunked over tokens so that full logits never stand in memory.

Shapes: N tokens, D width, V vocabulary, C tokens of a chunk. Everything in nats per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradients in one pass: each chunk's logits are dropped once their gradient is known.

    With z the student's logits, p = softmax(z), and p^T, q^T the softmax at temperature T of student and teacher:
    d(T² KL(q^T || p^T))/dz = T (p^T - q^T) and d CE/dz = p - onehot(y) (Hinton et al. 2015, equation 2).
    """

    @staticmethod
    def forward(ctx, x_ND, head_VD, targets_N, teacher_x_ND, teacher_head_VD, temperature, soft_weight, chunk_tokens):
        dx_ND = torch.zeros_like(x_ND)
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        hard = x_ND.new_zeros((), dtype=torch.float32)
        soft = x_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            z_CV = F.linear(x_ND[chunk], head_VD).float()
            log_p_CV = z_CV.log_softmax(-1)
            target_C1 = targets_N[chunk, None]
            hard -= log_p_CV.gather(1, target_C1).sum()
            dz_CV = log_p_CV.exp_()
            dz_CV.scatter_add_(1, target_C1, dz_CV.new_full((1, 1), -1.0).expand_as(target_C1))
            if teacher_x_ND is not None:
                log_pT_CV = (z_CV / temperature).log_softmax(-1)
                teacher_z_CV = F.linear(teacher_x_ND[chunk], teacher_head_VD).float()
                log_qT_CV = (teacher_z_CV / temperature).log_softmax(-1)
                qT_CV = log_qT_CV.exp()
                soft += temperature**2 * (qT_CV * (log_qT_CV - log_pT_CV)).sum()
                dz_CV.mul_(1 - soft_weight).add_(log_pT_CV.exp_().sub_(qT_CV), alpha=soft_weight * temperature)
            dz_CV = dz_CV.to(F.linear(x_ND[:1], head_VD).dtype)  # what autocast computes in
            dx_ND[chunk] = dz_CV @ head_VD.to(dz_CV.dtype)
            dhead_VD += dz_CV.T @ x_ND[chunk].to(dz_CV.dtype)
        ctx.save_for_backward(dx_ND, dhead_VD)
        ctx.n_tokens = x_ND.shape[0]
        share = soft_weight if teacher_x_ND is not None else 0.0
        loss = ((1 - share) * hard + share * soft) / ctx.n_tokens
        hard, soft = hard / ctx.n_tokens, soft / ctx.n_tokens
        ctx.mark_non_differentiable(hard, soft)
        return loss, hard, soft

    @staticmethod
    def backward(ctx, grad_loss, *_):
        dx_ND, dhead_VD = ctx.saved_tensors
        scale = grad_loss / ctx.n_tokens
        return dx_ND * scale.to(dx_ND.dtype), dhead_VD * scale, None, None, None, None, None, None


def next_token(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk_tokens: int = 1024) -> Tensor:
    """Mean cross-entropy of softmax(x W^T) against the next tokens, in nats."""
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

"""How far a student's distribution is from its teacher's: one function per setting `distill.divergence`.

To add one: write a function of the same three arguments, put its name into DIVERGENCES, and its word into `divergence`
of `stages/settings/schema.py`. The loss differentiates it a chunk of tokens at a time (`stages/model/losses.py`).

Shapes: C tokens of a chunk, V vocabulary. q = softmax(teacher logits / T), p = softmax(student logits / T).
Logits are float32 or float64. Each function returns nats per token [C] (total variation: a probability), not negative,
zero where p = q, and scaled so that its gradient for the logits keeps its size as the temperature T rises.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SKEW = 0.1  # share of the teacher in skewed_kl's mixture, as in DistiLLM's own code (distillm/losses.py)

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> Tensor:
    """T² KL(q || p) (Hinton et al. 2015): the student covers all that the teacher finds likely."""
    log_p_CV, log_q_CV = _log_shares(student_z_CV, teacher_z_CV, temperature)
    return temperature**2 * _kl(log_q_CV, log_p_CV)


def reverse_kl(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> Tensor:
    """T² KL(p || q) (Gu et al. 2024, MiniLLM): the student avoids what the teacher finds unlikely."""
    log_p_CV, log_q_CV = _log_shares(student_z_CV, teacher_z_CV, temperature)
    return temperature**2 * _kl(log_p_CV, log_q_CV)


def jensen_shannon(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> Tensor:
    """T² (KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2 (Lin 1991): symmetric, at most T² ln 2."""
    log_p_CV, log_q_CV = _log_shares(student_z_CV, teacher_z_CV, temperature)
    log_m_CV = _log_mixture(log_q_CV, log_p_CV, 0.5)
    return temperature**2 * (_kl(log_q_CV, log_m_CV) + _kl(log_p_CV, log_m_CV)) / 2


def skewed_kl(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> Tensor:
    """T² KL(q || SKEW q + (1 - SKEW) p) (Ko et al. 2024, DistiLLM): at most T² ln(1 / SKEW).

    Its gradient stays bounded where the student gives almost nothing to a token that the teacher finds likely.
    """
    log_p_CV, log_q_CV = _log_shares(student_z_CV, teacher_z_CV, temperature)
    return temperature**2 * _kl(log_q_CV, _log_mixture(log_q_CV, log_p_CV, SKEW))


def total_variation(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> Tensor:
    """T sum |p - q| / 2 (Wen et al. 2023, f-distill), at most T.

    T and not T²: it is of first order in p - q, the others are of second order. Its gradient does not shrink near a
    match, so the last steps need a small learning rate.
    """
    log_p_CV, log_q_CV = _log_shares(student_z_CV, teacher_z_CV, temperature)
    return temperature * (log_p_CV.exp() - log_q_CV.exp()).abs().sum(-1) / 2


def _log_shares(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (student_z_CV / temperature).log_softmax(-1), (teacher_z_CV / temperature).log_softmax(-1)


def _kl(log_a_CV: Tensor, log_b_CV: Tensor) -> Tensor:
    return (log_a_CV.exp() * (log_a_CV - log_b_CV)).sum(-1)


def _log_mixture(log_a_CV: Tensor, log_b_CV: Tensor, share_of_a: float) -> Tensor:
    return torch.logaddexp(log_a_CV + math.log(share_of_a), log_b_CV + math.log1p(-share_of_a))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "total_variation": total_variation,
}

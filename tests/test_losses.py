"""The chunked losses against their plain twins."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.measure.memory import LiveBytes
from stages.model.losses import distillation, next_token

N, D, TEACHER_D, V = 37, 12, 20, 50  # N is odd and no multiple of the chunk


def plain_distillation(x_ND, head_VD, teacher_x_ND, teacher_head_VD, targets_N, T, soft_weight):
    z_NV, teacher_z_NV = x_ND @ head_VD.T, teacher_x_ND @ teacher_head_VD.T
    log_p_NV, q_NV = (z_NV / T).log_softmax(-1), (teacher_z_NV / T).softmax(-1)
    soft = T**2 * F.kl_div(log_p_NV, q_NV, reduction="batchmean")
    return soft_weight * soft + (1 - soft_weight) * F.cross_entropy(z_NV, targets_N)


def tensors():
    g = torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, D, generator=g, requires_grad=True)
    head_VD = torch.randn(V, D, generator=g, requires_grad=True)
    teacher_x_ND = torch.randn(N, TEACHER_D, generator=g)
    teacher_head_VD = torch.randn(V, TEACHER_D, generator=g)
    return x_ND, head_VD, teacher_x_ND, teacher_head_VD, torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("soft_weight", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 64])
def test_chunked_distillation_equals_the_plain_one_in_value_and_gradient(temperature, soft_weight, chunk_tokens):
    x_ND, head_VD, *fixed, targets_N = tensors()
    plain = plain_distillation(x_ND, head_VD, *fixed, targets_N, temperature, soft_weight)
    expected = torch.autograd.grad(plain, (x_ND, head_VD))
    loss, _ = distillation(x_ND, head_VD, *fixed, targets_N, temperature, soft_weight, chunk_tokens)
    got = torch.autograd.grad(3 * loss, (x_ND, head_VD))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, 3 * reference, rtol=1e-4, atol=1e-6)


def test_chunked_cross_entropy_equals_the_plain_one_in_value_and_gradient():
    x_ND, head_VD, _, _, targets_N = tensors()
    plain = F.cross_entropy(x_ND @ head_VD.T, targets_N)
    expected = torch.autograd.grad(plain, (x_ND, head_VD))
    loss = next_token(x_ND, head_VD, targets_N, chunk_tokens=5)
    got = torch.autograd.grad(loss, (x_ND, head_VD))
    torch.testing.assert_close(loss, plain)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_the_divergence_from_itself_is_zero():
    x_ND, head_VD, _, _, targets_N = tensors()
    _, parts = distillation(x_ND, head_VD, x_ND.detach(), head_VD.detach(), targets_N, 2.0, 1.0, 8)
    assert abs(parts["soft_kl"].item()) < 1e-5


def test_the_gradient_keeps_its_size_as_the_temperature_rises():
    """The T² factor: without it the gradient would shrink sixteen-fold from T=1 to T=4."""
    x_ND, head_VD, *fixed, targets_N = tensors()
    norms = []
    for temperature in (1.0, 4.0):
        loss, _ = distillation(0.1 * x_ND, head_VD, 0.1 * fixed[0], fixed[1], targets_N, temperature, 1.0, 8)
        norms.append(torch.autograd.grad(loss, x_ND)[0].norm().item())
    assert 0.5 < norms[1] / norms[0] < 2.0


@pytest.mark.parametrize(("soft_weight", "at_once"), [(0.0, 2), (0.9, 4)])
def test_the_peak_is_a_few_tensors_of_a_chunks_logits_and_one_of_the_heads_gradient(soft_weight, at_once):
    x_ND, head_VD, targets_N = torch.randn(64, 8), torch.randn(2000, 8), torch.randint(2000, (64,))
    inputs = nn.ParameterList(nn.Parameter(part, part.is_floating_point()) for part in (x_ND, head_VD, targets_N))
    live, chunk_tokens = LiveBytes(inputs), 16
    with live, live.record():
        if soft_weight:
            distillation(x_ND, head_VD, x_ND, head_VD, targets_N, 2.0, soft_weight, chunk_tokens)
        else:
            next_token(x_ND, head_VD, targets_N, chunk_tokens)
    logits, head = 4 * chunk_tokens * 2000, 4 * 2000 * 8
    assert at_once * logits + head <= live.peak < 1.1 * (at_once * logits + head)

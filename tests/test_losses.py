"""The chunked losses against their plain twins, and the divergences between teacher and student."""

import math
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.model.checkpointing import LiveBytes
from stages.model.divergences import DIVERGENCES, SKEW, forward_kl
from stages.model.losses import Chunk, DistillationLoss, by_autograd, forward_kl_in_place, next_token
from stages.settings.schema import SoftTargets
from stages.training.fit import Distillation

N, D, TEACHER_D, V = 37, 12, 20, 50  # N is odd and no multiple of the chunk
WORDS = sorted(DIVERGENCES)


def squared_error(student_z_CV: Tensor, teacher_z_CV: Tensor, temperature: float) -> Tensor:
    """What a newcomer adds, in a file of its own: half the squared distance of the logits (Ba and Caruana 2014)."""
    return (student_z_CV - teacher_z_CV).square().mean(-1) / 2


def plain_divergence(word: str, z_NV: Tensor, teacher_z_NV: Tensor, T: float) -> Tensor:
    """Written from shares instead of their logarithms, by PyTorch's own losses: the mean over N."""
    p_NV, q_NV = (z_NV / T).softmax(-1), (teacher_z_NV / T).softmax(-1)

    def kl(a_NV, b_NV):
        return F.kl_div(b_NV.log(), a_NV, reduction="batchmean")

    middle_NV = (p_NV + q_NV) / 2
    return {
        "forward_kl": lambda: T**2 * kl(q_NV, p_NV),
        "reverse_kl": lambda: T**2 * kl(p_NV, q_NV),
        "jensen_shannon": lambda: T**2 * (kl(q_NV, middle_NV) + kl(p_NV, middle_NV)) / 2,
        "skewed_kl": lambda: T**2 * kl(q_NV, SKEW * q_NV + (1 - SKEW) * p_NV),
        "total_variation": lambda: T * F.l1_loss(p_NV, q_NV, reduction="sum") / (2 * len(p_NV)),
        "squared_error": lambda: F.mse_loss(z_NV, teacher_z_NV) / 2,
    }[word]()


def plain_distillation(word, x_ND, head_VD, teacher_x_ND, teacher_head_VD, targets_N, T, soft_weight):
    z_NV, teacher_z_NV = x_ND @ head_VD.T, teacher_x_ND @ teacher_head_VD.T
    soft = plain_divergence(word, z_NV, teacher_z_NV, T)
    return soft_weight * soft + (1 - soft_weight) * F.cross_entropy(z_NV, targets_N)


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    head_VD = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    teacher_x_ND = torch.randn(N, TEACHER_D, generator=g).to(dtype)
    teacher_head_VD = torch.randn(V, TEACHER_D, generator=g).to(dtype)
    return x_ND, head_VD, teacher_x_ND, teacher_head_VD, torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("soft_weight", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 64])
def test_chunked_distillation_equals_the_plain_one_in_value_and_gradient(temperature, soft_weight, chunk_tokens):
    x_ND, head_VD, *fixed, targets_N = tensors()
    plain = plain_distillation("forward_kl", x_ND, head_VD, *fixed, targets_N, temperature, soft_weight)
    expected = torch.autograd.grad(plain, (x_ND, head_VD))
    distillation = DistillationLoss(forward_kl, temperature, soft_weight, chunk_tokens)
    loss, _ = distillation(x_ND, head_VD, *fixed, targets_N)
    got = torch.autograd.grad(3 * loss, (x_ND, head_VD))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, 3 * reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("word", [*WORDS, "squared_error"])
@pytest.mark.parametrize("soft_weight", [0.3, 1.0])
def test_the_chunked_loss_differentiates_any_divergence_exactly(word, soft_weight, monkeypatch):
    """In float64, and `squared_error` is added here as a newcomer adds one: a function and its word."""
    monkeypatch.setitem(DIVERGENCES, "squared_error", squared_error)
    x_ND, head_VD, *fixed, targets_N = tensors(torch.float64)
    plain = plain_distillation(word, x_ND, head_VD, *fixed, targets_N, 2.0, soft_weight)
    expected = torch.autograd.grad(plain, (x_ND, head_VD))
    loss, parts = DistillationLoss(DIVERGENCES[word], 2.0, soft_weight, 8)(x_ND, head_VD, *fixed, targets_N)
    got = torch.autograd.grad(loss, (x_ND, head_VD))
    torch.testing.assert_close((loss, *got), (plain, *expected), rtol=1e-9, atol=1e-12)
    mixed = soft_weight * parts["divergence"] + (1 - soft_weight) * parts["cross_entropy"]
    torch.testing.assert_close(mixed, loss)


def test_the_gradient_by_hand_is_that_of_autograd():
    x_ND, head_VD, *fixed, targets_N = (part.detach() for part in tensors(torch.float64))
    chunk, loss = Chunk(x_ND, head_VD, targets_N, *fixed), DistillationLoss(forward_kl, 2.0, 0.7, 8)
    torch.testing.assert_close(forward_kl_in_place(chunk, loss), by_autograd(chunk, loss), rtol=1e-10, atol=1e-12)


def test_chunked_cross_entropy_equals_the_plain_one_in_value_and_gradient():
    x_ND, head_VD, _, _, targets_N = tensors()
    plain = F.cross_entropy(x_ND @ head_VD.T, targets_N)
    expected = torch.autograd.grad(plain, (x_ND, head_VD))
    loss = next_token(x_ND, head_VD, targets_N, chunk_tokens=5)
    got = torch.autograd.grad(loss, (x_ND, head_VD))
    torch.testing.assert_close(loss, plain)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("word", WORDS)
def test_the_divergence_from_itself_is_zero_and_from_another_above_zero(word):
    x_ND, head_VD, *other, targets_N = tensors()
    loss = DistillationLoss(DIVERGENCES[word], 2.0, 1.0, 8)
    _, parts = loss(x_ND, head_VD, x_ND.detach(), head_VD.detach(), targets_N)
    assert abs(parts["divergence"].item()) < 1e-5
    assert loss(x_ND, head_VD, *other, targets_N)[1]["divergence"] > 0.1


@pytest.mark.parametrize(
    ("word", "temperature", "nats"),
    [  # the student says 1/2, 1/2; the teacher 4/5, 1/5 at T = 1 and 2/3, 1/3 at T = 2
        ("forward_kl", 1.0, 0.8 * math.log(1.6) + 0.2 * math.log(0.4)),
        ("forward_kl", 2.0, 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))),
        ("reverse_kl", 1.0, 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)),
        (
            "jensen_shannon",
            1.0,
            (
                0.8 * math.log(0.8 / 0.65)
                + 0.2 * math.log(0.2 / 0.35)
                + 0.5 * math.log(0.5 / 0.65)
                + 0.5 * math.log(0.5 / 0.35)
            )
            / 2,
        ),
        ("skewed_kl", 1.0, 0.8 * math.log(0.8 / 0.53) + 0.2 * math.log(0.2 / 0.47)),
        ("total_variation", 1.0, 0.3),
        ("total_variation", 2.0, 2 * (2 / 3 - 1 / 2)),
    ],
)
def test_a_coin_has_the_divergence_worked_out_by_hand(word, temperature, nats):
    student_z_CV, teacher_z_CV = torch.zeros(1, 2), torch.tensor([[math.log(4.0), 0.0]])
    assert DIVERGENCES[word](student_z_CV, teacher_z_CV, temperature).tolist() == pytest.approx([nats], rel=1e-5)


@pytest.mark.parametrize("word", WORDS)
def test_a_divergence_stays_finite_where_a_token_has_no_probability_left(word):
    student_z_CV = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = DIVERGENCES[word](student_z_CV, torch.tensor([[0.0, 200.0]]), 1.0).sum()
    (gradient,) = torch.autograd.grad(loss, student_z_CV)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("word", WORDS)
def test_the_gradient_keeps_its_size_as_the_temperature_rises(word):
    """The factor T², or T: without it the gradient would shrink sixteen-fold, or four-fold, from T=1 to T=4."""
    x_ND, head_VD, *fixed, targets_N = tensors()
    norms = []
    for temperature in (1.0, 4.0):
        loss, _ = DistillationLoss(DIVERGENCES[word], temperature, 1.0, 8)(
            0.1 * x_ND, head_VD, 0.1 * fixed[0], fixed[1], targets_N
        )
        norms.append(torch.autograd.grad(loss, x_ND)[0].norm().item())
    assert 0.5 < norms[1] / norms[0] < 2.0


def test_the_words_of_the_setting_are_those_of_the_divergences():
    assert set(typing.get_args(SoftTargets.model_fields["divergence"].annotation)) == set(DIVERGENCES)


def test_the_objective_takes_the_divergence_by_its_word():
    assert Distillation(nn.Linear(2, 2), "reverse_kl", 1.0, 0.5, 8).loss.divergence is DIVERGENCES["reverse_kl"]


def peak_bytes(loss_of, tokens: int, chunk_tokens: int) -> int:
    x_ND, head_VD, targets_N = torch.randn(tokens, 8), torch.randn(2000, 8), torch.randint(2000, (tokens,))
    inputs = nn.ParameterList(nn.Parameter(part, part.is_floating_point()) for part in (x_ND, head_VD, targets_N))
    live = LiveBytes(inputs)
    with live, live.record():
        loss_of(x_ND, head_VD, targets_N, chunk_tokens)
    return live.peak


def cross_entropy(x_ND, head_VD, targets_N, chunk_tokens):
    next_token(x_ND, head_VD, targets_N, chunk_tokens)


def distilled(word):
    def loss_of(x_ND, head_VD, targets_N, chunk_tokens):
        DistillationLoss(DIVERGENCES[word], 2.0, 0.9, chunk_tokens)(x_ND, head_VD, x_ND, head_VD, targets_N)

    return loss_of


@pytest.mark.parametrize(("loss_of", "at_once"), [(cross_entropy, 2), (distilled("forward_kl"), 4)])
def test_the_peak_is_a_few_tensors_of_a_chunks_logits_and_one_of_the_heads_gradient(loss_of, at_once):
    peak, logits, head = peak_bytes(loss_of, 64, 16), 4 * 16 * 2000, 4 * 2000 * 8
    assert at_once * logits + head <= peak < 1.1 * (at_once * logits + head)


@pytest.mark.parametrize("word", sorted(set(WORDS) - {"forward_kl"}))
def test_no_divergence_holds_more_than_a_chunks_logits(word):
    """Autograd keeps several tensors of a chunk, and none of the other chunks."""
    peak, logits, head = peak_bytes(distilled(word), 512, 16), 4 * 16 * 2000, 4 * 2000 * 8
    assert peak < 16 * logits + head < 4 * 512 * 2000

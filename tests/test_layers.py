"""The fast twins of the layers give the numbers and gradients of the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from stages.model.kernels.attention import causal_attention
from stages.model.kernels.gated import GatedSilu, gated_silu, gated_silu_backward
from stages.model.kernels.norm import NORM_EPSILON, FewPassRMSNorm, rms_norm
from stages.model.layers import attend


def test_the_norm_passes_a_numerical_gradient_check():
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    weight = torch.rand(5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(FewPassRMSNorm.apply, (x, weight))


def test_the_norm_equals_pytorchs_also_at_extreme_sizes():
    for scale in (1e-12, 1.0, 1e12):
        x, weight = torch.randn(4, 7, 64) * scale, torch.rand(64)
        torch.testing.assert_close(FewPassRMSNorm.apply(x, weight), F.rms_norm(x, (64,), weight, NORM_EPSILON))


def qkv(tokens: int, key_dim: int, value_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, 3, tokens, dim) for dim in (key_dim, key_dim, value_dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def output_and_gradients(parts: list[torch.Tensor], dtype: torch.dtype, attention) -> list[torch.Tensor]:
    parts = [part.detach().to(dtype).requires_grad_() for part in parts]
    out = attention(*parts)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach().float(), *(part.grad.float() for part in parts)]


@pytest.mark.parametrize(("tokens", "key_dim", "value_dim"), [(2, 8, 8), (128, 16, 16), (130, 16, 16), (300, 16, 24)])
def test_blockwise_attention_is_as_exact_as_the_fused_kernel(tokens, key_dim, value_dim):
    scale = key_dim**-0.5

    def fused(query, key, value):
        pad = (0, value_dim - key_dim)  # the fused kernel needs one size
        query, key = F.pad(query, pad), F.pad(key, pad)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    parts = qkv(tokens, key_dim, value_dim)
    exact = output_and_gradients(parts, torch.float32, fused)
    with torch.autocast("cpu", torch.bfloat16):
        ours = output_and_gradients(parts, torch.bfloat16, lambda *qkv: attend(*qkv, scale))
    theirs = output_and_gradients(parts, torch.bfloat16, fused)
    for name, true, here, there in zip(("out", "query", "key", "value"), exact, ours, theirs, strict=True):
        assert (here - true).norm() < 2 * (there - true).norm() + 1e-3 * true.norm(), name


def test_blockwise_attention_sees_nothing_that_follows():
    query, key, value = (part.bfloat16() for part in qkv(260, 16, 16))
    before = attend(query, key, value, 0.25)
    key[:, :, 200:], value[:, :, 200:] = 100.0, -100.0
    after = attend(query, key, value, 0.25)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


def test_the_gated_silus_for_cpu_and_for_the_compiler_give_the_same():
    h_N2F, grad_NF = torch.randn(5, 16), torch.randn(5, 8)
    silu_NF = F.silu(h_N2F.chunk(2, dim=-1)[0])
    torch.testing.assert_close(*(kernel.compute(h_N2F) for kernel in gated_silu.kernels))
    torch.testing.assert_close(*(kernel.compute(grad_NF, h_N2F, silu_NF) for kernel in gated_silu_backward.kernels))
    h_N2F.requires_grad_()
    (plain,) = torch.autograd.grad(F.silu(h_N2F[:, :8]) * h_N2F[:, 8:], h_N2F, grad_NF)
    torch.testing.assert_close(torch.autograd.grad(GatedSilu.apply(h_N2F), h_N2F, grad_NF)[0], plain)


@pytest.mark.parametrize(("rows", "kernel"), [(255, "pytorch"), (256, "few_passes")])
def test_a_small_norm_is_pytorchs_own(rows, kernel):
    assert rms_norm.chosen(torch.zeros(rows, 64), torch.ones(64)).name == kernel


@pytest.mark.parametrize(
    ("dtype", "queries", "kernel"),
    [(torch.bfloat16, 8, "blockwise"), (torch.bfloat16, 1, "fused"), (torch.float32, 8, "fused")],
)
def test_attention_goes_by_blocks_for_whole_sequences_in_bfloat16_on_cpu(dtype, queries, kernel):
    query, key, value = (part.to(dtype) for part in qkv(8, 16, 16))
    assert causal_attention.chosen(query[:, :, -queries:], key, value, 1.0, None).name == kernel

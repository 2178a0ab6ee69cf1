"""The student: causality, key/value cache, grouped heads, initialisation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.model.hub import new_model
from stages.training.fit import Outcome, split_targets

SHAPE = StudentShape(
    vocab_size=40,
    sequence_tokens=32,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    rope_theta=10000.0,
)
ODD_SHAPES = [
    SHAPE,
    replace(SHAPE, kv_heads=4),
    replace(SHAPE, heads=6, kv_heads=2, mlp_width=19),
    replace(SHAPE, heads=3, kv_heads=1, head_dim=10),  # heads * head_dim differs from width, as after pruning
]


def student(shape=SHAPE, seed=0):
    model = new_model(shape, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def some_tokens(batch=2, count=11):
    return torch.randint(0, 40, (batch, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_token_sees_nothing_that_follows_it(shape):
    model = student(shape)
    tokens_BT = some_tokens()
    changed_BT = tokens_BT.clone()
    changed_BT[:, 6] = (changed_BT[:, 6] + 1) % 40
    with torch.no_grad():
        logits_BTV, changed_BTV = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(logits_BTV[:, :6], changed_BTV[:, :6])
    assert ((logits_BTV[:, 6:] - changed_BTV[:, 6:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 4, 1], [11]])
def test_decoding_with_the_cache_equals_the_whole_forward(shape, chunks):
    model = student(shape)
    tokens_BT = some_tokens()
    with torch.no_grad():
        whole_BTV = model(tokens_BT)
        cache = model.new_cache(2, 11)
        parts = [model(chunk, cache) for chunk in tokens_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=1e-4, atol=1e-4)


def test_every_weight_gets_a_finite_gradient():
    model = student()
    model(some_tokens()).logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_the_gradients_equal_those_of_a_model_written_out_plainly():
    model = student(replace(SHAPE, layers=1))
    tokens_BT = some_tokens()

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(x_BTHd):  # as complex numbers, pairing (i, i + d/2)
        half = x_BTHd.shape[-1] // 2
        angle = torch.outer(torch.arange(x_BTHd.shape[1]).float(), 10000.0 ** -(torch.arange(half) / half))
        z = (
            torch.complex(x_BTHd[..., :half], x_BTHd[..., half:])
            * torch.polar(torch.ones(()), angle)[:, None]
        )
        return torch.cat([z.real, z.imag], dim=-1)

    def plain(model, tokens_BT):
        block = model.blocks[0]
        a, x = block.attention, model.embedding.weight[tokens_BT]
        h = norm(x, block.attention_norm.weight)
        q = turned(norm((h @ a.query.weight.T).view(2, 11, 4, 8), a.query_norm.weight))
        k = turned(norm((h @ a.key.weight.T).view(2, 11, 2, 8), a.key_norm.weight))
        v = (h @ a.value.weight.T).view(2, 11, 2, 8)
        heads = []
        for head in range(4):
            score = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / 8**0.5
            future = torch.ones(11, 11, dtype=torch.bool).triu(1)
            heads.append(score.masked_fill(future, float("-inf")).softmax(-1) @ v[:, :, head // 2])
        x = x + torch.cat(heads, dim=-1) @ a.output.weight.T
        gate, up = (norm(x, block.mlp_norm.weight) @ block.mlp.gate_up.weight.T).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ block.mlp.down.weight.T
        return norm(x, model.norm.weight) @ model.head.weight.T

    fast_BTV, plain_BTV = model(tokens_BT), plain(model, tokens_BT)
    torch.testing.assert_close(fast_BTV, plain_BTV, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    fast = torch.autograd.grad(fast_BTV.square().mean(), parameters)
    slow = torch.autograd.grad(plain_BTV.square().mean(), parameters)
    for fast_grad, slow_grad in zip(fast, slow, strict=True):
        assert (fast_grad - slow_grad).norm() < 1e-4 * slow_grad.norm()


def test_bfloat16_autocast_stays_close_to_float32():
    model = new_model(SHAPE, 0)
    with torch.no_grad():
        exact = model(some_tokens())
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(some_tokens())
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_a_loss_on_hidden_states_is_an_objective_that_names_layers():
    """A newcomer's objective: the student's first block imitates a block of a teacher."""
    from tests.test_teacher import teacher

    model, larger, tokens_BT1 = student(), teacher(), some_tokens()
    into_teacher = torch.nn.Linear(32, 32, bias=False)

    def imitation(model, tokens_BT1):
        inputs_BT, _ = split_targets(tokens_BT1)
        with torch.no_grad():
            target_BTD = larger.features(inputs_BT, layers=(1,)).hidden[1]
        return Outcome(F.mse_loss(into_teacher(model.features(inputs_BT, layers=(0,)).hidden[0]), target_BTD), {})

    imitation(model, tokens_BT1).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.blocks[0].parameters())
    assert all(parameter.grad is None for parameter in model.blocks[1].parameters())

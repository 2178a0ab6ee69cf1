"""The teacher: causality, latent cache, balancing, initialisation."""

from dataclasses import replace

import pytest
import torch

from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.hub import new_model

SHAPE = TeacherShape(
    vocab_size=40,
    sequence_tokens=32,
    layers=3,
    dense_layers=1,
    width=32,
    heads=3,
    nope_head_dim=8,
    rope_head_dim=4,
    value_head_dim=12,
    latent_width=20,
    dense_width=48,
    experts=6,
    experts_per_token=2,
    shared_experts=1,
    expert_width=16,
    gating="sigmoid",
    route_scale=1.0,
    rope_theta=10000.0,
)
ODD_SHAPES = [
    SHAPE,
    replace(SHAPE, value_head_dim=7, heads=5, expert_width=11, dense_width=29),  # what pruning may leave
    replace(SHAPE, value_head_dim=18, shared_experts=2, experts_per_token=6),
    replace(SHAPE, gating="softmax", shared_experts=0, dense_layers=0),
]


def teacher(shape=SHAPE, seed=0):
    model = new_model(shape, seed)
    with torch.no_grad():  # weights large enough that a mistake shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def some_tokens(batch=2, count=11, seed=0):
    return torch.randint(0, 40, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_token_sees_nothing_that_follows_it(shape):
    model = teacher(shape)
    tokens_BT = some_tokens()
    changed_BT = tokens_BT.clone()
    changed_BT[:, 6] = (changed_BT[:, 6] + 1) % 40
    with torch.no_grad():
        logits_BTV, changed_BTV = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(logits_BTV[:, :6], changed_BTV[:, :6])
    assert ((logits_BTV[:, 6:] - changed_BTV[:, 6:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 4, 1], [11]])
def test_decoding_with_the_latent_cache_equals_the_whole_forward(shape, chunks):
    model = teacher(shape)
    tokens_BT = some_tokens()
    with torch.no_grad():
        whole_BTV = model(tokens_BT)
        cache = model.new_cache(2, 11)
        parts = [model(chunk, cache) for chunk in tokens_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=1e-4, atol=1e-4)


def test_the_cache_keeps_one_latent_and_one_rotated_key_per_token_whatever_the_heads():
    for heads in (1, 7):
        cache = new_model(replace(SHAPE, heads=heads), 0).new_cache(2, 5)
        assert [buffer.shape for buffer in cache[0].buffers] == [(2, 5, 20), (2, 5, 4)]


def test_a_full_cache_refuses_another_token():
    model = teacher()
    cache = model.new_cache(2, 3)
    with pytest.raises(ValueError, match="holds 3 tokens; 4 were fed"), torch.no_grad():
        model(some_tokens(count=4), cache)


def test_each_moe_layer_returns_its_routing():
    routings = teacher().features(some_tokens()).routings
    assert len(routings) == 2
    assert all(routing.load_E.sum() == 2 * 11 * 2 for routing in routings)


def test_every_weight_gets_a_finite_gradient():
    model = teacher()
    x_BTD, routings, _ = model.features(some_tokens(batch=8))
    (model.head(x_BTD).logsumexp(-1).mean() + sum(routing.balance_loss for routing in routings)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_checkpointed_blocks_give_the_same_gradients_and_count_each_token_once():
    from torch.utils.checkpoint import checkpoint

    grads, loads = [], []
    for wrapped in (False, True):
        model = teacher()
        if wrapped:
            for block in model.blocks:
                plain = block.forward
                block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
        x_BTD, routings, _ = model.features(some_tokens())
        grads.append(torch.autograd.grad(x_BTD.square().sum(), list(model.blocks.parameters())))
        loads.append(torch.stack([routing.load_E for routing in routings]))
    assert torch.equal(*loads)
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


def test_bfloat16_autocast_stays_close_to_float32():
    model = new_model(SHAPE, 0)
    with torch.no_grad():
        exact = model(some_tokens())
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(some_tokens())
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_balancing_raises_the_bias_of_starved_experts_and_softmax_gating_has_none():
    loads = [torch.tensor([10.0, 0, 4, 4, 4, 2]), torch.tensor([0.0, 10, 4, 4, 4, 2])]
    model = teacher()
    model.balance(loads, rate=0.1)
    first, second = (block.mlp.bias for block in model.blocks if hasattr(block.mlp, "bias"))
    assert first[1] > 0 > first[0] and second[0] > 0 > second[1]
    assert first.sum().abs() < 1e-6
    softmax = teacher(replace(SHAPE, gating="softmax"))
    softmax.balance(loads, rate=0.1)
    assert not any(block.mlp.bias.any() for block in softmax.blocks[1:])


def test_initial_weights_depend_on_the_seed_alone_and_disturb_no_other_random_numbers():
    torch.manual_seed(5)
    first = new_model(SHAPE, 1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(99)
    same, other = new_model(SHAPE, 1), new_model(SHAPE, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.head.weight, other.head.weight)


def test_matrices_that_write_to_the_residual_stream_start_smaller_with_depth():
    model = new_model(replace(SHAPE, layers=8, width=128), 0)
    block = model.blocks[-1]
    for weight in (block.attention.output.weight, block.mlp.down, block.mlp.shared.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    for weight in (block.attention.query.weight, block.mlp.gate_up, block.mlp.router_weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.embedding.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_features_give_the_hidden_states_of_the_named_layers_and_of_no_others():
    model, tokens_BT = teacher(), some_tokens()
    with torch.no_grad():
        plain, asked = model.features(tokens_BT), model.features(tokens_BT, layers=(0, 2))
    assert plain.hidden == {} and list(asked.hidden) == [0, 2]
    assert torch.equal(plain.x_BTD, asked.x_BTD) and torch.equal(model.norm(asked.hidden[2]), asked.x_BTD)
    assert asked.hidden[0].shape == (2, 11, 32) and not torch.equal(asked.hidden[0], asked.hidden[2])


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"layers \[3\]: this model's layers are 0 to 2"):
        teacher().features(some_tokens(), layers=(1, 3))

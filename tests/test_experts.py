"""Experts: the router's choice, its balance, and the sorted experts against a slow loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import stages.model.kernels.experts
from stages.model.experts import MoE, balance_loss, balanced_bias, route
from stages.model.kernels.dispatch import Operation
from stages.model.kernels.experts import SortedExperts, routed_experts
from stages.model.kernels.routing import (
    chosen_scores,
    is_expert,
    loads,
    permutation,
    softmax_over_experts,
    top_experts,
)
from stages.model.kernels.rows import BLOCK_ROWS, PRODUCTS, Products, pads_rows, sum_over_choices
from stages.model.kernels.threads import one_thread

GATINGS = ("sigmoid", "softmax")


def moe(
    gating="sigmoid", width=16, expert_width=8, experts=6, per_token=2, shared=1, route_scale=1.5, seed=0
):
    torch.manual_seed(seed)
    layer = MoE(width, expert_width, experts, per_token, shared, gating, route_scale)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(layer.bias, std=0.1)
    return layer


def slow_moe(layer, x_BTD):
    """The definition, one token and one expert at a time, through plain autograd."""
    rows = []
    for x_D in x_BTD.flatten(0, 1):
        logit_E = layer.router_weight @ x_D
        score_E = logit_E.sigmoid() if layer.gating == "sigmoid" else logit_E.softmax(-1)
        choice_E = score_E + layer.bias if layer.gating == "sigmoid" else score_E
        chosen = choice_E.argsort(descending=True)[: layer.experts_per_token]
        total = score_E[chosen].sum()
        y_D = torch.zeros_like(x_D)
        for expert in chosen:
            gate_F, up_F = (layer.gate_up[expert] @ x_D).chunk(2)
            weight = score_E[expert] / total * layer.route_scale
            y_D = y_D + weight * (layer.down[expert] @ (F.silu(gate_F) * up_F))
        if layer.shared is not None:
            gate_F, up_F = (layer.shared.gate_up.weight @ x_D).chunk(2)
            y_D = y_D + layer.shared.down.weight @ (F.silu(gate_F) * up_F)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BTD)


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 12),
    data=st.data(),
    gating=st.sampled_from(GATINGS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_router_sends_each_token_to_exactly_k_experts(tokens, experts, data, gating, seed):
    per_token = data.draw(st.integers(1, experts))
    layer = moe(gating, experts=experts, per_token=per_token, seed=seed)
    _, routing = layer(torch.randn(1, tokens, 16))
    assert routing.expert_index_NK.shape == (tokens, per_token)
    assert all(len(set(row)) == per_token for row in routing.expert_index_NK.tolist())
    assert torch.equal(
        routing.load_E, torch.bincount(routing.expert_index_NK.flatten(), minlength=experts).float()
    )
    assert routing.load_E.sum() == tokens * per_token


@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (64, 6), (5, 5)])
def test_the_top_experts_are_those_of_topk(experts, per_token):
    score_NE = torch.randn(2000, experts, generator=torch.Generator().manual_seed(0))
    score_NE[:100] = 0.0  # where all are equal, any, but each once
    index_NK = top_experts(score_NE, per_token)
    assert torch.equal(score_NE.gather(1, index_NK), score_NE.topk(per_token, dim=1).values)
    assert all(len(set(row)) == per_token for row in index_NK[:100].tolist())


def test_scores_that_are_not_numbers_still_name_experts():
    index_NK = top_experts(torch.full((300, 6), torch.nan), 2)
    assert index_NK.min() >= 0 and index_NK.max() < 6  # the loss is refused later, with its step


@pytest.mark.parametrize("gating", GATINGS)
def test_gate_weights_are_positive_and_sum_to_the_route_scale(gating):
    layer = moe(gating, route_scale=2.5)
    gates = layer.gates(torch.randn(50, 16))
    assert (gates.weight_NK > 0).all()
    torch.testing.assert_close(gates.weight_NK.sum(-1), torch.full((50,), 2.5))


def test_softmax_scores_are_a_distribution_over_all_experts():
    score_NE = moe("softmax").gates(torch.randn(50, 16)).score_NE
    torch.testing.assert_close(score_NE.sum(-1), torch.ones(50))


def test_the_bias_chooses_experts_but_never_weighs_them():
    x_ND, router_ED = torch.randn(20, 16), torch.randn(4, 16)
    bias_E = torch.tensor([10.0, 10.0, 0.0, 0.0])
    gates = route(x_ND, router_ED, bias_E, 2, "sigmoid", 1.0)
    assert set(gates.expert_index_NK.flatten().tolist()) == {0, 1}
    score_NK = (x_ND @ router_ED.T).sigmoid().gather(1, gates.expert_index_NK)
    torch.testing.assert_close(gates.weight_NK, score_NK / score_NK.sum(-1, keepdim=True))


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_sorted_experts_equal_a_loop_over_experts_in_values_and_gradients(
    gating, shared, kernel, monkeypatch
):
    monkeypatch.setattr("stages.model.experts.routed_experts", routed_experts[f"sorted_{kernel}"])
    layer = moe(gating, shared=shared)
    grad_BTD = torch.randn(3, 7, 16)
    results = []
    for compute in (lambda x: layer(x)[0], lambda x: slow_moe(layer, x)):
        layer.zero_grad()
        x_BTD = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y_BTD = compute(x_BTD)
        y_BTD.backward(grad_BTD)
        results.append(
            [y_BTD.detach(), x_BTD.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
        )
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_sorted_experts_pass_a_numerical_gradient_check():
    generator = torch.Generator().manual_seed(0)
    x, w, gate_up, down = (
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in [(5, 4), (5, 2), (3, 6, 4), (3, 4, 3)]
    )
    index_NK = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])  # expert 2 receives nothing
    load_E = torch.tensor([5.0, 5.0, 0.0])

    def experts(x, w, gate_up, down):
        return SortedExperts.apply(x, w, gate_up, down, index_NK, load_E, "loop")

    torch.autograd.gradcheck(experts, (x, w, gate_up, down))


def test_a_weight_that_underflowed_to_zero_gets_a_zero_gradient():
    x, gate_up, down = torch.randn(5, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    w = torch.tensor([[1.0, 0.0]] * 5).requires_grad_()
    index_NK, load_E = torch.tensor([[0, 1]] * 5), torch.tensor([5.0, 5.0, 0.0])
    SortedExperts.apply(x, w, gate_up, down, index_NK, load_E, "loop").sum().backward()
    assert (w.grad[:, 1] == 0).all() and (w.grad[:, 0] != 0).all()


def test_padding_rows_change_no_number_and_leave_few_sizes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(size, generator=generator) for size in [(400, 8), (5, 12, 8), (5, 8, 6)])
    w = torch.rand(400, 2, generator=generator)
    index_NK = torch.rand(400, 4, generator=generator).topk(2).indices  # expert 4 receives nothing
    load_E = torch.bincount(index_NK.flatten(), minlength=5).float()
    sizes, results = [], []
    loop = PRODUCTS["loop"]

    def counted(rows, weight, load_E):
        sizes.append(load_E.tolist())
        return loop.rows_times_experts(rows, weight, load_E)

    monkeypatch.setitem(PRODUCTS, "loop", Products(counted, loop.outer_per_expert))
    for pads in (True, False):
        monkeypatch.setattr(stages.model.kernels.experts, "pads_rows", lambda *_, pads=pads: pads)
        parts = [part.clone().requires_grad_() for part in (x, w, gate_up, down)]
        y_ND = SortedExperts.apply(*parts, index_NK, load_E, "loop")
        y_ND.square().sum().backward()
        results.append([y_ND.detach(), *(part.grad for part in parts)])
    for padded, plain in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-3, atol=1e-3)
    assert all(size % BLOCK_ROWS == 0 for size in sizes[0]) and sizes[0][4] == 0
    assert sizes[-1] == load_E.tolist() != sizes[0]


def test_only_many_bfloat16_rows_are_padded_on_cpu():
    index_NK = torch.zeros(64, 2, dtype=torch.long)
    assert pads_rows(torch.zeros(64, 8).bfloat16(), index_NK, 4)
    assert not pads_rows(torch.zeros(64, 8).bfloat16(), index_NK, 5)  # as in decoding
    assert not pads_rows(torch.zeros(64, 8), index_NK, 4)


@pytest.mark.parametrize("gating", GATINGS)
def test_an_expert_without_tokens_gets_a_zero_gradient(gating):
    layer = moe(gating, experts=12, per_token=1)
    y_BTD, routing = layer(torch.randn(1, 2, 16))
    y_BTD.sum().backward()
    idle = routing.load_E == 0
    assert idle.any() and (layer.down.grad[idle] == 0).all() and (layer.gate_up.grad[idle] == 0).all()


def test_the_router_stays_in_float32_under_autocast():
    layer = moe()
    x_BTD = torch.randn(2, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, routing = layer(x_BTD)
        gates = layer.gates(x_BTD.flatten(0, 1))
    plain = layer.gates(x_BTD.flatten(0, 1))
    assert y_BTD.dtype == torch.bfloat16
    assert gates.score_NE.dtype == torch.float32 and torch.equal(gates.score_NE, plain.score_NE)
    assert torch.equal(routing.expert_index_NK, plain.expert_index_NK)


def test_bfloat16_experts_stay_close_to_float32_and_give_float32_gradients():
    layer = moe(width=32, expert_width=16)
    x_BTD = torch.randn(4, 32, 32)
    exact_BTD, _ = layer(x_BTD)
    exact_grads = torch.autograd.grad(exact_BTD.square().mean(), list(layer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, _ = layer(x_BTD)
    grads = torch.autograd.grad(y_BTD.float().square().mean(), list(layer.parameters()))
    assert (y_BTD - exact_BTD).norm() < 0.02 * exact_BTD.norm()
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("gating", GATINGS)
def test_balance_loss_is_one_for_an_even_load_and_grows_with_skew(gating):
    even_NK = torch.arange(8).view(4, 2).repeat(2, 1)  # two sequences of four tokens over eight experts
    flat_NE = torch.full((8, 8), 0.5 if gating == "sigmoid" else 1 / 8)
    groups = 2 if gating == "sigmoid" else 1
    load_GE = loads(even_NK, 8, groups)
    assert load_GE.tolist() == [[2.0 / groups] * 8] * groups
    torch.testing.assert_close(balance_loss(load_GE, flat_NE, gating), torch.tensor(1.0))
    skewed_NE = torch.full((8, 8), 0.01)
    skewed_NE[:, :2] = 0.47
    assert balance_loss(loads(torch.tensor([[0, 1]]).expand(8, 2), 8, groups), skewed_NE, gating) > 2


def test_sigmoid_balance_is_judged_per_sequence_and_softmax_balance_over_the_batch():
    index_NK = torch.tensor([[0], [0], [1], [1]])  # even over the batch, skewed in each sequence
    score_NE = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    assert balance_loss(loads(index_NK, 2, 2), score_NE, "sigmoid") == pytest.approx(1.8)
    assert balance_loss(loads(index_NK, 2), score_NE, "softmax") == pytest.approx(1.0)


@pytest.mark.parametrize("gating", GATINGS)
def test_the_layer_gives_its_balance_loss_where_gradients_are_wanted(gating):
    layer, x_BTD = moe(gating), torch.randn(3, 5, 16)
    _, routing = layer(x_BTD)
    parts = x_BTD if gating == "sigmoid" else x_BTD.view(1, 15, 16)
    gates = [layer.gates(part_TD) for part_TD in parts]
    losses = [balance_loss(loads(part.expert_index_NK, 6), part.score_NE, gating) for part in gates]
    torch.testing.assert_close(routing.balance_loss, torch.stack(losses).mean())
    assert routing.load_E.tolist() == sum(loads(part.expert_index_NK, 6)[0] for part in gates).tolist()
    with torch.no_grad():
        assert layer(x_BTD)[1].balance_loss is None


def test_bias_updates_even_out_a_skewed_load():
    generator = torch.Generator().manual_seed(0)
    x_ND, router_ED = (
        torch.randn(512, 16, generator=generator) + 0.5,
        torch.randn(8, 16, generator=generator) * 0.3,
    )
    router_ED[0] += 0.3  # everybody's favourite
    bias_E = torch.zeros(8)
    worst = []
    for _ in range(300):
        index_NK = route(x_ND, router_ED, bias_E, 2, "sigmoid", 1.0).expert_index_NK
        load_E = torch.bincount(index_NK.flatten(), minlength=8).float()
        worst.append((load_E.max() / load_E.mean() - 1).item())
        bias_E = balanced_bias(bias_E, load_E, rate=0.01)
    assert worst[0] > 1 and worst[-1] < 0.3
    assert bias_E.sum().abs() < 1e-4  # centred


def test_running_a_layer_twice_changes_nothing_in_it():
    layer = moe()
    before = {name: part.clone() for name, part in layer.state_dict().items()}
    attributes = dict(vars(layer))
    x_BTD = torch.randn(2, 5, 16)
    first, second = layer(x_BTD), layer(x_BTD)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1].load_E, second[1].load_E)
    assert all(torch.equal(before[name], part) for name, part in layer.state_dict().items())
    assert attributes == vars(layer)


def test_activation_checkpointing_gives_the_same_gradients_and_loads():
    layer = moe()
    x_BTD = torch.randn(2, 9, 16)
    grads, loads = [], []
    for wrap in (
        lambda x: layer(x),
        lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
    ):
        y_BTD, routing = wrap(x_BTD)
        grads.append(
            torch.autograd.grad(y_BTD.square().sum() + routing.balance_loss, list(layer.parameters()))
        )
        loads.append(routing.load_E)
    assert torch.equal(*loads)
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


class OnCuda(torch.Tensor):
    """Says that it lies on a GPU, for conditions that look at nothing else."""

    is_cuda = True


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "on_gpu", "gradients", "kernel"),
    [
        (1, 8, torch.bfloat16, False, False, "one_token"),
        (1, 8, torch.bfloat16, False, True, "sorted_loop"),
        (2, 8, torch.bfloat16, False, False, "sorted_loop"),
        (8, 8, torch.bfloat16, True, False, "gathered"),
        (9, 8, torch.bfloat16, True, False, "sorted_grouped"),
        (1, 8, torch.bfloat16, True, True, "sorted_grouped"),
        (1, 9, torch.bfloat16, True, True, "sorted_loop"),  # grouped_mm reads 16 bytes at a time
        (1, 8, torch.float32, True, True, "sorted_loop"),
    ],
)
def test_the_kernel_of_the_experts_depends_on_device_dtype_and_sizes(tokens, width, dtype, on_gpu, gradients, kernel):
    x_ND, down_EDF = torch.zeros(tokens, 16, dtype=dtype), torch.zeros(4, 16, width)
    if on_gpu:
        x_ND = x_ND.as_subclass(OnCuda)
    with torch.set_grad_enabled(gradients):
        assert routed_experts.chosen(x_ND, None, None, down_EDF, None, None).name == kernel


def test_a_kernel_is_added_by_one_function_and_its_condition(monkeypatch):
    monkeypatch.setattr(routed_experts, "kernels", list(routed_experts.kernels))

    @routed_experts.kernel(when=lambda x_ND, *_: len(x_ND) == 10, first=True)
    def one_expert_at_a_time(x_ND, weight_NK, gate_up_E2FD, down_EDF, index_NK, load_E):
        y_ND = torch.zeros_like(x_ND)
        for expert in range(len(load_E)):
            gate_NF, up_NF = (x_ND @ gate_up_E2FD[expert].T).chunk(2, dim=-1)
            weight_N1 = (weight_NK * (index_NK == expert)).sum(dim=1, keepdim=True)
            y_ND = y_ND + weight_N1 * (F.silu(gate_NF) * up_NF) @ down_EDF[expert].T
        return y_ND

    layer, x_BTD = moe(), torch.randn(2, 5, 16)
    with_new, _ = layer(x_BTD)
    monkeypatch.undo()
    assert routed_experts.chosen(x_BTD[0], None, None, layer.down).name == "sorted_loop"
    torch.testing.assert_close(with_new, layer(x_BTD)[0])
    assert not torch.equal(with_new, layer(x_BTD)[0])  # another order of sums: the new one did run


def test_an_operation_without_a_kernel_for_its_operands_says_so():
    with pytest.raises(NotImplementedError, match="twist: no kernel for these operands"):
        Operation("twist")(torch.zeros(1))


def test_the_routers_kernels_for_cpu_and_gpu_give_the_same():
    generator = torch.Generator().manual_seed(0)
    score_NE = torch.rand(300, 6, generator=generator)
    index_NK = score_NE.topk(2).indices
    assert torch.equal(loads["counted_by_scatter"](index_NK, 6, 3), loads["counted_by_mask"](index_NK, 6, 3))
    assert torch.equal(chosen_scores["by_gather"](score_NE, index_NK), chosen_scores["by_mask"](score_NE, index_NK))
    torch.testing.assert_close(*(kernel.compute(score_NE) for kernel in softmax_over_experts.kernels))
    for one, other in zip(*(kernel.compute(index_NK) for kernel in permutation.kernels), strict=True):
        assert torch.equal(one, other)
    fast, slow = (
        is_expert(top_experts[name](score_NE, 2), 6).any(dim=1) for name in ("by_maxima", "by_topk")
    )
    assert torch.equal(fast, slow)
    rows_MD, weight_NK = torch.randn(600, 4, generator=generator), torch.rand(300, 2, generator=generator)
    inverse_NK = torch.randperm(600, generator=generator).view(300, 2)
    torch.testing.assert_close(*(kernel.compute(rows_MD, inverse_NK, weight_NK) for kernel in sum_over_choices.kernels))


def test_the_permutation_is_the_stable_sort_by_expert_and_its_inverse():
    index_NK = torch.randint(0, 40, (57, 3), generator=torch.Generator().manual_seed(0))
    order_M, inverse_M = permutation(index_NK)
    assert torch.equal(order_M, index_NK.flatten().argsort(stable=True))
    assert torch.equal(order_M[inverse_M], torch.arange(57 * 3))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_router_leaves_the_number_of_threads_as_it_was(threads):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ZeroDivisionError), one_thread(torch.device("cpu")):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError
        assert seen == [1 if threads == 2 else threads] and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("unsorted", "tokens"), [("gathered", 5), ("one_token", 1)])
def test_what_is_not_sorted_gives_what_sorted_rows_give(unsorted, tokens):
    layer, x_ND = moe(experts=6, per_token=3), torch.randn(tokens, 16)
    gates = layer.gates(x_ND)
    operands = x_ND, gates.weight_NK, layer.gate_up, layer.down, gates.expert_index_NK
    load_E = loads(gates.expert_index_NK, 6)[0]
    result = routed_experts[unsorted](*operands, load_E)
    torch.testing.assert_close(result, routed_experts["sorted_loop"](*operands, load_E))


def test_a_single_token_read_without_gradients_is_not_sorted(monkeypatch):
    layer, x_BTD = moe(), torch.randn(1, 1, 16)
    sorted_BTD, _ = layer(x_BTD)  # with gradients
    monkeypatch.setattr("stages.model.kernels.experts.permutation", lambda index_NK: pytest.fail("sorted"))
    with torch.no_grad():
        torch.testing.assert_close(layer(x_BTD)[0], sorted_BTD)

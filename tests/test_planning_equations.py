"""The planner's equations: limits, directions in which each must grow, and the figures of the papers they come from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.planning import collectives, compute, parallelism, reliability

sizes = st.floats(1e3, 1e12)
bandwidths = st.floats(1e6, 1e12)
latencies = st.floats(0, 1e-3)
ranks = st.integers(2, 4096)
more = st.floats(1.01, 100)


# ---- collectives


@given(sizes, ranks, bandwidths, latencies, more)
def test_a_ring_takes_longer_with_more_bytes_ranks_and_latency_and_shorter_with_more_bandwidth(s, n, b, a, factor):
    base = collectives.ring_all_reduce_seconds(s, n, b, a)
    assert collectives.ring_all_reduce_seconds(s * factor, n, b, a) > base
    assert collectives.ring_all_reduce_seconds(s, n + 1, b, a) > base
    assert collectives.ring_all_reduce_seconds(s, n, b, a + 1e-6) > base
    assert collectives.ring_all_reduce_seconds(s, n, b * factor, a) < base or a > 0


@given(sizes, bandwidths, latencies)
def test_one_rank_alone_sends_and_waits_for_nothing(s, b, a):
    assert collectives.ring_all_reduce_seconds(s, 1, b, a) == 0
    assert collectives.ring_wire_bytes(s, 1) == 0
    assert collectives.tree_all_reduce_seconds(s, 1, 1, b, a, a) == 0
    assert collectives.hierarchical_all_reduce_seconds(s, 1, 1, b, b, a, a) == 0
    assert collectives.all_to_all_seconds(s, 1, b, a) == 0


@given(sizes, ranks, bandwidths)
def test_a_ring_never_moves_more_than_the_tensor_twice_and_a_gather_is_half_a_reduce(s, n, b):
    assert s <= collectives.ring_wire_bytes(s, n) < 2 * s
    assert collectives.ring_all_gather_seconds(s, n, b, 0) * 2 == pytest.approx(
        collectives.ring_all_reduce_seconds(s, n, b, 0)
    )


@given(sizes, st.integers(2, 512), st.integers(1, 8), bandwidths, latencies)
def test_a_trees_latency_grows_with_the_logarithm_of_nodes_a_rings_with_their_number(s, nodes, g, b, a):
    def added(function, *sizes_of):
        return function(*sizes_of, b, a, a) - function(*sizes_of, b, 0, 0)

    tree = added(collectives.tree_all_reduce_seconds, s, nodes, g)
    assert tree == pytest.approx(2 * a * (g - 1 + math.log2(nodes)), abs=1e-6 * s / b + 1e-12)


@given(sizes, st.integers(2, 64), st.integers(2, 16), bandwidths, latencies)
def test_a_hierarchy_over_equal_links_sends_no_more_than_a_flat_ring_and_waits_less(s, nodes, g, b, a):
    flat = collectives.ring_all_reduce_seconds(s, nodes * g, b, a)
    assert collectives.hierarchical_all_reduce_seconds(s, nodes, g, b, b, a, a) <= flat * (1 + 1e-9)


@given(sizes, st.integers(1, 64), bandwidths, latencies)
def test_a_hierarchy_of_one_chip_a_node_is_the_ring_across_and_of_one_node_the_ring_inside(s, n, b, a):
    ring = collectives.ring_all_reduce_seconds(s, n, b, a)
    assert collectives.hierarchical_all_reduce_parts(s, n, 1, None, b, a, a) == (0, pytest.approx(ring))
    assert collectives.hierarchical_all_reduce_parts(s, 1, n, b, None, a, a) == (pytest.approx(ring), 0)


def test_a_ring_that_leaves_the_node_once_for_each_chip_has_an_eighth_of_its_bandwidth():
    assert collectives.flat_ring_bandwidth(100e9, 8) == 12.5e9


@given(sizes, ranks, bandwidths, latencies)
def test_all_to_all_keeps_what_is_for_the_rank_itself(s, n, b, a):
    assert collectives.all_to_all_seconds(s, n, b, 0) < s / b
    assert collectives.all_to_all_seconds(s, n + 1, b, a) > collectives.all_to_all_seconds(s, n, b, a)


# ---- compute


@given(st.floats(1e6, 1e12), st.integers(1, 200), st.integers(1, 32768), st.integers(1, 131072))
def test_attention_adds_to_six_operations_a_parameter_and_causal_attention_half_as_much(n, layers, width, tokens):
    whole = compute.training_flops_per_token(n, layers, width, tokens, causal=False)
    causal = compute.training_flops_per_token(n, layers, width, tokens)
    assert 6 * n < causal < whole
    assert whole - 6 * n == pytest.approx(2 * (causal - 6 * n), rel=1e-6, abs=1e-3 * n)
    assert compute.training_flops_per_token(n, layers, width, tokens + 1) > causal


@pytest.mark.parametrize(  # llm-foundry, 512 H100, full attention: published MFU
    ("parameters", "layers", "width", "tokens_per_second", "mfu_percent"),
    [
        (64862437376, 80, 8192, 515636, 41.25),
        (6658859008, 32, 4096, 4951479, 42.2),
        (1315950592, 24, 2048, 20396905, 36.65),
    ],
)
def test_the_published_mfu_of_llm_foundry_follows_from_its_tokens(
    parameters, layers, width, tokens_per_second, mfu_percent
):
    flops = compute.training_flops_per_token(parameters, layers, width, 2048, causal=False)
    share = compute.model_flops_utilization(tokens_per_second / 512, flops, 989e12)
    assert 100 * share == pytest.approx(mfu_percent, rel=1e-3)  # the publisher takes 989.5 TFLOP/s


@given(st.floats(1, 1e9), st.floats(1e6, 1e13), st.floats(1e9, 1e16), st.floats(0.01, 1))
def test_the_time_of_computing_gives_its_utilization_back(tokens, flops, peak, share):
    seconds = compute.compute_seconds(tokens, flops, peak, share)
    assert compute.model_flops_utilization(tokens / seconds, flops, peak) == pytest.approx(share)


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.integers(2, 512), st.data())
def test_routed_parameters_are_found_again_from_total_and_active(dense, routed, experts, data):
    k = data.draw(st.integers(1, experts - 1))
    active = dense + routed * k / experts
    assert compute.routed_parameters(dense + routed, active, experts, k) == pytest.approx(routed, rel=1e-4)


# ---- parallelism


@given(st.integers(1, 64), st.integers(1, 16))
def test_the_bubble_is_gone_without_a_pipeline_and_shrinks_with_interleaving(p, v):
    assert parallelism.pipeline_bubble_micro_batches(1, v) == 0
    assert parallelism.pipeline_bubble_micro_batches(p + 1, v) > parallelism.pipeline_bubble_micro_batches(p, v)
    assert parallelism.pipeline_bubble_micro_batches(p + 1, v + 1) < parallelism.pipeline_bubble_micro_batches(p + 1, v)


def test_the_bubble_of_dual_pipe_is_that_of_the_deepseek_v3_report():
    # p = 8, F&B = 2, B = 2 (input and weights), W = 1: (4 - 1)(2 + 2 - 3) = 3
    assert parallelism.dual_pipe_bubble_seconds(8, 2.0, 2.0, 1.0) == 3.0
    assert parallelism.dual_pipe_bubble_seconds(2, 2.0, 2.0, 1.0) == 0.0


@given(st.integers(1, 64))
def test_fsdp_moves_half_as_much_again_as_an_all_reduce_and_more_with_each_micro_batch(m):
    each = [parallelism.data_parallel_bytes_per_parameter(stage, 1, 2, 2) for stage in (0, 1, 2, 3)]
    assert each == [4, 4, 4, 6]  # ZeRO, section 7: 2, 2, 2 and 3 times the parameters, at 2 bytes
    assert parallelism.data_parallel_bytes_per_parameter(3, m, 2, 2) == 4 * m + 2
    assert parallelism.data_parallel_bytes_per_parameter(1, m, 2, 2) == 4


@given(st.floats(1e6, 1e12), st.integers(1, 4096), st.floats(1, 16))
def test_replicas_send_nothing_alone_and_never_more_than_all(parameters, n, each):
    sent = parallelism.data_parallel_wire_bytes(parameters, n, each)
    assert 0 <= sent < parameters * each
    assert parallelism.data_parallel_wire_bytes(parameters, 1, each) == 0
    assert parallelism.data_parallel_wire_bytes(parameters, n + 1, each) > sent


@given(st.integers(1, 10**6), st.integers(1, 20000), st.integers(1, 200), st.integers(1, 64))
def test_tensor_parallel_traffic_is_four_all_reduces_a_layer(tokens, width, layers, n):
    sent = parallelism.tensor_parallel_wire_bytes(tokens, width, layers, n, 2)
    assert sent == pytest.approx(4 * layers * collectives.ring_wire_bytes(2 * tokens * width, n))


@given(st.integers(1, 10**6), st.integers(1, 20000), st.integers(1, 16))
def test_interleaving_multiplies_the_pipelines_traffic(tokens, width, v):
    once = parallelism.pipeline_wire_bytes(tokens, width, 1, 2)
    assert parallelism.pipeline_wire_bytes(tokens, width, v, 2) == v * once == v * 4 * tokens * width


def test_deepseek_v3_sends_as_many_bytes_a_token_as_its_report_implies():
    # 58 mixture layers, at most 4 of 8 nodes, FP8 out and BF16 back: 8.73 MB (research notes, section 2.2)
    sent = parallelism.moe_wire_bytes_per_token(7168, 58, 4, 8, 1, 2)
    assert sent == pytest.approx(8.73e6, rel=1e-3)


@given(st.integers(1, 8), st.integers(1, 256))
def test_a_node_limit_saves_traffic_and_one_rank_of_experts_has_none(m, n):
    def sent(copies, ranks):
        return parallelism.moe_wire_bytes_per_token(4096, 32, copies, ranks, 2, 2)

    assert sent(m, 1) == 0
    assert sent(m, n + 1) < sent(m + 1, n + 1)
    assert sent(m, n + 2) > sent(m, n + 1)


# ---- reliability


@given(st.floats(1, 3600), st.floats(1e4, 1e8), more)
def test_youngs_interval_loses_less_than_its_neighbours(w, mtbf, factor):
    best = reliability.young_interval_seconds(w, mtbf)
    assert best == pytest.approx(math.sqrt(2 * w * mtbf))

    def lost(interval):  # Young's own first-order loss: a checkpoint an interval, half an interval a failure
        return w / interval + interval / (2 * mtbf)

    assert lost(best) <= min(lost(best * factor), lost(best / factor)) * (1 + 1e-9)


@given(st.floats(0.1, 600), st.floats(60, 1e5), st.floats(1e3, 1e8), st.floats(0, 3600), more)
def test_goodput_is_a_share_and_falls_with_failures_restarts_and_slow_checkpoints(w, interval, mtbf, restart, factor):
    share = reliability.goodput(w, interval, mtbf, restart)
    assert 0 <= share <= 1
    assert reliability.goodput(w, interval, mtbf * factor, restart) >= share
    assert reliability.goodput(w, interval, mtbf, restart + 60) <= share
    assert reliability.goodput(w * factor, interval, mtbf, restart) <= share


@given(st.floats(1, 1e4))
def test_a_machine_that_never_fails_loses_its_checkpoints_only(interval):
    assert reliability.goodput(10.0, interval, 1e18, 600.0) == pytest.approx(interval / (interval + 10.0))


def test_the_published_failure_rates_give_the_published_times():
    # Llama 3: 419 interruptions in 54 days of 16,384 GPUs: one in about 3 hours (arXiv 2407.21783)
    assert reliability.mtbf_seconds(2048, 419 / 54 / 2048) / 3600 == pytest.approx(3.09, abs=0.01)
    # RSC-1: 6.5e-3 failures a node-day, 16,384 GPUs: 1.8 hours (arXiv 2410.21680)
    assert reliability.mtbf_seconds(2048, 6.5e-3) / 3600 == pytest.approx(1.80, abs=0.01)


@given(st.floats(1e6, 1e13), st.integers(1, 4096), st.floats(1e6, 1e11))
def test_a_checkpoint_takes_its_bytes_over_all_nodes_bandwidth(parameters, nodes, rate):
    size = reliability.checkpoint_state_bytes(parameters, 14)
    once = reliability.checkpoint_seconds(size, nodes, rate)
    assert once == pytest.approx(14 * parameters / nodes / rate)
    assert reliability.checkpoint_seconds(size, 2 * nodes, rate) < once

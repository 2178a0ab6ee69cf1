"""Dimensions: the planner's equations, given quantities with units, give quantities of the right unit."""

import pytest

pint = pytest.importorskip("pint", reason="the extra `test` installs it")

from stages.planning import collectives, compute, parallelism, reliability  # noqa: E402

unit = pint.UnitRegistry()
unit.define("token = [token]")
unit.define("flop = [operation]")
unit.define("parameter = [parameter]")
BYTES, RATE, LATENCY = 1e9 * unit.byte, 50e9 * unit.byte / unit.second, 14 * unit.microsecond


@pytest.mark.parametrize(
    "seconds",
    [
        collectives.ring_all_reduce_seconds(BYTES, 8, RATE, LATENCY),
        collectives.ring_all_gather_seconds(BYTES, 8, RATE, LATENCY),
        collectives.tree_all_reduce_seconds(BYTES, 4, 8, RATE, LATENCY, LATENCY),
        collectives.hierarchical_all_reduce_seconds(BYTES, 4, 8, RATE, RATE, LATENCY, LATENCY),
        collectives.all_to_all_seconds(BYTES, 8, RATE, LATENCY),
        compute.compute_seconds(1e6 * unit.token, 1e9 * unit.flop / unit.token, 1e15 * unit.flop / unit.second, 0.4),
        parallelism.dual_pipe_bubble_seconds(8, 2 * unit.second, 2 * unit.second, 1 * unit.second),
        reliability.checkpoint_seconds(BYTES, 8, RATE),
        reliability.young_interval_seconds(20 * unit.second, 3 * unit.hour),
    ],
)
def test_what_is_called_seconds_is_a_time(seconds):
    assert seconds.check("[time]")
    assert seconds.to("s").magnitude > 0


@pytest.mark.parametrize(
    "sent",
    [
        collectives.ring_wire_bytes(BYTES, 8),
        parallelism.data_parallel_wire_bytes(
            1e9 * unit.parameter,
            8,
            parallelism.data_parallel_bytes_per_parameter(
                3, 4, 2 * unit.byte / unit.parameter, 4 * unit.byte / unit.parameter
            ),
        ),
        parallelism.tensor_parallel_wire_bytes(4096, 8192, 80, 8, 2 * unit.byte),
        parallelism.pipeline_wire_bytes(4096, 8192, 2, 2 * unit.byte),
        parallelism.moe_wire_bytes_per_token(7168, 58, 4, 8, 1 * unit.byte, 2 * unit.byte),
    ],
)
def test_what_is_called_bytes_is_a_size(sent):
    assert sent.is_compatible_with(unit.byte)
    assert sent.to("byte").magnitude > 0


def test_bandwidth_stays_a_bandwidth_and_shares_have_no_unit():
    assert collectives.flat_ring_bandwidth(RATE, 8).is_compatible_with("byte/s")
    rate, peak = 1e3 * unit.token / unit.second, 1e15 * unit.flop / unit.second
    reached = compute.model_flops_utilization(rate, 1e11 * unit.flop / unit.token, peak)
    assert reached.check("[]")
    share = reliability.goodput(20 * unit.second, 10 * unit.minute, 3 * unit.hour, 5 * unit.minute)
    assert share.check("[]") and 0 < share.to("").magnitude < 1


def test_a_wrong_unit_is_found():
    with pytest.raises(pint.DimensionalityError):
        collectives.ring_all_reduce_seconds(BYTES, 8, RATE, 3 * unit.byte)

"""The predicted step: it is the anchor's own where nothing changes, and what changes it goes the right way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.files.artifacts import Refusal
from stages.planning.chips import load_chips
from stages.planning.fitting import fit_registry
from stages.planning.points import load_points
from stages.planning.step import Anchor, Fitted, Layout, Model, has_slow_links, load_fitted, predict

CHIPS = load_chips()
DENSE = Model(name="dense", total_parameters=70e9, active_parameters=70e9, layers=80, width=8192)
EXPERTS = {"experts": 256, "experts_per_token": 8}
MIXTURE = Model(name="mixture", total_parameters=671e9, active_parameters=37e9, layers=61, width=7168, **EXPERTS)
PLAIN = Fitted(
    exposed_share_of_fast_links=0, exposed_share_of_slow_links=1, straggler_share=0, low_share=0.05, high_share=0.05
)


def layout(**changes) -> Layout:
    usual = {"tp": 8, "pp": 4, "vp": 1, "dp": 4, "global_batch_sequences": 128, "micro_batch_sequences": 1}
    return Layout(**(usual | {"sequence_tokens": 4096} | changes))


def step(target: Layout, nodes: int, model=DENSE, chip="H100", fitted=PLAIN, seconds=30.0):
    return predict(model, target, CHIPS[chip], nodes, Anchor(seconds, layout(), 16), fitted)


@given(st.floats(0, 1), st.floats(0, 1.5), st.floats(0, 0.03))
def test_the_anchor_predicts_itself_whatever_is_fitted(fast, slow, straggler):
    fitted = PLAIN.model_copy(
        update={
            "exposed_share_of_fast_links": fast,
            "exposed_share_of_slow_links": slow,
            "straggler_share": straggler,
        }
    )
    found = step(layout(), 16, fitted=fitted)
    assert found.step_seconds == pytest.approx(30.0)


def test_the_parts_add_up_and_tokens_follow_from_the_step():
    found = step(layout(dp=8, global_batch_sequences=256), 32, fitted=load_fitted())
    parts = found.compute_seconds, found.bubble_seconds, found.exposed_seconds, found.straggler_seconds
    assert sum(parts) == pytest.approx(found.step_seconds)
    assert min(parts) >= 0 and found.compute_seconds > 0 and found.bubble_seconds > 0 and found.straggler_seconds > 0
    assert found.tokens_per_second == pytest.approx(256 * 4096 / found.step_seconds)
    assert found.low < found.tokens_per_second < found.high


def test_strong_scaling_is_worse_than_linear_by_the_bubble_alone():
    found = step(layout(dp=16), 64)
    m, bubble = 128 / 16, 3
    assert found.step_seconds == pytest.approx(30.0 * (m + bubble) / (128 / 4 + bubble))
    assert found.step_seconds > 30.0 / 4


def test_interleaving_shortens_the_step():
    assert step(layout(vp=4), 16).step_seconds < step(layout(vp=2), 16).step_seconds < 30.0


def test_more_chips_are_slower_each_through_stragglers_and_slow_links_only():
    weak = layout(dp=8, global_batch_sequences=256)
    assert step(weak, 32).step_seconds == pytest.approx(30.0)
    stragglers = PLAIN.model_copy(update={"straggler_share": 0.01})
    assert step(weak, 32, fitted=stragglers).step_seconds > 30.0
    anchor = Anchor(30.0, layout(), 16)
    slow = CHIPS["H100-A3-High"]
    assert has_slow_links(slow) and not has_slow_links(CHIPS["H100"])
    assert predict(DENSE, weak, slow, 32, anchor, PLAIN).step_seconds > 30.0


def test_traffic_that_is_not_overlapped_is_waited_for_in_full():
    weak = layout(dp=8, global_batch_sequences=256, overlapped=False)
    anchor = Anchor(30.0, layout(overlapped=False), 16)
    found = predict(DENSE, weak, CHIPS["H100"], 32, anchor, PLAIN)
    # ZeRO-1: 6 bytes of each of 70e9 / 32 parameters, 7/8 of them leave the chip at 50 GB/s
    assert found.exposed_seconds == pytest.approx(70e9 / 32 * 6 * 7 / 8 / 50e9, rel=0.01)


def test_experts_over_slow_links_cost_more_than_inside_a_node():
    inside = layout(tp=1, pp=1, ep=8, dp=128)
    across = layout(tp=1, pp=1, ep=64, dp=128)
    anchor = Anchor(30.0, inside, 16)
    assert predict(MIXTURE, across, CHIPS["H100"], 16, anchor, PLAIN).step_seconds > 30.0
    assert predict(MIXTURE, inside, CHIPS["H100"], 16, anchor, PLAIN).step_seconds == pytest.approx(30.0)


def test_a_faster_chip_and_a_smaller_model_take_less_time():
    smaller = DENSE.model_copy(update={"total_parameters": 35e9, "active_parameters": 35e9})
    anchor = Anchor(30.0, layout(), 16, DENSE, CHIPS["H100"])
    assert predict(smaller, layout(), CHIPS["H100"], 16, anchor, PLAIN).step_seconds < 30.0
    assert predict(DENSE, layout(), CHIPS["B200"], 16, anchor, PLAIN).step_seconds < 30.0


def test_a_layout_that_does_not_multiply_to_the_chips_is_refused():
    with pytest.raises(Refusal, match="tp 8 x pp 4 x cp 1 x dp 5 = 160 chips, but 16 nodes of 8 H100 have 128"):
        step(layout(dp=5), 16)
    with pytest.raises(Refusal, match="global_batch_sequences = 130: must be a multiple of dp x micro_batch_sequences"):
        step(layout(global_batch_sequences=130), 16)
    with pytest.raises(Refusal, match="nodes = 0: must be at least 1"):
        step(layout(), 0)


def test_a_chip_whose_links_are_unknown_is_refused_where_they_are_needed():
    anchor = Anchor(30.0, layout(), 16)
    with pytest.raises(Refusal, match="chip MI250X: intra_bytes_per_second is not known: write it in conf/plan/chips"):
        predict(DENSE, layout(dp=2, pp=2), CHIPS["MI250X"], 8, anchor, PLAIN)


def test_an_anchor_that_is_shorter_than_its_own_traffic_is_refused():
    anchor = Anchor(0.01, layout(overlapped=False), 16)
    with pytest.raises(Refusal, match="shorter than its traffic over H100's links alone"):
        predict(DENSE, layout(overlapped=False), CHIPS["H100"], 16, anchor, PLAIN)


def test_traffic_of_a_micro_batch_that_the_anchor_has_no_time_for_was_hidden():
    across = layout(tp=1, pp=1, ep=64, dp=128)
    anchor = Anchor(0.01, across, 16)
    twice = across.model_copy(update={"dp": 256, "global_batch_sequences": 256})
    assert predict(MIXTURE, twice, CHIPS["H100"], 32, anchor, PLAIN).step_seconds == pytest.approx(0.01)


def test_the_fitted_file_is_a_fit_of_the_registry():
    found, fitted = fit_registry(load_points())[0].model_dump(), load_fitted().model_dump()
    assert fitted == {name: pytest.approx(value, abs=5e-5) for name, value in found.items()}

"""Bytes on the wire of training over shaped links, against the planner's equation. Bytes only: seconds need quiet."""

import pytest

from benchmarks.links import Measured, as_markdown, measure, predicted_step_seconds, rows_of
from benchmarks.nodes import why_not
from stages.planning.collectives import ring_wire_bytes

ALONE = Measured(
    ranks=1, megabits=0, gradient_floats=1_000_000, step_seconds=0.2, all_reduce_seconds=0.0, all_reduce_bytes=0.0,
    step_bytes=0.0,
)  # fmt: skip


def test_the_prediction_is_the_ring_and_the_share_of_a_core():
    ring = 2 * 3 / 4 * 4e6 / (100e6 / 8 * 1448 / 1514)
    assert predicted_step_seconds(ALONE, 4, 100, cores=4) == pytest.approx(0.2 + ring)
    assert predicted_step_seconds(ALONE, 4, 100, cores=2) == pytest.approx(0.4 + ring)
    assert predicted_step_seconds(ALONE, 1, 100, cores=2) == pytest.approx(0.2)


def test_the_table_shows_each_number_beside_its_prediction():
    run = Measured(2, 100, 1_000_000, 0.5, 0.32, 4e6, 4e6)
    assert [what for what, *_ in rows_of(ALONE, run, 2)][-1] == "training step"
    text = as_markdown([(ALONE, run)], cores=2, load=0.1)
    assert "| 2 | 100 | bytes a rank sends in an all-reduce | 4,000,000 B | 4,000,000 B | +0.0% |" in text


def test_a_rank_sends_the_bytes_of_the_equation():
    if reason := why_not():
        pytest.skip(reason)
    run = measure(2, 1000, sequences=1, steps=2)
    expected = ring_wire_bytes(4 * run.gradient_floats, 2)
    assert run.all_reduce_bytes == pytest.approx(expected, rel=0.01)
    assert run.step_bytes == pytest.approx(expected, rel=0.01)

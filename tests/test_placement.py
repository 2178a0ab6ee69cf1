"""Bytes that leave a node, by where its ranks stand, against the planner's equations; seconds need quiet."""

import pytest

from benchmarks.nodes import why_not
from benchmarks.placement import Placed, as_markdown, crossings, measure, predicted_bytes, predicted_seconds


def test_a_ring_leaves_a_node_once_or_for_each_of_its_ranks():
    assert [crossings(name) for name in ("flat ring, packed", "flat ring, interleaved")] == [1, 2]
    shares = [predicted_bytes(name, 1.0) for name in ("flat ring, packed", "flat ring, interleaved", "hierarchical")]
    assert shares == [1.5, 3.0, 1.0], "of the gradients: 2 (n - 1) / n, twice that, 2 (N - 1) / N"


def test_seconds_are_the_bytes_over_the_link():
    for name in ("flat ring, packed", "flat ring, interleaved", "hierarchical"):
        link = 100e6 / 8 * 1448 / 1514
        assert predicted_seconds(name, 4e6, 100) == pytest.approx(predicted_bytes(name, 4e6) / link)


def test_the_table_has_a_row_for_each_placement():
    run = Placed("hierarchical", 4_000_000, 4_000_000, 0.4)
    assert "| hierarchical | 4,000,000 | 4,000,000 | +0.0% | 0.335 | 0.400 |" in as_markdown([run], 100, 0.1)


@pytest.mark.nodes
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_hierarchy_sends_a_third_of_what_interleaved_ranks_send():
    runs = {name: measure(name, megabits=1000, steps=2) for name in ("flat ring, interleaved", "hierarchical")}
    for name, run in runs.items():
        assert run.node_bytes == pytest.approx(predicted_bytes(name, run.gradient_bytes), rel=0.01)

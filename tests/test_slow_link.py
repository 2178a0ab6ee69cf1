"""What the comparison over a slow link says of its runs."""

import pytest

from benchmarks.slow_link import Run, as_markdown, difference


def test_the_difference_is_paired_by_seed_with_the_interval_of_students_t():
    mean, half = difference([2.1, 3.2, 4.3], [2.0, 3.0, 4.0])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)


def test_speeds_are_shares_of_ddp_without_a_limit():
    ddp, local = [Run(2.0, 1000, 10.0)] * 3, [Run(2.1, 900, 2.0), Run(2.1, 900, 2.0), Run(2.2, 900, 2.0)]
    text = as_markdown(ddp, Run(5.0, 300, 10.0), {25: local}, 0.1)
    assert "| ddp | 100 Mbit/s | 300 | 30% | 10 | 2.000 | 0 |" in text
    assert "| local_sgd, every 25 steps | 100 Mbit/s | 900 | 90% | 2 | 2.133 | +0.133 ± 0.143 |" in text

"""Moving: bytes, dollars and seconds, with their units checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.planning import moving

amount = st.floats(1, 1e15)


@given(amount, st.floats(0.1, 10), amount)
def test_moving_grows_with_what_is_moved(tokens, each, checkpoint):
    moved = moving.moved_bytes(tokens, each, checkpoint)
    assert moved == pytest.approx(tokens * each + checkpoint)
    assert moving.transfer_seconds(moved, 1e9) == pytest.approx(2 * moving.transfer_seconds(moved, 2e9))
    assert moving.egress_dollars(moved, 0.0) == 0


def test_a_terabyte_at_nine_cents_a_gigabyte_costs_ninety_dollars():
    assert moving.egress_dollars(1e12, 0.09) == pytest.approx(90)
    assert moving.transfer_seconds(1e12, 1.25e9) == pytest.approx(800)
    assert moving.idle_dollars(1800, 8, 2.5) == pytest.approx(10)


def test_the_units_of_moving():
    pint = pytest.importorskip("pint", reason="the extra `test` installs it")
    unit = pint.UnitRegistry()
    moved = moving.moved_bytes(3 * unit.count, 4 * unit.byte / unit.count, 5 * unit.byte)
    assert moved.check("[]") and moved.to("byte").magnitude == 17
    seconds = moving.transfer_seconds(1e12 * unit.byte, 1.25e9 * unit.byte / unit.second)
    assert seconds.to("second").magnitude == pytest.approx(800)

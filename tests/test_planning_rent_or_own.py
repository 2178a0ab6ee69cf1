"""Rent against own: each equation against a slow twin or a limit, and published examples."""

import datetime
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.planning import rent_or_own
from stages.planning.ownership import Owning

NODE = Owning(  # an H100 node of 300,000 dollars with 12.5% of network, by the chip
    capital_dollars=337_500 / 8,
    network_factor=1.125,
    kilowatts=10.2 / 8,
    pue=1.4,
    dollars_per_kilowatt_hour=0.08,
    staff_dollars_per_year=1500.0,
    upkeep_share_per_year=0.03,
    cost_of_capital_per_year=0.08,
    value_kept_per_year=0.25**0.25,
)
dollars = st.floats(100, 1e6)
share = st.floats(0.05, 1)
years = st.floats(1, 10)
rate = st.floats(0, 0.5)


def test_the_worked_example_of_the_research_notes():
    assert round(rent_or_own.own_dollars_per_hour(NODE, 4, 0.8), 2) == 2.06
    assert round(rent_or_own.own_dollars_per_hour(NODE, 4, 0.5), 2) == 3.29
    for use, months in ((0.8, [51, 30, 17, 6]), (0.5, [107, 57, 29, 10])):
        found = [rent_or_own.break_even_months(NODE, rent, use) for rent in (2.0, 2.95, 4.92, 12.29)]
        assert [round(each) for each in found if each] == months


@given(dollars, rate, st.integers(1, 10), st.floats(0, 1))
def test_an_annuity_pays_back_the_capital_less_its_resale_year_by_year(capital, interest, life, residual):
    yearly, debt = rent_or_own.annuity_dollars(capital, interest, life, residual), capital
    for _ in range(life):
        debt = debt * (1 + interest) - yearly
    assert debt == pytest.approx(residual * capital, rel=1e-6, abs=1e-6 * capital)


@given(dollars, st.integers(1, 10), st.floats(0, 1))
def test_a_small_interest_is_near_none(capital, life, residual):
    none = rent_or_own.annuity_dollars(capital, 0.0, life, residual)
    small = rent_or_own.annuity_dollars(capital, 1e-6, life, residual)
    assert small == pytest.approx(none, rel=1e-4, abs=2e-6 * capital)


@given(share, years)
def test_an_owned_hour_costs_less_the_more_it_is_used_and_twice_as_much_at_half_the_use(use, life):
    full, half = (rent_or_own.own_dollars_per_hour(NODE, life, part) for part in (use, use / 2))
    assert half == pytest.approx(2 * full)


@pytest.mark.parametrize(
    "field",
    ["kilowatts", "pue", "dollars_per_kilowatt_hour", "staff_dollars_per_year", "upkeep_share_per_year",
     "capital_dollars", "cost_of_capital_per_year"],
)  # fmt: skip
def test_what_costs_more_makes_an_owned_hour_dearer(field):
    dearer = replace(NODE, **{field: 1.5 * getattr(NODE, field)})
    assert rent_or_own.own_dollars_per_hour(dearer, 4, 0.8) > rent_or_own.own_dollars_per_hour(NODE, 4, 0.8)


def test_a_chip_that_keeps_its_value_is_cheaper_to_own():
    keeps = replace(NODE, value_kept_per_year=0.9)
    assert rent_or_own.own_dollars_per_hour(keeps, 4, 0.8) < rent_or_own.own_dollars_per_hour(NODE, 4, 0.8)


@given(st.floats(0.5, 20), share)
def test_break_even_is_where_the_rent_saved_equals_the_capital(rent, use):
    months = rent_or_own.break_even_months(NODE, rent, use)
    hourly = rent * use - rent_or_own.running_dollars_per_hour(NODE)
    if months is None:
        assert hourly <= 0
    else:
        assert months * 730 * hourly == pytest.approx(NODE.capital_dollars)


@given(st.floats(0.5, 20), years)
def test_at_the_break_even_utilization_both_cost_the_same(rent, life):
    use = rent_or_own.break_even_utilization(NODE, rent, life)
    assert rent_or_own.own_dollars_per_hour(NODE, life, use) == pytest.approx(rent)


def test_a_replay_over_a_constant_rent_agrees_with_the_formula():
    start = datetime.date(2023, 1, 1)
    path = [(start + datetime.timedelta(days=step), 4.92) for step in range(0, 1200, 60)]
    past = rent_or_own.replay(NODE, start, path, 0.8)
    assert past and past.months == pytest.approx(rent_or_own.break_even_months(NODE, 4.92, 0.8))
    assert past.returned_share > 1 and 0 < past.value_left_share < 1


def test_a_replay_sums_each_price_until_the_next_from_the_purchase_on():
    day = datetime.date(2024, 1, 1)
    path = [(day, 9.0), (day + datetime.timedelta(days=100), 2.0), (day + datetime.timedelta(days=300), 5.0)]
    running = rent_or_own.running_dollars_per_hour(NODE)
    bought = day + datetime.timedelta(days=50)
    past = rent_or_own.replay(NODE, bought, path, 1.0)
    saved = 24 * (50 * (9.0 - running) + 200 * (2.0 - running))
    assert past and past.returned_share == pytest.approx(saved / NODE.capital_dollars) and past.months is None
    assert rent_or_own.replay(NODE, path[-1][0], path, 1.0) is None, "no rent is known after the purchase"


def test_the_grid_has_a_row_for_each_utilization():
    grid = rent_or_own.grid(NODE, (0.5, 0.8), (0.1, 2.95), (3, 4))
    assert grid["own_dollars_per_hour"][1][1] == rent_or_own.own_dollars_per_hour(NODE, 4, 0.8)
    assert grid["break_even_months"][0] == [None, rent_or_own.break_even_months(NODE, 2.95, 0.5)]

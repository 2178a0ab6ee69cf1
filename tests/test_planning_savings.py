"""What compression saves: hand-computed cases, limits, and what the spread does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.planning import savings
from stages.planning.ranges import Range, exactly, over, plus, times
from tests.test_report import evaluation, timings

seconds = st.floats(1e-6, 1e3)


def test_an_hour_for_a_million_tokens_costs_the_price_of_an_hour():
    assert savings.dollars_per_million_tokens(3600 / 1e6, 2.5) == pytest.approx(2.5)
    money = savings.money({"teacher": {"read": Range(3600 / 1e6, 0.0018, 0.0072)}}, Range(2.0, 1.0, 3.0))
    assert money["teacher"]["read"] == pytest.approx((2.0, 0.5, 6.0))


def test_seconds_per_token_are_the_measured_times_over_their_tokens():
    taken, told = savings.measured_seconds(timings()), timings()
    assert taken["student"]["read"].value == told["latency"]["student"]["prefill_seconds"] / 256
    assert taken["student"]["write"].high == told["latency"]["student"]["decode_seconds_per_token_quartile_high"]
    assert taken["teacher"]["train"].low == told["training"]["teacher"]["step_seconds_quartile_low"] / 1024
    assert "train" not in taken["control"], "nobody measured it"


@given(seconds, st.floats(1.01, 100), seconds)
def test_break_even_is_where_what_was_spent_equals_what_was_saved(after, factor, spent):
    found = savings.break_even_tokens(exactly(spent), exactly(after * factor), exactly(after))
    assert found and found.value * (after * factor - after) == pytest.approx(spent)


def test_no_break_even_where_the_new_model_is_not_cheaper_beyond_the_spread():
    assert savings.break_even_tokens(exactly(1.0), exactly(2.0), exactly(2.0)) is None
    assert savings.break_even_tokens(exactly(1.0), Range(2.0, 1.9, 2.1), Range(1.95, 1.85, 2.05)) is None


def test_the_interval_of_break_even_takes_the_corners():
    found = savings.break_even_tokens(Range(10.0, 8.0, 12.0), Range(3.0, 2.5, 3.5), Range(1.0, 0.5, 1.5))
    assert found == pytest.approx((5.0, 8.0 / 3.0, 12.0))


def test_by_flops_distilling_pays_after_tokens_times_what_it_costs_over_what_it_saves():
    models = {"teacher": {"flops_per_token": 100.0}, "student": {"flops_per_token": 40.0}}
    pays = savings.distilling_pays(savings.flops_as_seconds(models), teacher_tokens=1000, student_tokens=500)
    student = 500 * (3 * 40 + 100)  # a step of the student and a forward pass of the teacher for each token
    assert pays["teacher exists"]["read"].value == pytest.approx(student / 60)
    assert pays["teacher trained for it"]["read"].value == pytest.approx((student + 1000 * 3 * 100) / 60)
    unknown = savings.distilling_pays(savings.flops_as_seconds(models), teacher_tokens=None, student_tokens=500)
    assert unknown == {"teacher exists": pays["teacher exists"]}


def test_on_another_chip_the_teacher_runs_at_the_assumed_share_and_the_others_relative_to_it():
    models, taken = evaluation()["models"], savings.measured_seconds(timings())
    found = savings.on_chip(taken, models, peak_flops_per_second=1e15, utilization=0.4)
    flops = models["teacher"]["flops_per_token"]
    assert found["teacher"]["read"] == exactly(flops / 4e14) and found["teacher"]["train"].value == 3 * flops / 4e14
    by_time = taken["student"]["read"].value / taken["teacher"]["read"].value
    by_flops = models["student"]["flops_per_token"] / flops
    student = found["student"]["read"]
    assert student.value == pytest.approx(by_time * flops / 4e14)
    assert student.low <= min(by_time, by_flops) * flops / 4e14 <= max(by_time, by_flops) * flops / 4e14 <= student.high
    assert "write" not in found["student"], "bound by memory, which this does not model"


def test_ranges_take_the_corners():
    one, other = Range(2.0, 1.0, 3.0), Range(4.0, 2.0, 5.0)
    assert plus(one, other) == (6.0, 3.0, 8.0) and times(one, other) == (8.0, 2.0, 15.0)
    assert over(one, other) == (0.5, 0.2, 1.5) and one.named("x") == {"x": 2.0, "x_low": 1.0, "x_high": 3.0}

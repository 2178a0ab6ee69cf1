"""The question of a person: speed from the nearest run, dollars and days from it, and what leaving changes."""

import datetime
import re
from types import SimpleNamespace

import pytest

from stages.files.artifacts import ROOT, Refusal
from stages.planning import question
from stages.planning.chips import load_chips
from stages.planning.ownership import load_books
from stages.planning.points import load_models, load_points
from stages.planning.prices import load_prices
from stages.planning.ranges import Range
from stages.planning.speed import speed, subject, utilization_of, worst_fall
from stages.settings.compose import compose
from stages.settings.schema import validate

CHIPS, MODELS, POINTS = load_chips(), load_models(), load_points()
LEDGER, BOOKS = load_prices(ROOT / "conf/plan/prices.yaml"), load_books(ROOT / "conf/plan/ownership.yaml")
PLAN = validate(compose(["scale=tiny"])).plan
TODAY = datetime.date(2026, 11, 30)
BY_ID = {point.id: point for point in POINTS}


def asked(name, chips, chip="H100", ours=None):
    what = subject(name, chip, MODELS, POINTS, ours or {})
    return what, speed(what, CHIPS[chip], chips, POINTS, PLAN.mfu)


def rate(provider, **changes):
    plan = PLAN.model_copy(update=changes)
    return question.rate_of(provider, plan.chip, plan, TODAY, LEDGER, BOOKS)


# ---- speed


def test_on_the_chips_of_a_measured_run_the_speed_is_the_measured_one():
    what, found = asked("DeepSeek-V3", 512)
    run = BY_ID["S1-512"]
    assert what.anchor.id == found.point == "S1-512"
    assert found.tokens_per_second.value == pytest.approx(run.tokens_per_step / run.step_seconds())


def test_on_more_chips_it_is_predicted_between_its_bounds_and_no_better_than_linear():
    _, found = asked("DeepSeek-V3", 2048)
    speeds = found.tokens_per_second
    assert speeds.low < speeds.value < speeds.high and speeds.value < found.linear
    assert found.linear == pytest.approx(4 * asked("DeepSeek-V3", 512)[1].tokens_per_second.value)


def test_the_prediction_is_near_the_published_run_on_twice_the_chips():
    _, found = asked("DeepSeek-V3", 1024)
    run = BY_ID["S1-1024"]
    assert found.tokens_per_second.value == pytest.approx(run.tokens_per_step / run.step_seconds(), rel=0.08)


def test_the_id_of_a_run_chooses_it():
    assert asked("S8-fp8-512", 512)[0].anchor.id == "S8-fp8-512"
    with pytest.raises(Refusal, match="^plan.model = S2-128: this run was on GB200, and plan.chip is H100"):
        asked("S2-128", 512)


def test_without_a_run_the_share_of_the_peak_is_assumed_and_says_so():
    what, found = asked("Kimi-K2", 1024)
    assert what.anchor is None and found.basis.startswith("assumed: 40% of the peak")
    expected = 1024 * 989e12 * 0.4 / what.flops_per_token
    assert found.tokens_per_second.value == pytest.approx(expected)
    assert found.tokens_per_second.low < expected <= found.tokens_per_second.high


def test_one_of_our_own_models_can_be_asked_for():
    ours = {"teacher": {"parameters": 1e7, "flops_per_token": 2e6}}
    what, found = asked("teacher", 8, ours=ours)
    assert what.flops_per_token == 6e6 and found.point is None


@pytest.mark.parametrize(
    ("name", "chips", "line"),
    [
        ("DeepSek-V3", 512, "plan.model = DeepSek-V3: no such model; did you mean DeepSeek-V3?"),
        ("DeepSeek-V3", 500, "plan.chips = 500: must be whole nodes of 8 H100"),
        ("DeepSeek-V3", 520, "plan.chips = 520: must be a multiple of 512, because run S1-512 spreads DeepSeek-V3"),
        ("MegaScale-MoE-352B", 512, "plan.model = MegaScale-MoE-352B: its parameters are not published"),
    ],
)
def test_what_cannot_be_answered_is_one_line(name, chips, line):
    with pytest.raises(Refusal) as refusal:
        asked(name, chips)
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


def test_the_utilization_of_a_run_is_near_the_published_one():
    """174.0 TFLOP/s of 989 by their count of operations, which is a tenth above ours (6 N and causal attention)."""
    assert 0.85 < utilization_of(BY_ID["S1-512"]) / (174.0 / 989) < 1
    shares = [share for point in POINTS if (share := utilization_of(point)) is not None]
    assert len(shares) > 60 and all(0 < share < 1 for share in shares)


def test_the_worst_fall_is_of_a_published_pair():
    name, share = worst_fall(POINTS)
    point = BY_ID[name]
    anchor = BY_ID[point.anchor]
    rates = [each.tokens_per_step / each.step_seconds() / each.chips for each in (point, anchor)]
    assert share == pytest.approx(1 - rates[0] / rates[1]) and 0.15 < share < 0.5
    assert worst_fall([anchor]) is None


# ---- money


def answered(provider, chips=512, **changes):
    what, found = asked("DeepSeek-V3", chips)
    plan = PLAN.model_copy(update=changes)
    of = question.rate_of(provider, plan.chip, plan, TODAY, LEDGER, BOOKS)
    return what, question.answer(what, CHIPS["H100"], chips, found, of, plan)


def test_dollars_are_chip_hours_times_the_price():
    _, found = answered("aws")
    hours = PLAN.tokens / (found.tokens_per_second.value * found.goodput) / 3600
    assert found.days.value == pytest.approx(hours / 24) and found.nodes == 64
    assert found.dollars.value == pytest.approx(512 * hours * 6.88)
    assert found.rows == ("aws-h100-2026-03",) and 0.9 < found.goodput < 1


def test_twice_the_tokens_take_twice_the_days_and_dollars():
    one, two = (answered("aws", tokens=tokens)[1] for tokens in (1e12, 2e12))
    assert two.days.value == pytest.approx(2 * one.days.value)
    assert two.dollars.high == pytest.approx(2 * one.dollars.high)


def test_more_failures_mean_less_goodput_until_nothing_is_done():
    goodputs = [answered("aws", failures_per_node_day=each)[1].goodput for each in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert goodputs == sorted(goodputs, reverse=True)
    with pytest.raises(Refusal, match="^plan.chips = 512: at plan.failures_per_node_day = 900 nothing is done"):
        answered("aws", failures_per_node_day=900.0)


def test_without_a_dated_price_there_are_days_and_no_dollars():
    _, found = answered("verda")
    assert found.dollars is None and found.days.value > 0 and "undated only" in found.warnings[0]


def test_owning_costs_more_the_less_it_is_used():
    busy, idle = (rate("own", utilization=share).dollars for share in (0.8, 0.4))
    assert idle.value == pytest.approx(2 * busy.value) and busy.low < busy.value < busy.high


def test_leaving_compares_prices_and_counts_what_moves():
    what, old = answered("coreweave")
    _, new = answered("aws")
    move = question.leaving(what, old, new, PLAN)
    assert move.change.value == pytest.approx(6.88 / 6.16 - 1) and move.verdict == "open"
    assert move.moved_bytes == pytest.approx(PLAN.tokens * PLAN.bytes_per_token + 671e9 * 14)
    assert move.transfer_hours == pytest.approx(move.moved_bytes / PLAN.link_bytes_per_second / 3600)
    assert move.egress_dollars is None
    priced = PLAN.model_copy(update={"egress_dollars_per_gigabyte": 0.05})
    assert question.leaving(what, old, new, priced).egress_dollars == pytest.approx(move.moved_bytes / 1e9 * 0.05)


def test_a_verdict_needs_intervals_that_do_not_include_zero():
    what, old = answered("aws")
    cases = {"cheaper": Range(5.0, 4.0, 6.0), "dearer": Range(8.0, 7.0, 9.0), "open": Range(6.0, 5.0, 7.0)}
    for verdict, dollars in cases.items():
        new = SimpleNamespace(provider="x", chips=512, dollars_per_chip_hour=dollars)
        assert question.leaving(what, old, new, PLAN).verdict == verdict
    new = SimpleNamespace(provider="x", chips=512, dollars_per_chip_hour=None)
    assert question.leaving(what, old, new, PLAN).verdict == "open: no dated price"


def test_the_sentence_names_prices_intervals_and_what_moves():
    what, old = answered("coreweave")
    moves = [question.leaving(what, old, answered(to)[1], PLAN) for to in ("aws", "own")]
    line = question.sentence(what, old, moves, PLAN)
    assert line.startswith("Training DeepSeek-V3 on 1T tokens with 512 H100 costs $") and "\n" not in line
    assert "at aws" in line and "owned at 80% use" in line and "egress not priced" in line
    _, small = answered("coreweave", tokens=100e9)
    assert re.search(r"costs \$\d{3}k \(\d{2,3} to \d{3}\) at coreweave", question.sentence(what, small, [], PLAN))
    _, nothing = answered("verda")
    assert question.sentence(what, nothing, [], PLAN).startswith("verda has no dated price for H100")

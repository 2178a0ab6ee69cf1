"""Impossible numbers in published tables are found without being told where; clean tables give no finding."""

from pathlib import Path

import pytest
import yaml

from stages.files.artifacts import Refusal
from stages.planning.plausibility import Claim, check, load_claims, of_points
from stages.planning.points import load_points

KNOWN_ERRORS = {
    ("grok-gb200-bf16-512", "tokens do not match batch and step", 572679, 1145359),
    ("grok-gb200-bf16-512", "days do not match tokens", 20.2, 10.1),
    ("grok-gb200-fp8-512", "tokens do not match batch and step", 807684, 1615368),
    ("grok-gb200-fp8-512", "days do not match tokens", 14.33, 7.165),
    ("maverick-gb200-bf16-128", "MFU does not match the peak", 18.71, 37.43),
    ("primus-70b-fp8-64", "faster per chip on more chips", 1726, 1135),
    ("ff-13b-512", "efficiency does not follow", 91, 82.48),
    ("month-specialised", "price total is not price times hours", 36000, 360000),
    ("month-aws", "price total is not price times hours", 32400, 324000),
    ("month-azure", "price total is not price times hours", 34560, 338400),
}
OVER_65 = {
    "megascale-256", "v5e-32b-256", "v5p-32b-64", "v5p-32b-64-x2", "v5p-64b-64", "v5p-64b-64-x2", "v5p-128b-128",
    "v5p-128b-128-x2", "v5p-128b-256", "v5p-256b-512",
}  # fmt: skip


def test_exactly_the_known_errors_are_found_in_whole_published_tables():
    claims = load_claims()
    assert len(claims) > 100
    found = check(claims)
    impossible = [finding for finding in found if finding.severity == "impossible"]
    assert {(each.row, each.rule) for each in impossible} == {(row, rule) for row, rule, *_ in KNOWN_ERRORS}
    numbers = {(row, rule): (stated, expected) for row, rule, stated, expected in KNOWN_ERRORS}
    for each in impossible:
        stated, expected = numbers[each.row, each.rule]
        assert each.stated == stated and each.expected == pytest.approx(expected, rel=1e-3)
    doubtful = [finding for finding in found if finding.severity == "doubtful"]
    assert {each.row for each in doubtful} == OVER_65
    assert {each.rule for each in doubtful} == {"over 65% MFU"}


def test_no_point_of_the_registry_is_impossible():
    found = check(of_points(load_points()))
    assert not [finding.message for finding in found if finding.severity == "impossible"]


def one(**fields) -> list[str]:
    return [finding.rule for finding in check([Claim(id="a", table="t", source="s", **fields)])]


PER_CHIP, PRICE = "tokens per chip do not match the total", "price total is not price times hours"
RUN = {"chip": "H100", "precision": "bf16", "chips": 8, "global_batch_sequences": 64, "sequence_tokens": 4096}


@pytest.mark.parametrize(
    ("fields", "rules"),
    [
        (RUN | {"tflops_per_chip": 1200.0}, ["more than the peak"]),
        (RUN | {"tflops_per_chip": 700.0}, ["over 65% MFU"]),
        (RUN | {"tflops_per_chip": 600.0}, []),
        (RUN | {"mfu_percent": 104.0}, ["more than the peak"]),
        (RUN | {"tokens_per_second": 1e6, "flops_per_token": 6 * 8e9}, ["more than the peak"]),
        (RUN | {"step_seconds": 10.0, "tokens_per_second": 26214.4}, []),
        (RUN | {"step_seconds": 10.0, "tokens_per_second": 26300}, []),  # rounded
        (RUN | {"step_seconds": 10.0, "tokens_per_second": 52429}, ["tokens do not match batch and step"]),
        (RUN | {"tokens_per_second": 1000, "tokens_per_second_per_chip": 125}, []),
        (RUN | {"tokens_per_second": 1000, "tokens_per_second_per_chip": 250}, [PER_CHIP]),
        (RUN | {"tokens_per_second": 11574, "training_tokens": 1e9, "days": 1}, []),
        (RUN | {"tokens_per_second": 11574, "training_tokens": 1e9, "days": 2}, ["days do not match tokens"]),
        ({"chips": 100, "hours": 730.0, "price_per_chip_hour": 5.0, "price_total": 360000}, []),  # or 720 hours
        ({"chips": 100, "hours": 720.0, "price_per_chip_hour": 5.0, "price_total": 36000}, [PRICE]),
        ({"chip_hours": 2788000.0, "price_per_chip_hour": 2.0, "price_total": 5576000}, []),
        ({"chip": "unheard of", "precision": "bf16", "tflops_per_chip": 1e6}, []),  # nothing to compare with
        ({}, []),
    ],
)  # fmt: skip
def test_each_rule_finds_its_error_and_nothing_else(fields, rules):
    assert one(**fields) == rules


@pytest.mark.parametrize(("stated", "found"), [(82.5, []), (82, []), (91, ["efficiency does not follow"])])
def test_an_efficiency_is_compared_with_the_rows_of_its_own_table(stated, found):
    small = Claim(id="a", table="t", source="s", chips=64, global_batch_sequences=4096, step_seconds=64.118)
    more = {"chips": 512, "global_batch_sequences": 4096, "step_seconds": 9.717}
    large = Claim(id="b", table="t", source="s", baseline="a", efficiency_percent=stated, **more)
    assert [finding.rule for finding in check([small, large])] == found


def test_a_few_percent_more_on_more_chips_is_no_error():
    small = Claim(id="a", table="t", source="s", chips=8, tokens_per_second_per_chip=1135)
    for value, found in ((1174, 0), (1726, 1)):
        large = Claim(id="b", table="t", source="s", chips=64, tokens_per_second_per_chip=value, baseline="a")
        assert len(check([small, large])) == found


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "a", "table": "t"}], "row a: source: missing"),
        ([{"id": "a", "table": "t", "source": "s", "days": -1}], "row a: days = -1: must be above 0"),
        ([{"id": "a", "table": "t", "source": "s"}] * 2, "row a: the id stands twice"),
        ([{"id": "a", "table": "t", "source": "s", "baseline": "b"}], "row a: baseline = b: no row has this id"),
        ({"a": 1}, "must be a list of rows"),
    ],
)
def test_a_bad_row_is_refused_in_one_line(tmp_path: Path, rows, says):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(rows))
    with pytest.raises(Refusal) as caught:
        load_claims(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)

"""The ledger of rents: what is shipped, which row a price comes from, what contradicts it, and mistakes in one line."""

import datetime
from pathlib import Path

import pytest
import yaml

from stages.files.artifacts import ROOT, Refusal
from stages.planning import prices
from stages.planning.prices import load_prices, quote, rent_path

LEDGER = ROOT / "conf/plan/prices.yaml"
TODAY = datetime.date(2026, 11, 30)
STALE_DAYS = 365


@pytest.fixture(scope="module")
def shipped():
    return load_prices(LEDGER)


def row(name, price, date, **other):
    common = {"provider": "one", "chip": "H100", "terms": "on_demand", "region": None, "currency": "USD"}
    own = {"id": name, "price_per_chip_hour": price, "date": date, "source": "a page", "archived": None}
    return common | own | other


def ledger(tmp_path: Path, *rows):
    file = tmp_path / "prices.yaml"
    currencies = [
        {"id": "USD", "dollars": 1.0, "date": None, "source": "unit"},
        {"id": "CNY", "dollars": 0.14, "date": None, "source": "a page"},
    ]
    providers = [{"id": name, "name": name, "kind": "specialised"} for name in ("one", "two")]
    file.write_text(yaml.safe_dump({"currencies": currencies, "providers": providers, "prices": [*rows]}))
    return file


def test_the_shipped_ledger_is_as_wide_as_it_claims(shipped):
    assert len(shipped.prices) >= 60 and len({row.provider for row in shipped.prices}) >= 10
    assert {"A100-40", "A100-80", "H100", "H200", "B200"} <= {row.chip for row in shipped.prices}
    assert {"on_demand", "spot", "1_year", "3_years"} <= {row.terms for row in shipped.prices}
    assert all(row.source for row in shipped.prices)
    undated = [row for row in shipped.prices if row.date is None]
    assert undated, "the sources have undated rows, and those must not get a date"
    assert all(row.archived for row in shipped.prices if row.source.startswith("epoch-research"))


def test_the_four_prices_of_one_machine_stand_side_by_side(shipped):
    (group,) = [
        rows
        for rows in prices.contradictions(shipped.prices, STALE_DAYS)
        if (rows[0].provider, rows[0].chip, rows[0].terms) == ("aws", "H100", "on_demand")
    ]
    assert {row.price_per_chip_hour for row in group} == {12.29, 10.0775, 6.88, 3.9}


def test_a_later_price_of_the_same_source_replaces_the_earlier_one(shipped):
    path = [row for row in shipped.prices if row.id.startswith("market-h100-1y")]
    assert len(path) == 2 and not prices.contradictions(path, STALE_DAYS)


def test_a_first_hand_price_goes_before_second_hand_ones(shipped):
    found = quote(shipped, "aws", "H100", "on_demand", TODAY, STALE_DAYS)
    assert found.dollars == 6.88 and [row.id for row in found.rows] == ["aws-h100-2026-03"]
    assert any("contradict each other" in warning for warning in found.warnings)


def test_a_second_hand_price_is_as_uncertain_as_such_rows_are_elsewhere_in_the_ledger(shipped):
    least, most = prices.second_hand_error(shipped.prices)
    assert least == pytest.approx(6.88 / 12.29) and most == pytest.approx(6.88 / 3.9)
    found = quote(shipped, "coreweave", "H100", "on_demand", TODAY, STALE_DAYS)
    assert (found.low, found.high) == pytest.approx((6.16 * least, 6.16 * most))
    assert any("second-hand" in warning for warning in found.warnings)


def test_a_row_without_a_date_is_shown_and_never_used(shipped):
    found = quote(shipped, "verda", "H100", "on_demand", TODAY, STALE_DAYS)
    assert found.dollars is None and found.rows == ()
    assert [row.id for row in found.beside] == ["verda-h100-undated"] and "undated only: 2.29" in found.warnings[0]


def test_a_price_warns_once_it_is_older_than_stale_days(shipped):
    day = datetime.date(2025, 3, 17)
    for age, warns in ((STALE_DAYS, False), (STALE_DAYS + 1, True)):
        found = quote(shipped, "oracle", "H100", "on_demand", day + datetime.timedelta(days=age), STALE_DAYS)
        assert found.dollars == 10.0 and any("days old" in warning for warning in found.warnings) == warns


def test_a_price_of_the_future_is_not_known_yet(shipped):
    then = datetime.date(2024, 8, 1)
    assert quote(shipped, "lambda", "H100", "on_demand", then, STALE_DAYS).dollars == 3.49


def test_a_price_in_another_currency_is_converted(tmp_path):
    read = load_prices(ledger(tmp_path, row("a", 12.0, "2026-01", currency="CNY", price_per_chip_hour_high=20.0)))
    found = quote(read, "one", "H100", "on_demand", TODAY, STALE_DAYS)
    assert (found.dollars, found.low, found.high) == pytest.approx((0.14 * 16, 0.14 * 12, 0.14 * 20))


def test_a_month_counts_as_its_first_day(tmp_path):
    read = load_prices(ledger(tmp_path, row("a", 2.0, "2026-03"), row("b", 3.0, "2026-03-02"), row("c", 4.0, "2026")))
    assert quote(read, "one", "H100", "on_demand", TODAY, STALE_DAYS).dollars == 3.0
    assert [row.day for row in read.prices] == [datetime.date(2026, *rest) for rest in ((3, 1), (3, 2), (1, 1))]


def test_a_path_is_what_the_ledger_would_have_said_on_each_day(shipped, tmp_path):
    path = dict(rent_path(shipped, "H100", "on_demand", STALE_DAYS, "aws"))
    assert path[datetime.date(2025, 3, 17)] == 12.29 and path[datetime.date(2026, 5, 1)] == 6.88
    rows = row("a", 2.0, "2026-01-01"), row("b", 4.0, "2026-02-01", provider="two"), row("c", 9.0, None)
    middle = rent_path(load_prices(ledger(tmp_path, *rows)), "H100", "on_demand", STALE_DAYS)
    assert middle == [(datetime.date(2026, 1, 1), 2.0), (datetime.date(2026, 2, 1), 3.0)]


GOOD = row("a", 2.0, "2026-01-01")
MISTAKES = [
    (GOOD | {"currency": "EUR"}, "row a: currency = EUR: no such currency in the file"),
    ({key: value for key, value in GOOD.items() if key != "currency"}, "row a: currency: missing"),
    (GOOD | {"provider": "on"}, "row a: provider = on: no such provider in the file; did you mean one?"),
    (GOOD | {"price_per_chip_hour": -1.0}, "row a: price_per_chip_hour = -1.0: must be above 0"),
    (GOOD | {"price_per_chip_hour": "2"}, "row a: price_per_chip_hour = "),
    (GOOD | {"price_per_chip_hour_high": 1.0}, "row a: price_per_chip_hour_high = 1: must be at least"),
    (GOOD | {"date": "2026-02-30"}, "row a: date: 2026-02-30 is no date; write YYYY"),
    (GOOD | {"date": "yesterday"}, "row a: date: yesterday is no date; write YYYY"),
    (GOOD | {"date": 10**30}, "row a: date: "),
    (GOOD | {"terms": "hourly"}, "row a: terms = hourly: must be on_demand, spot"),
    (GOOD | {"colour": "red"}, "row a: colour: no such field; there are id, date"),
    (GOOD | {"source": " "}, "row a: source = "),
    ("a row", "row 1 of prices: 'a row': must be a mapping"),
]


@pytest.mark.parametrize(("wrong", "line"), MISTAKES, ids=[line for _, line in MISTAKES])
def test_a_mistake_is_one_line_that_names_file_row_and_field(tmp_path, wrong, line):
    file = ledger(tmp_path, wrong)
    with pytest.raises(Refusal) as refusal:
        load_prices(file)
    assert str(refusal.value).startswith(f"{file}: {line}") and "\n" not in str(refusal.value)


def test_an_id_that_stands_twice_and_a_table_that_is_missing_are_refused(tmp_path):
    with pytest.raises(Refusal, match="row a: the id stands twice in prices"):
        load_prices(ledger(tmp_path, GOOD, GOOD))
    file = tmp_path / "prices.yaml"
    for text, line in (
        ("prices: []", "currencies: must be a list of rows"),
        ("{}\n[", "not YAML"),
        ("- a", "must be a mapping of tables"),
        ("rents: []", "no such table"),
    ):
        file.write_text(text)
        with pytest.raises(Refusal, match=line):
            load_prices(file)


def test_an_unknown_provider_or_chip_is_told_the_nearest(shipped):
    with pytest.raises(Refusal, match=r"^plan.provider = awz: no such provider; did you mean aws\? There are aws, "):
        prices.require_known(shipped, ["own", "awz"], "H100")
    with pytest.raises(Refusal, match=r"^plan.chip = H10: no row of it in conf/plan/prices.yaml; did you mean H100\?"):
        prices.require_known(shipped, ["aws"], "H10")


def test_yaml_dates_and_years_without_quotes_are_dates(tmp_path):
    read = load_prices(ledger(tmp_path, row("a", 2.0, datetime.date(2026, 1, 2)), row("b", 2.0, 2026)))
    assert [row.date for row in read.prices] == ["2026-01-02", "2026"]

"""What owning costs: the shipped ledger, the figures taken from it, and mistakes in one line."""

import datetime
import shutil

import pytest
import yaml

from stages.files.artifacts import ROOT, Refusal
from stages.planning.ownership import capital_rows, load_books, owning, owning_rows, ready_to_own

BOOKS = ROOT / "conf/plan/ownership.yaml"
TODAY, STALE_DAYS = datetime.date(2026, 11, 30), 365


@pytest.fixture(scope="module")
def shipped():
    return load_books(BOOKS)


def test_the_parts_of_a_published_bill_add_up_to_its_total(shipped):
    """128 nodes of 310,000, 48 switches of 36,000, cables and a facility: 50.43 million for 1,024 chips."""
    (bill,) = [row for row in shipped.clusters if row.id == "cheah-1024"]
    total = 128 * 310_000 + 48 * 36_000 + 2.621e6 + 128 * 50_000
    assert total / 1024 == pytest.approx(bill.dollars_per_chip, rel=1e-4)
    (network,) = [row for row in shipped.costs if row.id == "network-cheah"]
    assert (48 * 36_000 + 2.621e6) / (128 * 310_000) == pytest.approx(network.value, abs=1e-4)


def test_the_capital_is_the_median_of_the_newest_years_purchases(shipped):
    rows = capital_rows(shipped, "H100", TODAY, STALE_DAYS)
    newest = max(row.day for row in rows)
    assert newest == datetime.date(2025, 3, 3) and all((newest - row.day).days < STALE_DAYS for row in rows)
    low, middle, high = (owning(shipped, "H100", TODAY, STALE_DAYS, end) for end in ("low", "value", "high"))
    assert low.capital_dollars == pytest.approx(28_750 * low.network_factor)
    assert high.capital_dollars == pytest.approx(46_875 * high.network_factor)
    assert low.capital_dollars < middle.capital_dollars < high.capital_dollars
    assert low.kilowatts <= middle.kilowatts <= high.kilowatts and low.pue <= middle.pue <= high.pue


def test_purchases_after_today_are_not_known_yet(shipped):
    assert max(row.day for row in capital_rows(shipped, "H100", datetime.date(2024, 1, 1), STALE_DAYS)) == (
        datetime.date(2023, 12, 11)
    )


def test_every_row_behind_the_figures_is_named(shipped):
    names = {row.id for row in owning_rows(shipped, "H100", TODAY, STALE_DAYS)}
    assert {"power-h100", "pue-uptime", "staff", "residual", "buy-h100-2025-01-31"} <= names


def test_what_is_assumed_says_so_and_has_a_date(shipped):
    assumed = [row for row in shipped.costs if row.assumption]
    assert assumed and all(row.date for row in assumed)


def test_a_chip_without_a_purchase_price_or_power_cannot_be_owned(shipped):
    assert ready_to_own(shipped, "H100", TODAY) and not ready_to_own(shipped, "GB300", TODAY)
    with pytest.raises(Refusal, match="no dated purchase price of GB300: add a row, or leave `own` out"):
        owning(shipped, "GB300", TODAY, STALE_DAYS)
    with pytest.raises(Refusal, match="no dated row of kilowatts_per_chip for MI300X"):
        owning(shipped, "MI300X", TODAY, STALE_DAYS)


MISTAKES = [
    ("power-h100", {"value": -1.0}, "row power-h100: value = -1.0: must be at least 0"),
    ("power-h100", {"low": 2.0}, "row power-h100: value = 1.275: must lie between its low and its high"),
    ("pue-uptime", {"low": 0.9}, "row pue-uptime: low = 0.9: must be at least 1 for pue"),
    ("residual", {"value": 1.5}, "row residual: value = 1.5: must be at most 1 for value_kept_per_year"),
    ("staff", {"item": "staf"}, "row staff: item = staf: must be network_share_of_capital, "),
    ("energy", {"date": "2026-13"}, "row energy: date: 2026-13 is no date"),
]


@pytest.mark.parametrize(("name", "wrong", "line"), MISTAKES, ids=[line for *_, line in MISTAKES])
def test_a_mistake_is_one_line(tmp_path, name, wrong, line):
    content = yaml.safe_load(BOOKS.read_text())
    content["costs"] = [row | (wrong if row["id"] == name else {}) for row in content["costs"]]
    file = tmp_path / "ownership.yaml"
    shutil.copy(BOOKS, file)
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(Refusal) as refusal:
        load_books(file)
    assert str(refusal.value).startswith(f"{file}: {line}") and "\n" not in str(refusal.value)

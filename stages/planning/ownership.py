"""What owning a chip costs: the ledger (conf/plan/ownership.yaml) and the figures that it gives for one chip."""

import datetime
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.files.artifacts import Refusal
from stages.planning.dated import Amount, DatedRow, Dollars, Text, days_between, load_tables

Item = Literal[
    "network_share_of_capital",
    "kilowatts_per_chip",
    "pue",
    "dollars_per_kilowatt_hour",
    "staff_dollars_per_chip_year",
    "upkeep_share_of_capital_per_year",
    "cost_of_capital_per_year",
    "value_kept_per_year",
]
AT_LEAST = {"pue": 1.0}
AT_MOST = {"value_kept_per_year": 1.0, "network_share_of_capital": 1.0}
Chips = Annotated[int, Field(ge=1, le=10**9)]


class Cost(DatedRow):
    item: Item
    chip: Text | None  # null: the same for every chip
    value: Amount
    low: Amount | None = None
    high: Amount | None = None
    assumption: bool = False  # nobody published it as a measurement


class Capital(DatedRow):
    """A purchase price: the chip with its share of the server."""

    chip: Text
    dollars_per_chip: Dollars
    chips_in_system: Chips | None


class Cluster(DatedRow):
    """A whole cluster, for comparison: dollars per chip with network and building."""

    chip: Text
    chips: Chips
    dollars_per_chip: Dollars
    dollars_per_chip_high: Dollars | None = None


@dataclass(frozen=True)
class Books:
    """The ledger of owning."""

    path: Path
    costs: tuple[Cost, ...]
    capital: tuple[Capital, ...]
    clusters: tuple[Cluster, ...]


@dataclass(frozen=True)
class Owning:
    """One owned chip with its share of server and network, in dollars and kilowatts."""

    capital_dollars: float
    network_factor: float  # of the capital over the price of the chip with its share of the server
    kilowatts: float  # drawn whether it works or waits
    pue: float  # power usage effectiveness: of the building over that of the machines
    dollars_per_kilowatt_hour: float
    staff_dollars_per_year: float
    upkeep_share_per_year: float  # of the capital: spares, insurance, space
    cost_of_capital_per_year: float
    value_kept_per_year: float  # share of its value that a chip still has a year later


def load_books(path: Path) -> Books:
    tables = load_tables(path, {"costs": Cost, "capital": Capital, "clusters": Cluster})
    for row in tables["costs"]:
        for field in ("low", "value", "high"):
            _refuse_outside(path, row, field, AT_LEAST.get(row.item, 0.0), AT_MOST.get(row.item, float("inf")))
        if not _or(row.low, row.value) <= row.value <= _or(row.high, row.value):
            raise Refusal(f"{path}: row {row.id}: value = {row.value:g}: must lie between its low and its high")
    return Books(path, tuple(tables["costs"]), tuple(tables["capital"]), tuple(tables["clusters"]))


def _refuse_outside(path, row, field, least, most):
    value = getattr(row, field)
    if value is not None and not least <= value <= most:
        bound = f"at least {least:g}" if value < least else f"at most {most:g}"
        raise Refusal(f"{path}: row {row.id}: {field} = {value:g}: must be {bound} for {row.item}")


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def capital_rows(books: Books, chip: str, today: datetime.date, stale_days: int) -> list[Capital]:
    """The dated purchase prices of a chip that are less than `stale_days` older than the newest one up to today."""
    dated = [row for row in books.capital if row.chip == chip and row.date is not None and row.day <= today]
    newest = max((row.day for row in dated), default=today)
    return sorted((r for r in dated if days_between(r.day, newest) < stale_days), key=lambda row: (row.day, row.id))


def cost_row(books: Books, item: Item, chip: str, today: datetime.date) -> Cost:
    """The newest dated row of an item for this chip, else for every chip."""
    rows = [row for row in books.costs if row.item == item and row.chip in (chip, None) and row.date is not None]
    rows = [row for row in rows if row.day <= today]
    if not rows:
        raise Refusal(f"{books.path}: no dated row of {item} for {chip}: add one, or leave `own` out of plan.provider")
    return max(rows, key=lambda row: (row.chip is not None, row.day, row.id))


def ready_to_own(books: Books, chip: str, today: datetime.date) -> bool:
    """Has the ledger a dated row of everything that owning this chip takes?"""
    bought = any(row.chip == chip and row.date is not None and row.day <= today for row in books.capital)
    powered = any(row.item == "kilowatts_per_chip" and row.chip in (chip, None) and row.date for row in books.costs)
    return bought and powered


def owning_rows(books: Books, chip: str, today: datetime.date, stale_days: int) -> list[DatedRow]:
    """Every row that `owning` rests on."""
    items: list[Item] = [*Item.__args__]  # type: ignore[attr-defined]
    return [*capital_rows(books, chip, today, stale_days), *(cost_row(books, item, chip, today) for item in items)]


def owning(books: Books, chip: str, today: datetime.date, stale_days: int, end: str = "value") -> Owning:
    """The figures for one chip: the middle ones, or with `end` low or high the cheapest or dearest together."""
    bought = [row.dollars_per_chip for row in capital_rows(books, chip, today, stale_days)]
    if not bought:
        raise Refusal(
            f"{books.path}: no dated purchase price of {chip}: add a row, or leave `own` out of plan.provider"
        )

    def figure(item: Item) -> float:
        row = cost_row(books, item, chip, today)
        dear = {"low": "high", "high": "low"} if item == "value_kept_per_year" else {}  # what is kept makes it cheaper
        return _or(getattr(row, dear.get(end, end)), row.value)

    network = 1 + figure("network_share_of_capital")
    return Owning(
        capital_dollars={"low": min(bought), "value": statistics.median(bought), "high": max(bought)}[end] * network,
        network_factor=network,
        kilowatts=figure("kilowatts_per_chip"),
        pue=figure("pue"),
        dollars_per_kilowatt_hour=figure("dollars_per_kilowatt_hour"),
        staff_dollars_per_year=figure("staff_dollars_per_chip_year"),
        upkeep_share_per_year=figure("upkeep_share_of_capital_per_year"),
        cost_of_capital_per_year=figure("cost_of_capital_per_year"),
        value_kept_per_year=figure("value_kept_per_year"),
    )

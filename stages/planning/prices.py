"""The ledger of rents (conf/plan/prices.yaml): which price holds today, how old it is, and what contradicts it."""

import datetime
import difflib
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from stages.files.artifacts import Refusal
from stages.planning.dated import DatedRow, Dollars, Text, days_between, load_tables
from stages.planning.ledgers import Row

Terms = Literal["on_demand", "spot", "1_month", "1_year", "3_years", "capacity_block"]
OWN = "own"  # the provider of one's own machines
SAME_PRICE_DAYS = 92  # rows of one price that are no further apart tell how far off second-hand rows are


class Currency(DatedRow):
    dollars: Dollars  # for one unit


class Provider(Row):
    id: Text
    name: Text
    kind: Literal["specialised", "hyperscaler", "marketplace", "index"]


class Price(DatedRow):
    provider: Text
    chip: Text
    terms: Terms
    region: Text | None
    currency: Text
    price_per_chip_hour: Dollars  # in the currency
    price_per_chip_hour_high: Dollars | None = None  # of a published range
    second_hand: bool = False  # a third party quotes the provider


@dataclass(frozen=True)
class Ledger:
    prices: tuple[Price, ...]
    providers: dict[str, Provider]
    currencies: dict[str, Currency]

    def dollars_per_chip_hour(self, row: Price) -> float:
        return row.price_per_chip_hour * self.currencies[row.currency].dollars

    def dollars_per_chip_hour_high(self, row: Price) -> float:
        high = row.price_per_chip_hour_high
        return self.dollars_per_chip_hour(row) if high is None else high * self.currencies[row.currency].dollars

    def of(self, provider: str, chip: str, terms: str) -> list[Price]:
        return [row for row in self.prices if (row.provider, row.chip, row.terms) == (provider, chip, terms)]


@dataclass(frozen=True)
class Quote:
    """Dollars per chip-hour that hold today; low and high span the rows that it rests on. None: no dated row."""

    dollars: float | None
    low: float | None
    high: float | None
    rows: tuple[Price, ...]  # what it rests on
    beside: tuple[Price, ...]  # others of the same provider, chip and terms, undated ones among them
    warnings: tuple[str, ...]


def load_prices(path: Path) -> Ledger:
    tables = load_tables(path, {"currencies": Currency, "providers": Provider, "prices": Price})
    providers = {row.id: row for row in tables["providers"]}
    currencies = {row.id: row for row in tables["currencies"]}
    for row in tables["prices"]:
        for field, known in (("provider", providers), ("currency", currencies)):
            if getattr(row, field) not in known:
                rule = f"no such {field} in the file; did you mean {_closest(getattr(row, field), known)}?"
                raise Refusal(f"{path}: row {row.id}: {field} = {getattr(row, field)}: {rule} Else add it")
        high = row.price_per_chip_hour_high
        if high is not None and high < row.price_per_chip_hour:
            rule = f"must be at least price_per_chip_hour ({row.price_per_chip_hour:g})"
            raise Refusal(f"{path}: row {row.id}: price_per_chip_hour_high = {high:g}: {rule}")
    return Ledger(tuple(tables["prices"]), providers, currencies)


def _closest(word: str, known: Collection[str]) -> str:
    return (difflib.get_close_matches(word, known, n=1) or sorted(known))[0]


def require_known(ledger: Ledger, providers: Iterable[str], chip: str) -> None:
    """Refuses a provider or a chip of which the ledger has no row."""
    for provider in providers:
        if provider != OWN and provider not in ledger.providers:
            names = ", ".join([*sorted(ledger.providers), OWN])
            hint = _closest(provider, [*ledger.providers, OWN])
            raise Refusal(f"plan.provider = {provider}: no such provider; did you mean {hint}? There are {names}")
    chips = sorted({row.chip for row in ledger.prices})
    if chip not in chips:
        hint = f"did you mean {_closest(chip, chips)}? There are {', '.join(chips)}"
        raise Refusal(f"plan.chip = {chip}: no row of it in conf/plan/prices.yaml; {hint}")


def quote(ledger: Ledger, provider: str, chip: str, terms: str, today: datetime.date, stale_days: int) -> Quote:
    """The newest dated price up to today, the provider's own before one that a third party quotes, unless it is stale.

    The interval spans the rows that are less than `stale_days` older than the newest; where that is second-hand it is
    wider by what such rows are off elsewhere in the ledger.
    """
    rows = ledger.of(provider, chip, terms)
    dated = [row for row in rows if row.date is not None and row.day <= today]
    if not dated:
        undated = ", ".join(f"{ledger.dollars_per_chip_hour(row):g} ({row.id})" for row in rows if row.date is None)
        reason = f"undated only: {undated}" if undated else "no row in conf/plan/prices.yaml"
        return Quote(None, None, None, (), tuple(rows), (f"{provider} {chip} {terms}: {reason}",))
    fresh = [row for row in dated if not row.second_hand and not is_stale(row, today, stale_days)]
    basis = sorted(fresh or dated, key=lambda row: (row.day, row.id))
    newest = basis[-1]
    used = [row for row in basis if days_between(row.day, newest.day) < stale_days and row.region == newest.region]
    value = statistics.median(_middle(ledger, row) for row in used if row.day == newest.day)
    off = second_hand_error(ledger.prices) if newest.second_hand else (1.0, 1.0)
    low = min(ledger.dollars_per_chip_hour(row) for row in used) * off[0]
    high = max(ledger.dollars_per_chip_hour_high(row) for row in used) * off[1]
    beside = tuple(row for row in rows if row not in used)
    return Quote(value, low, high, tuple(used), beside, tuple(_warnings(newest, rows, today, stale_days)))


def second_hand_error(rows: Iterable[Price]) -> tuple[float, float]:
    """Least and largest ratio of a provider's own price to a second-hand one of about the same day; at most and at
    least 1."""
    rows = [row for row in rows if row.date is not None]
    ratios = [
        own.price_per_chip_hour / told.price_per_chip_hour
        for told in rows
        if told.second_hand
        for own in rows
        if not own.second_hand
        and (own.provider, own.chip, own.terms, own.currency) == (told.provider, told.chip, told.terms, told.currency)
        and days_between(own.day, told.day) <= SAME_PRICE_DAYS
    ]
    return min([1.0, *ratios]), max([1.0, *ratios])


def _middle(ledger, row):
    return (ledger.dollars_per_chip_hour(row) + ledger.dollars_per_chip_hour_high(row)) / 2


def _warnings(newest, rows, today, stale_days):
    age = days_between(newest.day, today)
    if age > stale_days:
        yield f"{newest.id} is {age} days old (plan.stale_days is {stale_days})"
    if newest.second_hand:
        yield f"{newest.id} is second-hand: {newest.source}"
    for group in contradictions(rows, stale_days):
        told = ", ".join(f"{row.price_per_chip_hour:g} ({row.id})" for row in group)
        yield f"rows of {newest.provider} contradict each other: {told}; used here: {newest.id}"


def is_stale(row: DatedRow, today: datetime.date, stale_days: int) -> bool:
    return row.date is None or days_between(row.day, today) > stale_days


def contradictions(rows: Iterable[Price], stale_days: int) -> list[list[Price]]:
    """Groups of rows for the same provider, chip, terms and currency of which not all can hold.

    Two rows contradict each other if the prices or ranges that they give do not meet and their dates are less than
    `stale_days` apart, except where one replaces the other: a later row of the same source, or of the provider itself.
    An undated row contradicts nothing, because nobody knows its day.
    """

    def kind(row):
        return row.provider, row.chip, row.terms, row.currency

    found = []
    for _, group in groupby(sorted((row for row in rows if row.date), key=kind), key=kind):
        members = sorted(group, key=lambda row: (row.day, row.id))
        against = [row for row in members if any(_contradict(row, other, stale_days) for other in members)]
        found += [against] if against else []
    return found


def _contradict(one: Price, other: Price, stale_days: int) -> bool:
    if one.region and other.region and one.region != other.region:
        return False
    ends = [(row.price_per_chip_hour, row.price_per_chip_hour_high or row.price_per_chip_hour) for row in (one, other)]
    meet = ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]
    of_one_voice = one.source == other.source or not (one.second_hand or other.second_hand)
    replaced = of_one_voice and one.day != other.day
    return not meet and not replaced and days_between(one.day, other.day) < stale_days


def rent_path(
    ledger: Ledger, chip: str, terms: str, stale_days: int, provider: str | None = None
) -> list[tuple[datetime.date, float]]:
    """The dated rents of a chip as steps (day, dollars per chip-hour), each holding until the next.

    Of one provider; with None the median over all providers whose price of that day is not stale, indexes left out.
    Each step is what `quote` would have said on its day.
    """
    names = [provider] if provider else [name for name, row in ledger.providers.items() if row.kind != "index"]
    rows = [row for name in names for row in ledger.of(name, chip, terms) if row.date]
    steps = []
    for day in sorted({row.day for row in rows}):
        quotes = [quote(ledger, name, chip, terms, day, stale_days) for name in names]
        held = [each.dollars for each in quotes if each.rows and not is_stale(each.rows[-1], day, stale_days)]
        steps.append((day, statistics.median(price for price in held if price is not None)))
    return steps

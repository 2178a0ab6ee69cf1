"""Tables of figures that know their date and source: what prices, costs of owning and claims have in common."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from stages.files.artifacts import Refusal
from stages.planning.ledgers import Row, load_ledger, row_of
from stages.settings.reading import shown


def first_day(date: str) -> datetime.date:
    """The first day that a date may mean: 2026-03 is 2026-03-01. So no figure is taken for younger than it is."""
    year, month, day = [*map(int, date.split("-")), 1, 1][:3]
    return datetime.date(year, month, day)


def _plain(value: Any) -> Any:
    """YAML makes a date of 2026-03-01 and a number of 2026, unless they stand in quotes."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _existing(date: str) -> str:
    try:
        first_day(date)
    except (ValueError, OverflowError):
        raise ValueError(f"{shown(date)} is no date; write YYYY, YYYY-MM or YYYY-MM-DD (null: undated)") from None
    return date


Date = Annotated[str, BeforeValidator(_plain), AfterValidator(_existing)]
Text = Annotated[str, Field(pattern=r"\S")]
Dollars = Annotated[float, Field(gt=0, le=1e12)]
Amount = Annotated[float, Field(ge=0, le=1e12)]


class DatedRow(Row):
    """A figure of a ledger. `date` null: undated, shown as such and used in no verdict."""

    id: Text
    date: Date | None
    source: Text
    archived: Text | None = None  # the page as it was that day
    note: Text | None = None

    @property
    def day(self) -> datetime.date:
        """Of a dated row only."""
        assert self.date is not None, self.id
        return first_day(self.date)


def load_tables(path: Path, kinds: Mapping[str, type[Row]]) -> dict[str, list[Any]]:
    """The tables of a ledger by name; each is a list of rows with an id of its own.

    The table `sources` holds words that rows may write in place of a long source.
    """
    content = load_ledger(path)
    if not isinstance(content, dict):
        raise Refusal(f"{path}: must be a mapping of tables: {', '.join(kinds)}")
    for name in content:
        if name not in (*kinds, "sources"):
            raise Refusal(f"{path}: {shown(name)}: no such table; there are {', '.join(kinds)}")
    sources = content.get("sources") or {}
    return {name: _rows(path, name, content.get(name), kind, sources) for name, kind in kinds.items()}


def _rows(path, table, rows, kind, sources):
    if not isinstance(rows, list):
        raise Refusal(f"{path}: {table}: must be a list of rows; write `- {{id: ..., ...}}` below it")
    found: dict[str, Row] = {}
    for number, values in enumerate(rows, 1):
        named = isinstance(values, dict) and isinstance(values.get("id"), str)
        place = f"{path}: row {values['id'] if named else f'{number} of {table}'}"
        if isinstance(values, dict) and isinstance(sources, dict) and isinstance(values.get("source"), str):
            values = values | {"source": sources.get(values["source"], values["source"])}
        row = row_of(kind, values, place)
        if values["id"] in found:
            raise Refusal(f"{place}: the id stands twice in {table}; give one of the rows another")
        found[values["id"]] = row
    return [*found.values()]


def days_between(one: datetime.date, other: datetime.date) -> int:
    return abs((other - one).days)

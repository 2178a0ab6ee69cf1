"""The tables in circulation (conf/plan/circulated.yaml), computed again cell by cell, with what is wrong and why.

Nothing of the answers stands here: each is a function of the claim, the ledgers of rents and of owning, and the
equations of this folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.files.artifacts import Refusal
from stages.planning import curve_fit
from stages.planning.chips import Chip
from stages.planning.collectives import hierarchical_all_reduce_seconds
from stages.planning.compute import compute_seconds
from stages.planning.dated import Dollars, Text
from stages.planning.ledgers import Row, load_ledger, row_of
from stages.planning.ownership import Owning
from stages.planning.rent_or_own import (
    HOURS_PER_MONTH,
    HOURS_PER_YEAR,
    annuity_dollars,
    break_even_months,
    residual_share,
    running_dollars_per_hour,
)

HOURS_OF_30_DAYS = 720.0
SAME = 0.02  # relative difference up to which a claim counts as rounded

Number = Annotated[int, Field(ge=1, le=2**40)]
Share = Annotated[float, Field(gt=0, lt=1)]


class MonthOfRent(Row):
    id: Text
    chips: Number
    chip: Text
    dollars_per_chip_hour: Dollars
    dollars: Dollars


class MonthOfOwning(Row):
    id: Text
    chips: Number
    chip: Text
    capital_dollars: Dollars
    dollars_per_month_low: Dollars
    dollars_per_month_high: Dollars


class Throughput(Row):
    id: Text
    nodes: Number
    topology_aware_tokens_per_second: Dollars
    generic_tokens_per_second: Dollars
    loss: Share


class YearOfTraining(Row):
    """Million dollars."""

    id: Text
    parameters: Dollars
    compute: Dollars
    network: Dollars
    staff: Dollars
    total: Dollars
    rent_of: Text | None  # the row of month_of_rent whose price the compute was bought at; null: owned


class Duration(Row):
    id: Text
    parameters: Dollars
    text_bytes: Dollars
    hours: Dollars


class Loss(Row):
    id: Text
    low: Share
    high: Share


class Assumed(Row):
    """What the tables leave out and their recomputation needs."""

    chip: Text
    precision: Text
    chips_per_node: Number
    utilization: Share
    bytes_per_token: Dollars
    tokens_per_chip_step: Number
    parameters: Dollars
    layers: Number
    owned_years: Number


KINDS: dict[str, type[Row]] = {
    "month_of_rent": MonthOfRent,
    "month_of_owning": MonthOfOwning,
    "throughput": Throughput,
    "year_of_training": YearOfTraining,
    "duration": Duration,
    "loss_of_leaving": Loss,
    "latency_of_leaving": Loss,
}


@dataclass(frozen=True)
class Cell:
    """One number of a table beside what it should be; without a claim, what the table lets one compute."""

    table: str
    row: str
    quantity: str  # with its unit
    claimed: float | None
    recomputed: float
    holds: bool | None  # None: nothing is claimed
    why: str


def load_claims(path: Path) -> tuple[dict[str, list], Assumed]:
    content = load_ledger(path)
    if not isinstance(content, dict) or content.keys() != {*KINDS, "assumed"}:
        raise Refusal(f"{path}: must have the tables {', '.join(KINDS)} and assumed")
    rows = {
        table: [row_of(kind, values, f"{path}: {table}, row {number}") for number, values in enumerate(found, 1)]
        for table, kind in KINDS.items()
        for found in [_list(content[table], path, table)]
    }
    return rows, row_of(Assumed, content["assumed"], f"{path}: assumed")


def _list(found, path, table):
    if not isinstance(found, list) or not found:
        raise Refusal(f"{path}: {table}: must be a list of rows; write `- {{id: ..., ...}}` below it")
    return found


def compared(table: str, row: str, quantity: str, claimed: float, recomputed: float, why: str) -> Cell:
    return Cell(table, row, quantity, claimed, recomputed, abs(recomputed / claimed - 1) <= SAME, why)


# ---- 100 chips for a month


def month_of_rent(rows: list[MonthOfRent]) -> list[Cell]:
    """Chips x hours x price, for a month of 30 days."""
    cells = []
    for row in rows:
        due = row.chips * HOURS_OF_30_DAYS * row.dollars_per_chip_hour
        hours = row.dollars / (row.chips * row.dollars_per_chip_hour)
        why = f"the claim is {due / row.dollars:.3g} times too low: it pays {hours:.3g} hours, not {HOURS_OF_30_DAYS:g}"
        cells.append(compared("month of rent", row.id, "dollars", row.dollars, due, why))
    return cells


def month_of_owning(row: MonthOfOwning, rents: list[MonthOfRent], owned: Owning) -> list[Cell]:
    """Capital and running costs from the ledger of owning; then what the wrong rents did to the choice."""
    capital, hourly = row.chips * owned.capital_dollars, row.chips * running_dollars_per_hour(owned)
    per_chip = row.capital_dollars / row.chips
    table, middle = "month of owning", (row.dollars_per_month_low + row.dollars_per_month_high) / 2
    why = f"{per_chip:,.0f} a chip; dated purchases with network: {owned.capital_dollars:,.0f}"
    cells = [compared(table, row.id, "capital, dollars", row.capital_dollars, capital, why)]
    monthly = hourly * HOURS_PER_MONTH
    inside = row.dollars_per_month_low <= monthly <= row.dollars_per_month_high
    why = f"power, staff and upkeep; the claim is {row.dollars_per_month_low:,.0f} to {row.dollars_per_month_high:,.0f}"
    cells.append(Cell(table, row.id, "running, dollars a month", middle, monthly, inside, why))
    for rent in rents:
        claimed = row.capital_dollars / (rent.dollars - middle)
        months = break_even_months(owned, rent.dollars_per_chip_hour, 1.0)
        assert months is not None, "a rent above the running costs"
        why = f"by the table's own totals {claimed:.3g} months; with hours counted right and dated capital {months:.3g}"
        quantity = f"months to break even against {rent.id}"
        cells.append(compared(table, row.id, quantity, claimed, months, why))
    return cells


# ---- tokens per second on more nodes


def throughput(rows: list[Throughput], chip: Chip, assumed: Assumed) -> list[Cell]:
    """The loss that the two columns give, their efficiency, and the model sizes that the hardware allows."""
    table, first, cells = "throughput", rows[0], []
    for row in rows:
        loss = 1 - row.generic_tokens_per_second / row.topology_aware_tokens_per_second
        name, why = f"{row.nodes} nodes", "follows from its own columns"
        cells.append(compared(table, name, "loss without topology", row.loss, loss, why))
        for column in ("topology_aware", "generic"):
            field = f"{column}_tokens_per_second"
            share = getattr(row, field) / getattr(first, field) * first.nodes / row.nodes
            why = f"tokens per second and node against {first.nodes} nodes"
            cells.append(Cell(table, name, f"efficiency, {column.replace('_', ' ')}", None, share, None, why))
            if column == "topology_aware":
                cells.append(_largest_model(table, name, getattr(row, field), row.nodes, chip, assumed))
    return cells


def largest_model(tokens_per_second_per_chip: float, peak_flops_per_second: float, utilization: float) -> float:
    """Most active parameters that one chip can train at this speed: peak x utilization / (6 tokens/s); no attention."""
    return peak_flops_per_second * utilization / (6 * tokens_per_second_per_chip)


def _largest_model(table, name, tokens_per_second, nodes, chip, assumed):
    per_chip = tokens_per_second / (nodes * assumed.chips_per_node)
    peak = chip.peak(assumed.precision)
    at_peak, usual = (largest_model(per_chip, peak, share) for share in (1.0, assumed.utilization))
    why = f"{per_chip:,.0f} tokens/s a chip: {at_peak / 1e9:.3g}B at all of the peak of {chip.name}, "
    why += f"{usual / 1e9:.3g}B at {assumed.utilization:.0%} of it"
    return Cell(table, name, "most active parameters", None, usual, None, why)


# ---- a year of training


def year_of_training(rows: list[YearOfTraining], rents: list[MonthOfRent], owned: Owning, years: int) -> list[Cell]:
    """Sums, the chip-hours that each cloud bought, and the capital that the owned column leaves out."""
    price = {rent.id: rent.dollars_per_chip_hour for rent in rents}
    table, cells, bought = "year of a 175B model", [], {}
    for row in rows:
        parts = row.compute + row.network + row.staff
        cells.append(compared(table, row.id, "total, million dollars", row.total, parts, "the sum of its parts"))
        if row.rent_of is not None:
            hours = bought[row.id] = row.compute * 1e6 / price[row.rent_of]
            why = f"{hours / 1e6:.3g} million chip-hours at {price[row.rent_of]:g} dollars"
            cells.append(Cell(table, row.id, "chips for a year", None, hours / HOURS_PER_YEAR, None, why))
    most, least = max(bought, key=bought.__getitem__), min(bought, key=bought.__getitem__)
    why = f"{most} buys {bought[most] / bought[least]:.3g} times the hours of {least}: the loss of efficiency is in it"
    cells.append(Cell(table, most, "loss it assumes", None, 1 - bought[least] / bought[most], None, why))
    for row in rows:
        if row.rent_of is None:
            chips = bought[least] / HOURS_PER_YEAR
            residual = residual_share(owned.value_kept_per_year, years)
            yearly = annuity_dollars(owned.capital_dollars, owned.cost_of_capital_per_year, years, residual)
            capital = chips * yearly / 1e6
            why = f"capital is left out: {chips:.3g} chips, as {least} rents, cost {capital:.3g} million a year "
            why += f"over {years} years"
            cells.append(
                compared(table, row.id, "total with capital, million dollars", row.total, row.total + capital, why)
            )
    return cells


# ---- 12B parameters on a terabyte, and what leaving loses


def duration(row: Duration, chip: Chip, assumed: Assumed) -> list[Cell]:
    """Chips that finish in the claimed hours; without their number the claim says nothing."""
    tokens = row.text_bytes / assumed.bytes_per_token
    seconds = compute_seconds(tokens, 6 * row.parameters, chip.peak(assumed.precision), assumed.utilization)
    chips = seconds / (row.hours * 3600)
    why = (
        f"{tokens / 1e9:.3g}B tokens need {seconds / 3600:,.0f} hours of one {chip.name} at {assumed.utilization:.0%}; "
    )
    why += "the claim names no number of chips, so it holds for this number only"
    return [Cell("12B on 1 TB", row.id, f"chips for {row.hours:g} hours", None, chips, None, why)]


def loss_of_leaving(row: Loss, rows: list[Throughput], worst: tuple[str, float] | None) -> list[Cell]:
    """The claimed loss beside the table's own and the worst that anybody published."""
    table, middle, cells = "loss of leaving", (row.low + row.high) / 2, []
    for each in rows:
        loss = 1 - each.generic_tokens_per_second / each.topology_aware_tokens_per_second
        why = f"of the throughput table at {each.nodes} nodes; the claim is {row.low:.0%} to {row.high:.0%}"
        holds = row.low <= round(loss, 2) <= row.high
        cells.append(Cell(table, f"{each.nodes} nodes", "training efficiency lost", middle, loss, holds, why))
    if worst is not None:
        where, loss = worst
        why = f"the largest fall among the registry's points: {where}"
        cells.append(
            Cell(table, "published", "training efficiency lost", middle, loss, row.low <= loss <= row.high, why)
        )
    return cells


def latency_of_leaving(row: Loss, chip: Chip, assumed: Assumed) -> list[Cell]:
    """What the network adds to a generated token: nothing inside a node; two all-reduces a layer across two nodes.

    Megatron-LM's tensor parallelism (arXiv 1909.08053): one all-reduce after attention and one after the MLP. Of so few
    bytes only the latency counts.
    """

    def waiting(nodes: int) -> float:
        each = hierarchical_all_reduce_seconds(
            0.0, nodes, assumed.chips_per_node, 1.0, 1.0, chip.intra_latency_seconds, chip.inter_latency_seconds
        )
        seconds: float = 2 * assumed.layers * each
        return seconds

    milliseconds = 1e3 * (waiting(2) - waiting(1))
    why = "a model that fits a node sends nothing over the network: the same chips and software answer as fast; "
    why += f"over two nodes each token waits {milliseconds:.2g} ms more ({assumed.layers} layers), on any cloud; "
    why += f"the claim of {row.low:.0%} to {row.high:.0%} names no chip, model or measurement"
    middle = (row.low + row.high) / 2
    return [Cell("latency of leaving", row.id, "share added inside a node", middle, 0.0, None, why)]


def recomputed(
    rows: dict[str, list], assumed: Assumed, chip: Chip, owned: Owning, worst: tuple[str, float] | None
) -> list[Cell]:
    """All cells of all tables."""
    rents, speeds = rows["month_of_rent"], rows["throughput"]
    cells = month_of_rent(rents)
    for row in rows["month_of_owning"]:
        cells += month_of_owning(row, rents, owned)
    cells += throughput(speeds, chip, assumed)
    cells += year_of_training(rows["year_of_training"], rents, owned, assumed.owned_years)
    for row in rows["duration"]:
        cells += duration(row, chip, assumed)
    for row in rows["loss_of_leaving"]:
        cells += loss_of_leaving(row, speeds, worst)
    for row in rows["latency_of_leaving"]:
        cells += latency_of_leaving(row, chip, assumed)
    return cells


def networks(rows: list[Throughput], assumed: Assumed, chip: Chip) -> dict[str, list[curve_fit.Fit]]:
    """For each column of the throughput table, the networks that would give it."""
    nodes = [row.nodes for row in rows]
    return {
        name: curve_fit.explain(
            nodes,
            [getattr(row, f"{name}_tokens_per_second") for row in rows],
            assumed.chips_per_node,
            assumed.tokens_per_chip_step,
            assumed.parameters,
            assumed.layers,
            chip,
        )
        for name in ("topology_aware", "generic")
    }

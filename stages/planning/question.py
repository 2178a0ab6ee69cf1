"""A person's question: how long and how much to train a model on so many chips of these providers, and what leaving
one of them costs.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.files.artifacts import Refusal
from stages.planning import moving, reliability, rent_or_own
from stages.planning.chips import Chip
from stages.planning.ownership import Books, owning, owning_rows
from stages.planning.prices import OWN, Ledger, is_stale, quote
from stages.planning.ranges import Range, exactly, over, times
from stages.planning.speed import Speed, Subject

HOURS_PER_DAY = 24


@dataclass(frozen=True)
class Rate:
    """Dollars per chip-hour of work, and the rows that say so. `dollars` None: no dated row."""

    provider: str
    dollars: Range | None
    rows: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One row of the table: a provider and a number of chips."""

    provider: str
    chips: int
    nodes: int
    tokens_per_second: Range
    linear_tokens_per_second: float
    efficiency: float  # of throughput per chip against the run that it is predicted from
    goodput: float  # share of the time that moves training forward
    days: Range
    dollars_per_chip_hour: Range | None
    dollars: Range | None  # of the training alone
    basis: str
    rows: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Leaving:
    """From the provider that is left to another, for the same training on as many chips."""

    to: str
    chips: int
    change: Range | None  # of the dollars, moving aside: over those of the provider that is left, minus 1
    moved_bytes: float
    transfer_hours: float
    idle_dollars: float | None  # of the new chips if they wait for the transfer
    egress_dollars: float | None  # None: no price is known
    verdict: str  # cheaper, dearer or open


def rate_of(provider: str, chip: str, plan: Any, today: datetime.date, ledger: Ledger, books: Books) -> Rate:
    """Rent from the ledger of prices; for `own` the cost of an owned chip at plan.utilization over plan.years."""
    if provider != OWN:
        found = quote(ledger, provider, chip, plan.terms, today, plan.stale_days)
        names = tuple(row.id for row in found.rows)
        if found.dollars is None or found.low is None or found.high is None:
            return Rate(provider, None, names, found.warnings)
        return Rate(provider, Range(found.dollars, found.low, found.high), names, found.warnings)
    ends = (owning(books, chip, today, plan.stale_days, end) for end in ("value", "low", "high"))
    dollars = Range(*(rent_or_own.own_dollars_per_hour(each, plan.years, plan.utilization) for each in ends))
    rows = owning_rows(books, chip, today, plan.stale_days)
    old = sorted((row for row in rows if is_stale(row, today, plan.stale_days)), key=lambda row: row.day)
    warning = f"own: {len(old)} of {len(rows)} rows are older than plan.stale_days ({plan.stale_days}), "
    warnings = (f"{warning}the oldest {old[0].id}",) if old else ()
    return Rate(provider, dollars, tuple(row.id for row in rows), warnings)


def goodput_of(what: Subject, nodes: int, plan: Any) -> float:
    """With checkpoints at the Young interval."""
    state = reliability.checkpoint_state_bytes(what.parameters, plan.checkpoint_bytes_per_parameter)
    write = reliability.checkpoint_seconds(state, nodes, plan.checkpoint_bytes_per_second_per_node)
    mtbf = reliability.mtbf_seconds(nodes, plan.failures_per_node_day)
    interval = reliability.young_interval_seconds(write, mtbf)
    return reliability.goodput(write, interval, mtbf, plan.restart_seconds)


def answer(what: Subject, chip: Chip, chips: int, found: Speed, rate: Rate, plan: Any) -> Answer:
    nodes = -(-chips // chip.chips_per_node)
    goodput = goodput_of(what, nodes, plan)
    if goodput <= 0:
        raise Refusal(
            f"plan.chips = {chips}: at plan.failures_per_node_day = {plan.failures_per_node_day:g} nothing is done"
        )
    useful = times(found.tokens_per_second, exactly(goodput))
    seconds = over(exactly(plan.tokens), useful)
    days = times(seconds, exactly(1 / reliability.SECONDS_PER_DAY))
    chip_hours = times(days, exactly(HOURS_PER_DAY * chips))
    return Answer(
        provider=rate.provider,
        chips=chips,
        nodes=nodes,
        tokens_per_second=found.tokens_per_second,
        linear_tokens_per_second=found.linear,
        efficiency=found.tokens_per_second.value / found.linear,
        goodput=goodput,
        days=days,
        dollars_per_chip_hour=rate.dollars,
        dollars=times(chip_hours, rate.dollars) if rate.dollars else None,
        basis=found.basis,
        rows=rate.rows,
        warnings=rate.warnings,
    )


def leaving(what: Subject, old: Answer, new: Answer, plan: Any) -> Leaving:
    """The same number of chips and the same speed on both sides, so that what differs is the price and the move."""
    state = reliability.checkpoint_state_bytes(what.parameters, plan.checkpoint_bytes_per_parameter)
    moved = moving.moved_bytes(plan.tokens, plan.bytes_per_token, state)
    seconds = moving.transfer_seconds(moved, plan.link_bytes_per_second)
    price, change, verdict = plan.egress_dollars_per_gigabyte, None, "open: no dated price"
    if old.dollars_per_chip_hour and new.dollars_per_chip_hour:
        ratio = over(new.dollars_per_chip_hour, old.dollars_per_chip_hour)
        change = Range(*(end - 1 for end in ratio))
        verdict = "cheaper" if change.high < 0 else "dearer" if change.low > 0 else "open"
    rent = new.dollars_per_chip_hour
    return Leaving(
        to=new.provider,
        chips=new.chips,
        change=change,
        moved_bytes=moved,
        transfer_hours=seconds / 3600,
        idle_dollars=moving.idle_dollars(seconds, new.chips, rent.value) if rent else None,
        egress_dollars=None if price is None else moving.egress_dollars(moved, price),
        verdict=verdict,
    )


def sentence(what: Subject, old: Answer, moves: Sequence[Leaving], plan: Any) -> str:
    """What leaving costs, in one line."""
    if old.dollars is None:
        return f"{old.provider} has no dated price for {plan.chip} {plan.terms}: there is nothing to compare with"
    start = f"Training {what.name} on {plan.tokens / 1e12:g}T tokens with {old.chips:,} {plan.chip} costs "
    start += f"{_spread(old.dollars)} at {old.provider}"
    parts = []
    for move in moves:
        if move.change is not None:
            ends = f"{_signed(move.change.low)} to {_signed(move.change.high)}"
            place = f"owned at {plan.utilization:.0%} use" if move.to == OWN else f"at {move.to}"
            parts.append(f"{_signed(move.change.value)} ({ends}) {place}")
    if not parts:
        return f"{start}; no other provider that is asked for has a dated price"
    move = moves[0]
    egress = "egress not priced" if move.egress_dollars is None else f"${move.egress_dollars:,.0f} of egress"
    moving_takes = f"moving takes {move.moved_bytes / 1e12:.3g} TB, {move.transfer_hours:.2g} h, {egress}"
    return f"{start}; {', '.join(parts)}; {moving_takes}"


def _spread(dollars: Range) -> str:
    """In millions, or in thousands below one million."""
    if dollars.value >= 1e6:
        return f"${dollars.value / 1e6:.3g}M ({dollars.low / 1e6:.3g} to {dollars.high / 1e6:.3g})"
    return f"${dollars.value / 1e3:,.0f}k ({dollars.low / 1e3:,.0f} to {dollars.high / 1e3:,.0f})"


def _signed(share: float) -> str:
    return f"{100 * share:+.0f}%".replace("-", "−")

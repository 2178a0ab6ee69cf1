"""Numbers that cannot be right, found from the row's own neighbours: peak, batch, step time, days, price, scale.

    for finding in check(load_claims()): print(finding.message)

A row holds what a publisher printed. Each rule compares two ways to the same number and stays silent where one of them
is not printed. A finding is "impossible", or "doubtful" where it is only beyond what is usual.
"""

import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.files.artifacts import ROOT, Refusal
from stages.planning.chips import Chip, load_chips
from stages.planning.ledgers import Row, load_ledger, row_of
from stages.planning.points import Point, Word
from stages.planning.step import Count

PUBLISHED = ROOT / "conf/plan/published"
USUAL_MFU_PERCENT = 65.0  # the highest that large public runs reach outside of TPU slices (MegaScale, arXiv 2402.15627)
TOLERANCE = 0.015  # of a number, beside half a unit of its last printed digit
MONTH_TOLERANCE = 0.03  # a month has 720 to 744 hours
MOST_GAIN = 1.10  # of throughput per chip with more chips; caches and smaller shards give a few percent
SECONDS_PER_DAY = 86_400

Positive = Annotated[float, Field(gt=0, le=1e30)]


class Claim(Row):
    """One row, or one column, of a published table, as it was printed. What is not printed is null or left out."""

    id: Word
    table: Word
    source: Word
    date: datetime.date | None = None
    chip: Word | None = None
    precision: Word | None = None
    chips: Count | None = None
    global_batch_sequences: Count | None = None
    sequence_tokens: Count | None = None
    flops_per_sequence: Positive | None = None
    flops_per_token: Positive | None = None
    step_seconds: Positive | None = None
    tokens_per_second: Positive | None = None
    tokens_per_second_per_chip: Positive | None = None
    tflops_per_chip: Positive | None = None
    mfu_percent: Positive | None = None
    training_tokens: Positive | None = None
    days: Positive | None = None
    hours: Positive | None = None
    chip_hours: Positive | None = None
    price_per_chip_hour: Positive | None = None
    price_total: Positive | None = None
    baseline: Word | None = None  # the row that efficiency is relative to, of fewer chips
    efficiency_percent: Positive | None = None
    note: Word | None = None


@dataclass(frozen=True)
class Finding:
    """`stated` is printed, `expected` follows from the rest of the row or table."""

    row: str
    table: str
    rule: str
    severity: Literal["impossible", "doubtful"]
    stated: float
    expected: float
    message: str


def load_claims(paths: str | Path | Iterable[str | Path] = PUBLISHED) -> list[Claim]:
    """The rows of files, and of the files of folders: each a list of rows."""
    found: dict[str, Claim] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
            rows = load_ledger(file)
            if not isinstance(rows, list):
                raise Refusal(f"{file}: must be a list of rows; write `- {{id: ..., table: ..., source: ...}}`")
            for number, row in enumerate(rows, start=1):
                place = f"{file}: row {row['id'] if isinstance(row, dict) and row.get('id') else number}"
                claim = row_of(Claim, row, place)
                if claim.id in found:
                    raise Refusal(f"{place}: the id stands twice; give each row its own")
                found[claim.id] = claim
    for claim in found.values():
        if claim.baseline is not None and claim.baseline not in found:
            raise Refusal(f"row {claim.id}: baseline = {claim.baseline}: no row has this id; add it or leave it out")
    return list(found.values())


def of_points(points: Sequence[Point]) -> list[Claim]:
    """The rows of the registry as claims: their metric, and FLOPs of a token where the model's shape is known."""
    ids = {point.id for point in points}
    return [
        Claim.model_validate(
            {
                "id": point.id,
                "table": point.set,
                "source": point.source,
                "date": point.date,
                "chip": point.chip.name,
                "precision": point.precision,
                "chips": point.chips,
                "global_batch_sequences": point.global_batch_sequences,
                "sequence_tokens": point.sequence_tokens,
                "flops_per_token": point.model.flops_per_token(point.sequence_tokens)
                if point.sequence_tokens and point.model.active_parameters
                else None,
                "baseline": point.anchor if point.anchor in ids and point.metric != "efficiency_percent" else None,
                point.metric: point.value,
            }
        )
        for point in points
    ]


def check(claims: Iterable[Claim]) -> list[Finding]:
    """What is wrong in the rows, in their order; nothing where they agree with themselves."""
    claims, chips = list(claims), load_chips()
    by_id = {claim.id: claim for claim in claims}
    return [finding for claim in claims for rule in RULES for finding in rule(claim, by_id, chips)]


Rule = Callable[[Claim, dict[str, Claim], dict[str, Chip]], Iterator[Finding]]


# ---- what a row says of itself


def _derived_tokens_per_second(claim):
    """From batch and step time; null where they are not printed."""
    if claim.global_batch_sequences and claim.sequence_tokens and claim.step_seconds:
        return claim.global_batch_sequences * claim.sequence_tokens / claim.step_seconds
    return None


def _tokens_per_second(claim):
    if derived := _derived_tokens_per_second(claim):
        return derived
    each = claim.tokens_per_second_per_chip
    return claim.tokens_per_second or (each * claim.chips if each and claim.chips else None)


def _peak(claim, chips):
    chip = chips.get(claim.chip or "")
    return chip.peak_flops_per_second.get(claim.precision or "") if chip else None


def _flops_per_second_per_chip(claim):
    """From tokens and the FLOPs of a token or sequence, else as printed."""
    rate, each = _tokens_per_second(claim), claim.flops_per_token
    if each is None and claim.flops_per_sequence and claim.sequence_tokens:
        each = claim.flops_per_sequence / claim.sequence_tokens
    if rate and each and claim.chips:
        return rate * each / claim.chips
    return claim.tflops_per_chip * 1e12 if claim.tflops_per_chip else None


def _differs(stated, expected, tolerance=TOLERANCE):
    """Whether two numbers differ by more than rounding: a share, or half a unit of the last printed digit."""
    printed = f"{stated:.10f}".rstrip("0")
    half_unit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return abs(stated - expected) > max(tolerance * abs(expected), half_unit)


def _short(number):
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _finding(claim, rule, stated, expected, why):
    message = f"{claim.table}, {claim.id}: {rule}: printed {stated:,.12g}, should be {_short(expected)} ({why})"
    return Finding(claim.id, claim.table, rule, "impossible", stated, expected, message)


def _over(claim, rule, percent, most, severity):
    message = (
        f"{claim.table}, {claim.id}: {rule}: {percent:.4g}% of the dense peak of {claim.chip} at {claim.precision}"
    )
    return Finding(claim.id, claim.table, rule, severity, percent, most, message)


# ---- rules


def _above_peak(claim, by_id, chips):
    """More FLOP/s than the chip has, printed or computed; or more of them than runs usually reach."""
    peak, reached = _peak(claim, chips), _flops_per_second_per_chip(claim)
    shares = [100 * reached / peak] if peak and reached else []
    percent = max([*shares, *([claim.mfu_percent] if claim.mfu_percent else [])], default=0.0)
    if percent > 100:
        yield _over(claim, "more than the peak", percent, 100.0, "impossible")
    elif percent > USUAL_MFU_PERCENT:
        yield _over(claim, "over 65% MFU", percent, USUAL_MFU_PERCENT, "doubtful")


def _tokens(claim, by_id, chips):
    derived = _derived_tokens_per_second(claim)
    if claim.tokens_per_second and derived and _differs(claim.tokens_per_second, derived):
        why = f"batch {claim.global_batch_sequences} x {claim.sequence_tokens} tokens / {claim.step_seconds} s"
        yield _finding(claim, "tokens do not match batch and step", claim.tokens_per_second, derived, why)
    total, each = claim.tokens_per_second, claim.tokens_per_second_per_chip
    if total and each and claim.chips and _differs(each, total / claim.chips):
        why = f"{total:,.0f} tokens/s on {claim.chips} chips"
        yield _finding(claim, "tokens per chip do not match the total", each, total / claim.chips, why)


def _days(claim, by_id, chips):
    rate = _tokens_per_second(claim)
    if claim.days and claim.training_tokens and rate:
        expected = claim.training_tokens / rate / SECONDS_PER_DAY
        if _differs(claim.days, expected):
            why = f"{claim.training_tokens:,.4g} tokens at {rate:,.0f} tokens/s"
            yield _finding(claim, "days do not match tokens", claim.days, expected, why)


def _utilization(claim, by_id, chips):
    peak, reached = _peak(claim, chips), _flops_per_second_per_chip(claim)
    if claim.mfu_percent and peak and reached and not claim.flops_per_token:
        expected = 100 * reached / peak
        if _differs(claim.mfu_percent, expected):
            why = f"{reached / 1e12:,.0f} TFLOP/s of {peak / 1e12:,.0f} at {claim.precision}"
            yield _finding(claim, "MFU does not match the peak", claim.mfu_percent, expected, why)


def _price(claim, by_id, chips):
    hours = claim.chip_hours or (claim.chips * claim.hours if claim.chips and claim.hours else None)
    if claim.price_total and claim.price_per_chip_hour and hours:
        expected = claim.price_per_chip_hour * hours
        if _differs(claim.price_total, expected, MONTH_TOLERANCE):
            why = f"{hours:,.0f} chip-hours at {claim.price_per_chip_hour:g}"
            yield _finding(claim, "price total is not price times hours", claim.price_total, expected, why)


def _rate_per_chip(claim):
    rate = _tokens_per_second(claim)
    if rate and claim.chips:
        return "tokens/s", rate / claim.chips
    if claim.global_batch_sequences and claim.step_seconds and claim.chips:  # sequences of one unknown length
        return "sequences/s", claim.global_batch_sequences / claim.step_seconds / claim.chips
    if claim.tokens_per_second_per_chip:
        return "tokens/s", claim.tokens_per_second_per_chip
    if claim.tflops_per_chip:
        return "TFLOP/s", claim.tflops_per_chip
    return ("% MFU", claim.mfu_percent) if claim.mfu_percent else ("", None)


def _efficiency(claim, by_id, chips):
    """Against the baseline of the same table: a stated efficiency, and a rise that more chips cannot give."""
    base = by_id.get(claim.baseline or "")
    if base is None:
        return
    (unit, now), (base_unit, before) = _rate_per_chip(claim), _rate_per_chip(base)
    if now is None or before is None or unit != base_unit:
        return
    if claim.efficiency_percent and _differs(claim.efficiency_percent, 100 * now / before):
        why = f"{now:,.4g} {unit} a chip against {before:,.4g} of {base.id}"
        yield _finding(claim, "efficiency does not follow", claim.efficiency_percent, 100 * now / before, why)
    if (claim.chips or 0) > (base.chips or math.inf) and now > MOST_GAIN * before:
        same = [other.id for other in by_id.values() if other is not base and _rate_per_chip(other) == (unit, before)]
        twin = f"; {', '.join(same)} has the same number" if same else ""
        why = f"at most, {unit} a chip on {base.chips} chips of {base.id}{twin}: one of the two is wrong"
        yield _finding(claim, "faster per chip on more chips", now, before, why)


RULES: tuple[Rule, ...] = (_above_peak, _tokens, _days, _utilization, _price, _efficiency)

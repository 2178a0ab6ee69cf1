"""How fast a model trains on so many chips: from a measured run in the registry, else from a share of the peak."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.files.artifacts import Refusal
from stages.planning.chips import Chip
from stages.planning.compute import model_flops_utilization
from stages.planning.points import Point
from stages.planning.ranges import Range
from stages.planning.step import Anchor, Model, Step, predict

OUTER = (0.1, 0.9)  # quantiles of the registry's MFU that bound a speed which nobody measured
ENOUGH = 3  # points of a chip that may give such quantiles
SEQUENCE_TOKENS = 4096  # where no run says another


@dataclass(frozen=True)
class Subject:
    """What is trained."""

    name: str
    parameters: float
    flops_per_token: float  # forward and backward
    model: Model | None = None  # as published; None: one of ours
    anchor: Point | None = None  # the measured run that its speed is predicted from


@dataclass(frozen=True)
class Speed:
    tokens_per_second: Range
    linear: float  # tokens per second if each chip kept the anchor's; of no anchor the same as the value
    step: Step | None
    basis: str  # what it rests on, in words
    point: str | None  # id of the measured run


def subject(name: str, chip: str, models: Mapping[str, Model], points: Sequence[Point], ours: Mapping) -> Subject:
    """`name` is a model of conf/plan/models.yaml, the id of a point, or one of our own models."""
    by_id = {point.id: point for point in points}
    if name in by_id:
        point = by_id[name]
        if point.chip.name != chip:
            raise Refusal(f"plan.model = {name}: this run was on {point.chip.name}, and plan.chip is {chip}")
        return _published(point.model, point, "plan.model")
    if name in models:
        runs = [point for point in points if point.model.name == name and point.chip.name == chip and _usable(point)]
        return _published(models[name], max(runs, key=_preference, default=None), "plan.model")
    if name in ours:
        figures = ours[name]
        return Subject(name, figures["parameters"], 3 * figures["flops_per_token"])
    known = [*models, *ours, *by_id]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? There" if close else "there"
    raise Refusal(f"plan.model = {name}: no such model; {hint} are {', '.join([*models, *ours])}, and ids of points")


def _published(model, point, key):
    if model.total_parameters is None or model.active_parameters is None:
        raise Refusal(f"{key} = {model.name}: its parameters are not published: choose another, or add them")
    if point is not None and not _usable(point):
        raise Refusal(
            f"{key} = {point.id}: this run cannot be scaled: needs {', '.join(point.missing) or 'a step time'}"
        )
    tokens = (point.sequence_tokens if point else None) or SEQUENCE_TOKENS
    return Subject(model.name, model.total_parameters, model.flops_per_token(tokens), model, point)


def _usable(point):
    return not point.missing and point.sequence_tokens is not None and point.step_seconds() is not None


def _preference(point):
    """The newest run, then the smallest, for which the most is predicted, then the fastest."""
    return (point.date.isoformat() if point.date else "", -point.chips, -(point.step_seconds() or 0), point.id)


def speed(what: Subject, chip: Chip, chips: int, points: Iterable[Point], mfu: float) -> Speed:
    """Tokens per second of `chips` chips. The batch grows with the chips: weak scaling."""
    if chips % min(chips, chip.chips_per_node):
        raise Refusal(f"plan.chips = {chips}: must be whole nodes of {chip.chips_per_node} {chip.name}")
    if what.anchor is None:
        return _assumed(what, chip, chips, points, mfu)
    point, layout = what.anchor, what.anchor.whole_layout
    replica = layout.tp * layout.pp * layout.cp
    unit = math.lcm(replica, layout.pp * layout.ep * layout.etp, point.chip.chips_per_node)
    if chips % unit:
        raise Refusal(
            f"plan.chips = {chips}: must be a multiple of {unit}, because run {point.id} spreads {what.name} over "
            f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} chips and its experts over {layout.ep * layout.etp}"
        )
    ranks = chips // replica
    batch = max(1, round(layout.global_batch_sequences / layout.dp * ranks))
    wanted = layout.model_copy(update={"dp": ranks, "global_batch_sequences": batch})
    measured = point.step_seconds()
    assert measured is not None
    run = Anchor(measured, layout, point.nodes)
    step = predict(point.model, wanted, point.chip, chips // point.chip.chips_per_node, run)
    linear = layout.tokens_per_step / measured * chips / point.chips
    if chips == point.chips:
        return Speed(Range(linear, linear, linear), linear, step, f"measured: {point.id}", point.id)
    basis = f"predicted from {point.id} on {point.chips:,} chips"
    return Speed(Range(step.tokens_per_second, step.low, step.high), linear, step, basis, point.id)


def _assumed(what, chip, chips, points, mfu):
    """At a share of the peak; between the shares that most published runs reach on this chip, or on any."""
    shares = [(point.chip.name, share) for point in points if (share := utilization_of(point)) is not None]
    of_chip = [share for name, share in shares if name == chip.name]
    low, high = np.quantile(of_chip if len(of_chip) >= ENOUGH else [share for _, share in shares], OUTER)
    rate = chips * chip.peak("bf16") / what.flops_per_token
    ends = Range(rate * mfu, rate * min(mfu, float(low)), rate * max(mfu, float(high)))
    where = chip.name if len(of_chip) >= ENOUGH else "any chip"
    basis = f"assumed: {mfu:.0%} of the peak (plan.mfu), as no run of {what.name} on {chip.name} is published; "
    basis += f"low and high: what 80% of the published runs on {where} reach"
    return Speed(ends, ends.value, None, basis, None)


def utilization_of(point: Point) -> float | None:
    """Model FLOPs utilization of a published run; None where too little is published."""
    if not _usable(point) or point.model.active_parameters is None or point.sequence_tokens is None:
        return None
    flops = point.model.flops_per_token(point.sequence_tokens)
    share: float = model_flops_utilization(_rate(point), flops, point.chip.peak(point.precision))
    return share


def _rate(point):
    """Tokens per second and chip."""
    return point.tokens_per_step / point.step_seconds() / point.chips


def worst_fall(points: Sequence[Point]) -> tuple[str, float] | None:
    """The published point with the largest loss of throughput per chip against its anchor, at an equal batch a chip."""
    by_id = {point.id: point for point in points}
    falls = []
    for point in points:
        anchor = by_id.get(point.anchor or "")
        if anchor is None or not (_usable(point) and _usable(anchor)) or anchor.chips >= point.chips:
            continue
        if point.tokens_per_step * anchor.chips == anchor.tokens_per_step * point.chips:
            falls.append((1 - _rate(point) / _rate(anchor), point.id))
    return (max(falls)[1], max(falls)[0]) if falls else None

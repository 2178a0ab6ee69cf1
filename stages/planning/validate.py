"""Published points beside the planner's predictions of them, and beside plain linear scaling."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stages.files.artifacts import Refusal
from stages.planning.fitting import Grid, Pair, mean, predictable, reason_against
from stages.planning.plausibility import Finding, check, load_claims, of_points
from stages.planning.points import POINTS, Point, load_points
from stages.planning.step import Fitted, has_slow_links

CLASSES = ("weak scaling", "strong scaling", "other layout", "MoE", "slow links")
UNITS = {
    "step_seconds": "s",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_chip": "tokens/s/chip",
    "tflops_per_chip": "TFLOP/s/chip",
    "mfu_percent": "% MFU",
    "efficiency_percent": "% of the anchor",
}


INTRODUCTION = """# The planner against published points

Written by the code, not by hand; a test compares. `python -m stages.plan validate` prints the table of the registry
(`conf/plan/points`), and with `--points FILE` that of any other file of rows. The format of a row stands at the top of
`stages/planning/points.py`.

What leaving a set out cannot show: the form of the equation and the boundary of slow links (20 GB/s for a chip) were
chosen with all sets in view. Where a source does not state something that the equation needs, the note of the row says
what stands in: the micro-batches of S23 and of S20's largest run are the defaults of their software, the traffic of FF
is not overlapped and has the middle of the published bandwidths, the network of LF is 400 Gb/s a GPU.
"""


@dataclass(frozen=True)
class Line:
    """One point of the table. Errors are predicted over published minus 1; `reason` says why there are none."""

    point: Point
    classes: tuple[str, ...]
    predicted: float | None
    error: float | None
    linear: float | None
    linear_error: float | None
    reason: str
    fitted: Fitted | None


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors of some points, by the planner and by linear scaling."""

    n: int
    planner: float
    linear: float

    @property
    def verdict(self) -> str:
        if self.planner < self.linear:
            return f"better than linear scaling ({self.planner / self.linear:.2f} of its error)"
        return "NOT better than linear scaling"


@dataclass(frozen=True)
class Table:
    """`summary` and `sets` map a class or a set to its errors; "all" is the whole."""

    rows: tuple[Line, ...]
    summary: Mapping[str, Errors]
    sets: Mapping[str, Errors]
    by_publisher: Errors | None  # fitted without the publisher instead of without the set
    findings: tuple[Finding, ...]  # numbers of these rows that cannot be, or are beyond what is usual

    def markdown(self) -> str:
        predicted = [_head(), _summary(self), _sets(self), _points(self)] if self.summary else []
        parts = [*predicted, _unpredicted(self), _findings(self.findings)]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def validate(points: Sequence[Point], registry: Iterable[Point] | None = None) -> Table:
    """Predict each point that has an anchor, with numbers fitted to the registry without the point's set.

    A set of the registry that shares a measurement with the points is left out too, whatever its name.
    """
    registry, grid = _registry() if registry is None else _with_grid(registry)
    pairs = {pair.point.id: pair for pair in predictable(points, registry)}
    anchors = {point.id: point for point in [*registry, *points]}
    fits: dict[frozenset[str], Fitted] = {}

    def line(point):
        anchor = anchors.get(point.anchor or "")
        if anchor is None:
            return Line(point, (), None, None, None, None, "no anchor", None)
        classes = _classes(point, anchor)
        if reason := reason_against(point, anchor):
            return Line(point, classes, None, None, None, None, reason, None)
        without = frozenset({point.set} | _sets_with(point, registry))
        if without not in fits:
            fits[without] = grid.best(without)
        return _predicted(pairs[point.id], classes, fits[without])

    rows = tuple(line(point) for point in points)
    found = [row for row in rows if row.error is not None]
    return Table(
        rows=rows,
        summary={name: _errors(of) for name in ("all", *CLASSES) if (of := _of_class(found, name))},
        sets={name: _errors([row for row in found if row.point.set == name]) for name in _sets_of(found)},
        by_publisher=_without_publisher(found, pairs, grid, registry),
        findings=tuple(check(of_points(points))),
    )


@functools.cache
def _registry():
    """The rows of conf/plan/points and the errors of all fits to them: read and computed once in a process."""
    return _with_grid(load_points(POINTS))


def _with_grid(points):
    points = list(points)
    return points, Grid(predictable(points))


def _sets_with(point, registry):
    same = [
        other
        for other in registry
        if (other.value, other.chips, other.metric) == (point.value, point.chips, point.metric)
    ]
    return {other.set for other in same}


def _predicted(pair: Pair, classes, fitted):
    try:
        step = pair.step_seconds(fitted)
    except Refusal as refusal:
        return Line(pair.point, classes, None, None, None, None, f"cannot be predicted: {refusal}", None)
    linear = pair.linear_seconds()
    return Line(
        point=pair.point,
        classes=classes,
        predicted=pair.point.value_at(step),
        error=pair.error(step),
        linear=pair.point.value_at(linear),
        linear_error=pair.error(linear),
        reason="",
        fitted=fitted,
    )


def _classes(point, anchor):
    """Weak or strong scaling or another layout on the same chips; and what makes the point harder."""
    if point.chips == anchor.chips:
        kind = "other layout"
    elif point.global_batch_sequences == anchor.global_batch_sequences:
        kind = "strong scaling"
    else:
        kind = "weak scaling"
    slow = has_slow_links(point.chip) and point.chips > point.chip.fast_domain_chips
    return (kind, *(["MoE"] if point.model.experts else []), *(["slow links"] if slow else []))


def _of_class(found, name):
    return found if name == "all" else [row for row in found if name in row.classes]


def _sets_of(found):
    return dict.fromkeys(row.point.set for row in found)


def _errors(rows):
    return Errors(len(rows), mean([abs(row.error) for row in rows]), mean([abs(row.linear_error) for row in rows]))


def _without_publisher(found, pairs, grid, registry):
    """The same with all sets of a publisher left out: a table of one publisher cannot teach its next one."""
    if not found:
        return None
    publishers = dict.fromkeys(row.point.publisher for row in found)
    fits = {name: grid.best({point.set for point in registry if point.publisher == name}) for name in publishers}
    of = [pairs[row.point.id] for row in found]
    errors = [abs(pair.error(pair.step_seconds(fits[pair.point.publisher]))) for pair in of]
    return Errors(len(errors), mean(errors), mean([abs(row.linear_error) for row in found]))


# ---- as Markdown


def document() -> str:
    """docs/planner-validation.md: the registry, and what is wrong in the published tables."""
    wrong = _findings(check(load_claims()), "Published tables (`conf/plan/published`), checked against themselves:")
    return "\n".join([INTRODUCTION, validate(load_points()).markdown(), "", *wrong]) + "\n"


def _head():
    return [
        "Each point is predicted from its anchor, the smaller run of the same set. Errors are predicted over published",
        "minus 1. Three numbers are fitted, each time without the set that the point belongs to (leave-one-set-out):",
        "the share of traffic that is exposed over fast links, the same over slow links, and the slowdown for each",
        "e-fold of chips. Linear scaling keeps the anchor's throughput per chip.",
    ]


def _number(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(share, sign=True):
    return f"{100 * share:+.1f}%" if sign else f"{100 * share:.1f}%"


def _cell(value):
    """On one line, and without a bar that would end the cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _row(*cells):
    return f"| {' | '.join(map(_cell, cells))} |"


def _errors_row(name, errors):
    cells = (errors.n, _percent(errors.planner, sign=False), _percent(errors.linear, sign=False), errors.verdict)
    return _row(name, *cells)


def _summary(table):
    lines = [_row("class", "points", "planner", "linear", ""), "| --- | ---: | ---: | ---: | --- |"]
    lines += [_errors_row(name, errors) for name, errors in table.summary.items()]
    if table.by_publisher:
        lines.append(_errors_row("all, fitted without the publisher", table.by_publisher))
    return lines


def _sets(table):
    lines = [_row("set", "points", "planner", "linear", ""), "| --- | ---: | ---: | ---: | --- |"]
    return lines + [_errors_row(name, errors) for name, errors in table.sets.items()]


def _points(table):
    head = _row("point", "published", "predicted", "error", "linear's error", "classes", "source", "date")
    lines = [head, "| --- | ---: | ---: | ---: | ---: | --- | --- | --- |"]
    for row in table.rows:
        if row.error is None:
            continue
        unit = UNITS[row.point.metric]
        lines.append(
            _row(
                row.point.id,
                f"{row.point.value:,.6g} {unit}",
                _number(row.predicted),
                _percent(row.error),
                _percent(row.linear_error),
                ", ".join(row.classes),
                row.point.source,
                row.point.date or "no date",
            )
        )
    return lines


def _unpredicted(table):
    left = [row for row in table.rows if row.error is None]
    without = [row for row in left if row.reason != "no anchor"]
    lines = [f"- {_cell(row.point.id)}: {row.reason}" for row in without]
    alone = [_cell(row.point.id) for row in left if row.reason == "no anchor"]
    if alone:
        lines += [*([""] if lines else []), f"Without an anchor, so not predicted: {', '.join(alone)}."]
    return lines


def _findings(findings, head="Numbers of these rows that cannot be, or are beyond what is usual:"):
    return [head, "", *(f"- {each.severity}: {each.message}" for each in findings)] if findings else []

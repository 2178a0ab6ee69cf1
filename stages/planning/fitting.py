"""The few fitted numbers of the predictor, and the error that they have on points they were not fitted to.

The numbers are searched on a grid, so a set can be left out at no cost: each grid point's errors are computed once, and
the best one is chosen again without the set. Each set weighs the same, or a long table would decide alone.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stages.planning.points import Point
from stages.planning.step import Anchor, Fitted, Layout, predict

FAST_LINKS = (0.0, 0.1, 0.25, 0.5, 1.0)
SLOW_LINKS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STRAGGLERS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03)
INTERVAL = 0.8  # of the errors lie inside `low` and `high`


@dataclass(frozen=True)
class Pair:
    """A point and the smaller run that it is predicted from, both with all that a prediction needs."""

    point: Point
    anchor: Point

    @cached_property
    def layout(self) -> Layout:
        return self.point.whole_layout

    @cached_property
    def run(self) -> Anchor:
        """The smaller run as it was measured."""
        anchor, measured = self.anchor, self.anchor.step_seconds()
        assert measured
        return Anchor(measured, anchor.whole_layout, anchor.nodes, anchor.model, anchor.chip)

    def step_seconds(self, fitted: Fitted) -> float:
        point = self.point
        return predict(point.model, self.layout, point.chip, point.nodes, self.run, fitted).step_seconds

    def error(self, step_seconds: float) -> float:
        """Of the row's own metric: predicted over published, minus 1."""
        published = self.point.step_seconds()
        assert published
        return step_seconds / published - 1 if self.point.metric == "step_seconds" else published / step_seconds - 1

    def linear_seconds(self) -> float:
        """The step if each chip kept the anchor's throughput."""
        layout, was = self.layout, self.run.layout
        return self.run.step_seconds * (layout.tokens_per_step / layout.chips) / (was.tokens_per_step / was.chips)


def predictable(points: Iterable[Point], registry: Iterable[Point] = ()) -> list[Pair]:
    """The points that have an anchor and all that a prediction needs; anchors are looked for in both."""
    points = list(points)
    by_id = {point.id: point for point in [*registry, *points]}
    pairs = [Pair(point, by_id[point.anchor]) for point in points if point.anchor]
    return [pair for pair in pairs if not reason_against(pair.point, pair.anchor)]


def reason_against(point: Point, anchor: Point) -> str:
    """Why the point cannot be predicted; empty where it can."""
    needed = [*point.missing, *(f"{name} of {anchor.id}" for name in anchor.missing)]
    if not needed and (anchor.step_seconds() is None or point.step_seconds() is None):
        needed = ["a step time or a throughput; a ratio alone has no seconds"]
    return f"cannot be predicted: needs {', '.join(dict.fromkeys(needed))}" if needed else ""


class Grid:
    """Errors of every pair at every grid point, from which fits without any set are read."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.choices = [_fitted(*values) for values in itertools.product(FAST_LINKS, SLOW_LINKS, STRAGGLERS)]
        self.errors = [[abs(pair.error(pair.step_seconds(choice))) for pair in pairs] for choice in self.choices]

    def best(self, without: Iterable[str] = ()) -> Fitted:
        """The numbers that leave the least error, the mean over sets, on all sets but these."""
        left_out = set(without)
        places: dict[str, list[int]] = {}
        for place, pair in enumerate(self.pairs):
            if pair.point.set not in left_out:
                places.setdefault(pair.point.set, []).append(place)

        def loss(errors):
            return sum(mean([errors[place] for place in of_set]) for of_set in places.values())

        return min(zip(self.choices, self.errors, strict=True), key=lambda each: loss(each[1]))[0]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_interval(fitted: Fitted, errors: Sequence[float]) -> Fitted:
    """The fitted numbers with the band that holds 80% of these errors (predicted over published, minus 1)."""
    ratios = sorted(1 / (1 + error) - 1 for error in errors)  # published throughput over predicted
    low, high = quantile(ratios, (1 - INTERVAL) / 2), quantile(ratios, (1 + INTERVAL) / 2)
    return fitted.model_copy(update={"low_share": max(0.0, -low), "high_share": max(0.0, high)})


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _fitted(fast, slow, stragglers):
    return Fitted(
        exposed_share_of_fast_links=fast,
        exposed_share_of_slow_links=slow,
        straggler_share=stragglers,
        low_share=0.0,
        high_share=0.0,
    )


def fit_registry(points: Iterable[Point]) -> tuple[Fitted, Mapping[str, Fitted], Mapping[str, float]]:
    """The fit to all sets, the fits without each set, and each point's error by the fit without its set."""
    grid = Grid(predictable(points))
    by_set = {name: grid.best({name}) for name in dict.fromkeys(pair.point.set for pair in grid.pairs)}
    errors = {pair.point.id: pair.error(pair.step_seconds(by_set[pair.point.set])) for pair in grid.pairs}
    return with_interval(grid.best(), list(errors.values())), by_set, errors

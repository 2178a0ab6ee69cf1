"""The parts of a chart as SVG markup: its frame and scales, axes, marks, names, legend."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from html import escape

from markupsafe import Markup

Format = Callable[[float], str]  # of a number, for people
COLOURS = 8  # --series-0 … --series-7; Okabe and Ito's order, distinguishable without red-green vision


@dataclass(frozen=True)
class Point:
    """One mark of a scatter; low and high bound its vertical interval; a hollow one is a control or a claim."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    series: int = 0
    hollow: bool = False
    note: str = ""
    shift: float = 0.0  # to the right of its x, in pixels, so that marks of one x do not cover each other

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.low is None or self.high is None or not finite(self.low, self.high):
            return None
        return self.low, self.high


@dataclass(frozen=True)
class Line:
    label: str
    points: list[tuple[float, float]]
    series: int = 0
    dashed: bool = False
    band: tuple[tuple[float, float, float], ...] = ()  # (x, low, high), drawn behind the line


@dataclass(frozen=True)
class Frame:
    """The rectangle between the axes and the two scales that map values into it."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    left: int = 62
    right: int = 18
    top: int = 14
    bottom: int = 46

    def x(self, value: float) -> float:
        return self.left + _share(value, self.x_range, self.log_x) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        share = _share(value, self.y_range, self.log_y)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    step = _nice_step(high - low, count)
    return [
        round(index * step, 12) for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]


def side_by_side(points: list[Point], pixels: float = 9.0) -> list[Point]:
    """The points with those of one x shifted apart, in their order."""
    at: dict[float, list[int]] = {}
    for index, point in enumerate(points):
        at.setdefault(point.x, []).append(index)
    shifted = list(points)
    for same in at.values():
        for place, index in enumerate(same):
            shifted[index] = replace(points[index], shift=(place - (len(same) - 1) / 2) * pixels)
    return shifted


def svg(title: str, description: str, body: Iterable[str], width: int, height: int) -> Markup:
    """The drawing with an accessible name and description; `body` is markup, the texts are escaped here."""
    name = "chart-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(body)}</svg>'
    )


def empty(title: str, width: int, height: int) -> Markup:
    text = f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no data</text>'
    return svg(title, "no data", [text], width, height)


def axes(frame: Frame, x_label: str, y_label: str, x_format: Format | None, y_format: Format) -> str:
    """Both axes with ticks and labels; without `x_format` the x axis has no ticks."""
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for value in _axis_ticks(frame.y_range, frame.log_y, 5):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(value))}</text>'
        )
    if x_format:
        for value in _axis_ticks(frame.x_range, frame.log_x, 6):
            x = frame.x(value)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>'
                f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{escape(x_format(value))}</text>'
            )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    middle = (frame.top + floor) / 2
    parts.append(
        f'<text x="{(frame.left + right) / 2:.1f}" y="{frame.height - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _axis_ticks(ends, log, count):
    marks = log_ticks(*ends) if log else []
    return marks if len(marks) >= 3 else ticks(*ends, count)  # less than a decade: round numbers


def _share(value, ends, log):
    """How far between the ends a value lies."""
    low, high, value = map(math.log10, (*ends, value)) if log else (*ends, value)
    return (value - low) / (high - low)


def band(frame: Frame, line: Line) -> str:
    """The area between the ends of a line's interval."""
    upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in line.band]
    lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(line.band)]
    return f'<polygon points="{" ".join(upper + lower)}" fill="{colour_of(line.series)}" opacity="0.16"/>'


def mark(frame: Frame, point: Point, x_format: Format, y_format: Format) -> str:
    x, y, colour = frame.x(point.x) + point.shift, frame.y(point.y), colour_of(point.series)
    bar = between = ""
    if point.interval:
        between = f" [{', '.join(map(y_format, point.interval))}]"
        low, high = map(frame.y, point.interval)
        bar = (
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 5:.1f} {low:.1f}h10M{x - 5:.1f} {high:.1f}h10" '
            f'stroke="{colour}" stroke-width="1.6" fill="none"/>'
        )
    fill = "var(--card)" if point.hollow else colour
    tip = f"{point.label}: {y_format(point.y)}{between} at {x_format(point.x)}. {point.note}".rstrip(". ")
    return (
        f'<g><title>{escape(tip)}</title>{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" '
        f'stroke="{colour}" stroke-width="2"/></g>'
    )


def link(frame: Frame, start: Point, end: Point) -> str:
    return (
        f'<line x1="{frame.x(start.x) + start.shift:.1f}" y1="{frame.y(start.y):.1f}" '
        f'x2="{frame.x(end.x) + end.shift:.1f}" '
        f'y2="{frame.y(end.y):.1f}" stroke="{colour_of(start.series)}" stroke-width="1.4" '
        'stroke-dasharray="3 4" opacity="0.7"/>'
    )


def names(frame: Frame, points: list[Point]) -> list[str]:
    """The labels of the points, placed so that they cover no mark and no other label where there is room; a line joins
    a label that stands away from its mark to it."""
    taken = []
    for point in points:
        x, (low, high) = frame.x(point.x) + point.shift, map(frame.y, point.interval or (point.y, point.y))
        taken += [(x - 5, high - 8, x + 5, low + 8), (x - 8, frame.y(point.y) - 8, x + 8, frame.y(point.y) + 8)]
    names = []
    for point in sorted(points, key=lambda point: (point.y, point.x)):
        x, y, wide = frame.x(point.x) + point.shift, frame.y(point.y), 7.1 * len(point.label)
        places = [(x + 12, y + 4), (x - 12 - wide, y + 4), (x - wide / 2, y - 13), (x - wide / 2, y + 21)]
        places += [
            (x + side + math.copysign(away, side), y + 4 + shift)
            for away in range(0, 100, 12)
            for shift in (0, -18, 18, -34, 34, -50, 50, -66, 66)
            for side in (12, -12 - wide)
        ]
        boxes = [(left, low - 12, left + wide, low + 4) for left, low in places]
        inside = [
            box
            for box in boxes
            if box[0] > frame.left and box[2] < frame.width - 2 and box[1] > 0 and box[3] < frame.height - frame.bottom
        ]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        names.append(_leader(x, y, box) + f'<text class="name halo" x="{box[0]:.1f}" y="{box[3] - 4:.1f}">'
                     f"{escape(point.label)}</text>")  # fmt: skip
    return names


def _leader(x: float, y: float, box: tuple[float, float, float, float]) -> str:
    """A line from a mark to its label, where the label does not touch the mark."""
    end_x, end_y = min(max(x, box[0] - 2), box[2] + 2), min(max(y, box[1] + 2), box[3] - 2)
    if math.hypot(end_x - x, end_y - y) <= 14:
        return ""
    line = f'x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}"'
    return f'<line {line} stroke="var(--muted)" stroke-width="0.8"/>'


def _overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def legend_rows(lines: list[Line], width: int) -> tuple[int, list[tuple[float, int]]]:
    """How many rows the legend takes, and the (x, row) of each entry."""
    x, row, places = 62.0, 0, []
    for line in lines:
        wide = 34 + 6.8 * len(line.label)
        if x + wide > width and x > 62:
            x, row = 62.0, row + 1
        places.append((x, row))
        x += wide
    return row + 1, places


def legend(frame: Frame, lines: list[Line]) -> str:
    parts = []
    for line, (x, row) in zip(lines, legend_rows(lines, frame.width)[1], strict=True):
        y = 14 + 18 * row
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(
            f'<line x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y - 4}" y2="{y - 4}" stroke-width="2.4" '
            f'stroke="{colour_of(line.series)}"{dash}/><text x="{x + 23:.1f}" y="{y}">'
            f"{escape(line.label)}</text>"
        )
    return "".join(parts)


def colour_of(series: int) -> str:
    return f"var(--series-{series % COLOURS})"


def finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _nice_step(span, count):
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * (1 - 1e-9))


def widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def padded(values: list[float], share: float, log: bool = False) -> tuple[float, float]:
    """The range of the values with a margin on both sides; a single value still gets a range."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = (high - low) * share or (0.3 if log else abs(high) * share or 1.0)
    low, high = low - margin, high + margin
    return (10**low, 10**high) if log else (low, high)


def thinned(points: list, kept: int) -> list:
    """At most about `kept` points, the last always among them."""
    stride = max(1, math.ceil(len(points) / kept))
    return [*points[:-1:stride], points[-1]]

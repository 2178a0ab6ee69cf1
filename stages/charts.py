"""Charts as plain inline SVG: pure functions from numbers to markup, no script, no font, no network.

Colours come from CSS variables (see STYLE), so one drawing serves light and dark. Each chart carries an
accessible title and description, and each mark a <title>, which browsers show as a tooltip.
"""

import math
import re
from dataclasses import dataclass, field
from html import escape

COLOURS = 8  # --series-0 … --series-7; Okabe and Ito's order, distinguishable without red-green vision
STYLE = """
:root{--ink:#17202a;--muted:#5d6875;--line:#d9dee4;--grid:#e9edf1;--paper:#f6f7f9;--card:#ffffff;
--series-0:#0868ac;--series-1:#c8501e;--series-2:#6b7785;--series-3:#00876c;--series-4:#a8417f;
--series-5:#7fb2d9;--series-6:#b8860b;--series-7:#5b4bb5}
@media (prefers-color-scheme:dark){:root{--ink:#e8ecf1;--muted:#9aa7b5;--line:#38424e;--grid:#28313b;
--paper:#12171d;--card:#1a2129;--series-0:#58a9e6;--series-1:#f08a5b;--series-2:#9aa7b5;--series-3:#3fc3a4;
--series-4:#e08abf;--series-5:#3f7fb0;--series-6:#e0b040;--series-7:#a79bf0}}
svg.chart{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",sans-serif}
svg.chart text{fill:var(--muted)} svg.chart .name{fill:var(--ink);font-weight:600}
svg.chart .grid{stroke:var(--grid);stroke-width:1} svg.chart .axis{stroke:var(--line);stroke-width:1}
svg.chart .halo{stroke:var(--card);stroke-width:3;paint-order:stroke;stroke-linejoin:round}
"""


@dataclass(frozen=True)
class Point:
    """One mark of a scatter; low and high bound its vertical interval; a hollow one is not a measurement."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    series: int = 0
    hollow: bool = False
    note: str = ""


@dataclass(frozen=True)
class Line:
    label: str
    points: list[tuple[float, float]]
    series: int = 0
    dashed: bool = False


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
    legend: list[tuple[str, int, bool]] = field(default_factory=list)

    def x(self, value):
        return self.left + _share(value, self.x_range, self.log_x) * (self.width - self.left - self.right)

    def y(self, value):
        share = _share(value, self.y_range, self.log_y)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def number(value, digits=3):
    """A number for people: significant digits and an SI suffix, so 12345678 reads 12.3M; None reads –."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (1 - 0.5 * 10**-digits):  # or 999,999 would read 1000k
            return f"{_plain(value / limit, digits)}{suffix}"
    return _plain(value, digits)


def ticks(low, high, count=5):
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    step = _nice_step(high - low, count)
    return [
        round(index * step, 12)
        for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten inside [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high
    ]


def scatter(
    title,
    points,
    x_label,
    y_label,
    log_x=False,
    x_format=number,
    y_format=number,
    links=(),
    width=960,
    height=440,
):
    """Marks with vertical error bars and their names beside them; links joins pairs of points by label."""
    points = [point for point in points if _finite(point.x, point.y) and (point.x > 0 or not log_x)]
    if not points:
        return _empty(title, width, height)
    xs = [point.x for point in points]
    ys = [end for point in points for end in (point.y, point.low, point.high) if _finite(end)]
    frame = Frame(width, height, _padded(xs, 0.12, log_x), _padded(ys, 0.12), log_x)
    by_label = {point.label: point for point in points}
    body = [_axes(frame, x_label, y_label, x_format, y_format)]
    for start, end in links:
        if start in by_label and end in by_label:
            body.append(_link(frame, by_label[start], by_label[end]))
    body += [_mark(frame, point, x_format, y_format) for point in points]
    body += _names(frame, points)
    described = "; ".join(f"{point.label}: {x_format(point.x)}, {y_format(point.y)}" for point in points)
    return _svg(title, f"{x_label} against {y_label}. {described}", body, width, height)


def curves(
    title,
    lines,
    x_label,
    y_label,
    x_format=number,
    y_format=number,
    width=560,
    height=320,
    points_kept=300,
    log=False,
):
    """Lines over a common axis with a legend; each is thinned to what the eye can see. `log` is of both axes."""
    lines = [
        Line(
            line.label,
            [pair for pair in line.points if _finite(*pair) and (min(pair) > 0 or not log)],
            line.series,
            line.dashed,
        )
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return _empty(title, width, height)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    rows, _ = _legend_rows(lines, width)
    x_range = _padded(xs, 0.04, log) if log else _widened(min(xs), max(xs))
    frame = Frame(width, height, x_range, _padded(ys, 0.06, log), log, log, top=14 + 18 * rows)
    body = [_axes(frame, x_label, y_label, x_format, y_format), _legend(frame, lines)]
    for line in lines:
        kept = _thinned(line.points, points_kept)
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in kept)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        last = f"{line.label}: {y_format(kept[-1][1])} at {x_format(kept[-1][0])}"
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{_colour(line.series)}" stroke-width="2" '
            f'stroke-linejoin="round"{dash}><title>{escape(last)}</title></polyline>'
        )
        if len(kept) <= 24:  # few enough measurements to show each
            body += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{_colour(line.series)}">'
                f"<title>{escape(f'{line.label}: {y_format(y)} at {x_format(x)}')}</title></circle>"
                for x, y in kept
            ]
    described = "; ".join(f"{line.label} ends at {y_format(line.points[-1][1])}" for line in lines)
    return _svg(title, f"{y_label} by {x_label}. {described}", body, width, height)


def bars(
    title,
    values,
    y_label,
    reference=None,
    reference_label="",
    y_format=number,
    series=0,
    x_label="",
    width=560,
    height=220,
    highest=None,
):
    """One bar per (label, value) from zero, with an optional dashed reference line across."""
    values = [(str(label), value) for label, value in values if _finite(value)]
    if not values:
        return _empty(title, width, height)
    top = highest or max([value for _, value in values] + [reference or 0.0]) * 1.12 or 1.0
    frame = Frame(width, height, (0, len(values)), (0.0, top), right=66 if reference_label else 18)
    slot = (width - frame.left - frame.right) / len(values)
    gap = min(6.0, slot * 0.25)
    body = [_axes(frame, x_label, y_label, None, y_format)]
    every = math.ceil(len(values) * 18 / (width - frame.left - frame.right))  # so that labels do not touch
    for index, (label, value) in enumerate(values):
        left, upper = frame.x(index) + gap / 2, frame.y(value)
        body.append(
            f'<rect x="{left:.1f}" y="{upper:.1f}" width="{slot - gap:.1f}" '
            f'height="{max(0.0, frame.y(0) - upper):.1f}" rx="1.5" fill="{_colour(series)}">'
            f"<title>{escape(f'{label}: {y_format(value)}')}</title></rect>"
        )
        if index % every == 0:
            body.append(
                f'<text x="{left + (slot - gap) / 2:.1f}" y="{frame.y(0) + 15:.1f}" '
                f'text-anchor="middle" font-size="10">{escape(label)}</text>'
            )
    if reference is not None:
        y = frame.y(reference)
        body.append(
            f'<line x1="{frame.left}" x2="{width - frame.right}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--ink)" stroke-dasharray="4 4"/>'
            f'<text x="{width - frame.right + 6}" y="{y + 4:.1f}" font-size="10.5">'
            f"{escape(reference_label)}</text>"
        )
    described = "; ".join(f"{label}: {y_format(value)}" for label, value in values)
    return _svg(title, f"{y_label}. {described}", body, width, height)


def interval_bar(low, value, high, axis, label):
    """A strip for a table cell: the claim as a band, the measurement as a dot with its interval.

    `axis` is where the claim begins and ends and where the axis does.
    """
    claim_low, claim_high, lowest, highest = axis
    width, height = 150, 22

    def x(position):
        inside = min(max(position, lowest), highest)
        return 6 + (inside - lowest) / (highest - lowest) * (width - 12)

    body = [
        f'<line class="axis" x1="6" x2="{width - 6}" y1="11" y2="11"/>',
        f'<rect x="{x(claim_low):.1f}" y="4" width="{max(2.0, x(claim_high) - x(claim_low)):.1f}" '
        'height="14" '
        'rx="2" fill="var(--series-2)" opacity="0.35"><title>the claim</title></rect>',
    ]
    if _finite(low, high):
        body.append(
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="11" y2="11" stroke="var(--series-0)" '
            'stroke-width="3"/>'
        )
    body.append(
        f'<circle cx="{x(value):.1f}" cy="11" r="3.6" fill="var(--series-0)"><title>measured</title></circle>'
    )
    return (
        f'<svg class="chart strip" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def sheet(title, drawings, columns, width, height):
    """Drawings of one size, row by row, as a file of its own: it brings the colours that a page would give."""
    below = height + 16
    cells = "".join(
        f'<svg x="{index % columns * width}" y="{index // columns * below}" width="{width}" height="{height}">'
        f"{drawing}</svg>"
        for index, drawing in enumerate(drawings)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {columns * width} {math.ceil(len(drawings) / columns) * below}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="var(--card)"/>{cells}</svg>\n'
    )


# --- the parts of a drawing ---------------------------------------------------------------------------


def _svg(title, description, body, width, height):
    name = "chart-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(body)}</svg>'
    )


def _empty(title, width, height):
    text = f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no data</text>'
    return _svg(title, "no data", [text], width, height)


def _axes(frame, x_label, y_label, x_format, y_format):
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for value in _axis_ticks(frame.y_range, frame.log_y, 5):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(value))}</text>'
        )
    for value in _axis_ticks(frame.x_range, frame.log_x, 6) if x_format else ():
        x = frame.x(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>'
            f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{escape(x_format(value))}</text>'
        )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    middle = (frame.top + floor) / 2
    parts.append(
        f'<text x="{(frame.left + right) / 2:.1f}" y="{frame.height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts.append(
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _axis_ticks(ends, log, count):
    marks = log_ticks(*ends) if log else []
    return marks if len(marks) >= 3 else ticks(*ends, count)  # less than a decade: round numbers


def _share(value, ends, log):
    """How far between the ends a value lies."""
    low, high, value = map(math.log10, (*ends, value)) if log else (*ends, value)
    return (value - low) / (high - low)


def _mark(frame, point, x_format, y_format):
    x, y, colour = frame.x(point.x), frame.y(point.y), _colour(point.series)
    bar = ""
    if _finite(point.low, point.high):
        low, high = frame.y(point.low), frame.y(point.high)
        bar = (
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 5:.1f} {low:.1f}h10M{x - 5:.1f} {high:.1f}h10" '
            f'stroke="{colour}" stroke-width="1.6" fill="none"/>'
        )
    fill = "var(--card)" if point.hollow else colour
    between = f" [{y_format(point.low)}, {y_format(point.high)}]" if bar else ""
    told = f"{point.label}: {y_format(point.y)}{between} at {x_format(point.x)}. {point.note}".rstrip(". ")
    return (
        f'<g><title>{escape(told)}</title>{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" '
        f'stroke="{colour}" stroke-width="2"/></g>'
    )


def _link(frame, start, end):
    return (
        f'<line x1="{frame.x(start.x):.1f}" y1="{frame.y(start.y):.1f}" x2="{frame.x(end.x):.1f}" '
        f'y2="{frame.y(end.y):.1f}" stroke="{_colour(start.series)}" stroke-width="1.4" '
        'stroke-dasharray="3 4" opacity="0.7"/>'
    )


def _names(frame, points):
    """Each name where it covers no mark and no other name: right, left, above, below, then further out."""
    taken = [
        (
            frame.x(point.x) - 8,
            frame.y(point.high if _finite(point.high) else point.y) - 8,
            frame.x(point.x) + 8,
            frame.y(point.low if _finite(point.low) else point.y) + 8,
        )
        for point in points
    ]
    names = []
    for point in sorted(points, key=lambda point: (point.y, point.x)):
        x, y, wide = frame.x(point.x), frame.y(point.y), 7.1 * len(point.label)
        places = [(x + 12, y + 4), (x - 12 - wide, y + 4), (x - wide / 2, y - 13), (x - wide / 2, y + 21)]
        places += [
            (x + side, y + 4 + shift) for shift in (-18, 20, -34, 36, -50, 52) for side in (12, -12 - wide)
        ]
        boxes = [(left, low - 12, left + wide, low + 4) for left, low in places]
        inside = [
            box
            for box in boxes
            if box[0] > frame.left
            and box[2] < frame.width - 2
            and box[1] > 0
            and box[3] < frame.height - frame.bottom
        ]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        names.append(
            f'<text class="name halo" x="{box[0]:.1f}" y="{box[3] - 4:.1f}">{escape(point.label)}</text>'
        )
    return names


def _overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend_rows(lines, width):
    """How many rows the legend takes, and the (x, row) of each entry."""
    x, row, places = 62.0, 0, []
    for line in lines:
        wide = 34 + 6.8 * len(line.label)
        if x + wide > width and x > 62:
            x, row = 62.0, row + 1
        places.append((x, row))
        x += wide
    return row + 1, places


def _legend(frame, lines):
    parts = []
    for line, (x, row) in zip(lines, _legend_rows(lines, frame.width)[1], strict=True):
        y = 14 + 18 * row
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(
            f'<line x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y - 4}" y2="{y - 4}" stroke-width="2.4" '
            f'stroke="{_colour(line.series)}"{dash}/><text x="{x + 23:.1f}" y="{y}">'
            f"{escape(line.label)}</text>"
        )
    return "".join(parts)


def _colour(series):
    return f"var(--series-{series % COLOURS})"


def _finite(*values):
    return all(value is not None and math.isfinite(value) for value in values)


def _plain(value, digits):
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def _nice_step(span, count):
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * (1 - 1e-9))


def _widened(low, high):
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(values, share, log=False):
    """The range of the values with a margin on both sides; a single value still gets a range."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = (high - low) * share or (0.3 if log else abs(high) * share or 1.0)
    low, high = low - margin, high + margin
    return (10**low, 10**high) if log else (low, high)


def _thinned(points, kept):
    """At most about `kept` points, the last always among them."""
    stride = max(1, math.ceil(len(points) / kept))
    return [*points[:-1:stride], points[-1]]

"""Charts as plain inline SVG: pure functions from numbers to markup, no script, no font, no network.

Colours come from CSS variables (see STYLE), so one drawing serves light and dark. Each chart carries an
accessible title and description, and each mark a <title>, which browsers show as a tooltip.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from html import escape

from markupsafe import Markup

from stages.reporting import drawing
from stages.reporting.drawing import Format, Frame, Line, Point
from stages.reporting.wording import number

SCATTER, BARS = (960, 440), (560, 220)  # width and height
POINTS_KEPT = 300  # of a curve, which is at most some 500 pixels wide
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


def scatter(
    title: str,
    points: list[Point],
    x_label: str,
    y_label: str,
    x_format: Format = number,
    y_format: Format = number,
    links: Iterable[tuple[str, str]] = (),
) -> Markup:
    """Marks with vertical error bars and their names beside them, those of one x side by side; links joins pairs of
    points by label."""
    points = drawing.side_by_side([point for point in points if drawing.finite(point.x, point.y)])
    if not points:
        return drawing.empty(title, *SCATTER)
    xs = [point.x for point in points]
    ys = [end for point in points for end in (point.y, *(point.interval or ()))]
    frame = Frame(*SCATTER, drawing.padded(xs, 0.2), drawing.padded(ys, 0.12))
    by_label = {point.label: point for point in points}
    body = [drawing.axes(frame, x_label, y_label, x_format, y_format)]
    for start, end in links:
        if start in by_label and end in by_label:
            body.append(drawing.link(frame, by_label[start], by_label[end]))
    body += [drawing.mark(frame, point, x_format, y_format) for point in points]
    body += drawing.names(frame, points)
    described = "; ".join(f"{point.label}: {x_format(point.x)}, {y_format(point.y)}" for point in points)
    return drawing.svg(title, f"{x_label} against {y_label}. {described}", body, *SCATTER)


def curves(
    title: str, lines: list[Line], x_label: str, y_label: str, width: int = 560, height: int = 320, log: bool = False
) -> Markup:
    """Lines over a common axis with a legend; each keeps about POINTS_KEPT points. `log` is of both axes."""
    lines = [
        replace(line, points=[pair for pair in line.points if drawing.finite(*pair) and (min(pair) > 0 or not log)])
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return drawing.empty(title, width, height)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [end for line in lines for _, *ends in line.band for end in ends]
    rows, _ = drawing.legend_rows(lines, width)
    x_range = drawing.padded(xs, 0.04, log) if log else drawing.widened(min(xs), max(xs))
    frame = Frame(width, height, x_range, drawing.padded(ys, 0.06, log), log, log, top=14 + 18 * rows)
    body = [drawing.axes(frame, x_label, y_label, number, number), drawing.legend(frame, lines)]
    body += [drawing.band(frame, line) for line in lines if line.band]
    for line in lines:
        kept = drawing.thinned(line.points, POINTS_KEPT)
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in kept)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        last = f"{line.label}: {number(kept[-1][1])} at {number(kept[-1][0])}"
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{drawing.colour_of(line.series)}" stroke-width="2" '
            f'stroke-linejoin="round"{dash}><title>{escape(last)}</title></polyline>'
        )
        if len(kept) <= 24:  # few enough measurements to show each
            body += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{drawing.colour_of(line.series)}">'
                f"<title>{escape(f'{line.label}: {number(y)} at {number(x)}')}</title></circle>"
                for x, y in kept
            ]
    described = "; ".join(f"{line.label} ends at {number(line.points[-1][1])}" for line in lines)
    return drawing.svg(title, f"{y_label} by {x_label}. {described}", body, width, height)


def bars(
    title: str,
    values: Iterable[tuple[object, float]],
    y_label: str,
    reference: float | None = None,
    reference_label: str = "",
    y_format: Format = number,
    x_label: str = "",
    highest: float | None = None,
) -> Markup:
    """One bar per (label, value) from zero, with an optional dashed reference line across."""
    bars = [(str(label), value) for label, value in values if drawing.finite(value)]
    if not bars:
        return drawing.empty(title, *BARS)
    width, height = BARS
    top = highest or max([value for _, value in bars] + [reference or 0.0]) * 1.12 or 1.0
    frame = Frame(width, height, (0, len(bars)), (0.0, top), right=66 if reference_label else 18)
    slot = (width - frame.left - frame.right) / len(bars)
    gap = min(6.0, slot * 0.25)
    body = [drawing.axes(frame, x_label, y_label, None, y_format)]
    every = math.ceil(len(bars) * 18 / (width - frame.left - frame.right))  # so that labels do not touch
    for index, (label, value) in enumerate(bars):
        left, upper = frame.x(index) + gap / 2, frame.y(value)
        body.append(
            f'<rect x="{left:.1f}" y="{upper:.1f}" width="{slot - gap:.1f}" '
            f'height="{max(0.0, frame.y(0) - upper):.1f}" rx="1.5" fill="{drawing.colour_of(0)}">'
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
    described = "; ".join(f"{label}: {y_format(value)}" for label, value in bars)
    return drawing.svg(title, f"{y_label}. {described}", body, width, height)


def heat_map(
    title: str,
    columns: list[str],
    rows: list[str],
    values: list[list[float]],
    x_label: str,
    y_label: str,
    describe: Callable[[float], str],
) -> Markup:
    """A cell for each row and column; values below 0 are blue, above 0 orange, the stronger the further from it."""
    width, height = 960, 90 + 34 * len(rows)
    frame = Frame(width, height, (0, len(columns)), (0, len(rows)))
    most = max(abs(value) for row in values for value in row) or 1.0
    wide, high = frame.x(1) - frame.x(0), frame.y(0) - frame.y(1)
    body = [
        f'<text x="{frame.x(len(columns) / 2):.1f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(14 {frame.y(len(rows) / 2):.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for y, (name, cells) in enumerate(zip(rows, values, strict=True)):
        top = frame.y(y + 1)
        middle = top + high / 2 + 4
        body.append(f'<text x="{frame.left - 7}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for x, (column, value) in enumerate(zip(columns, cells, strict=True)):
            strength, left = 0.08 + 0.6 * abs(value) / most, frame.x(x)
            body.append(
                f"<g><title>{escape(f'{describe(value)} at {x_label} {column}, {y_label} {name}')}</title>"
                f'<rect x="{left + 1:.1f}" y="{top + 1:.1f}" width="{wide - 2:.1f}" height="{high - 2:.1f}" rx="3" '
                f'fill="{drawing.colour_of(int(value > 0))}" fill-opacity="{strength:.2f}"/>'
                f'<text class="name" x="{left + wide / 2:.1f}" y="{middle:.1f}" text-anchor="middle" font-size="11.5">'
                f"{escape(describe(value))}</text></g>"
            )
    for x, column in enumerate(columns):
        body.append(
            f'<text x="{frame.x(x + 0.5):.1f}" y="{frame.y(0) + 17:.1f}" text-anchor="middle">{escape(column)}</text>'
        )
    return drawing.svg(title, f"{y_label} by {x_label}", body, width, height)


def interval_bar(low: float | None, value: float, high: float | None, axis: tuple[float, ...], label: str) -> Markup:
    """A strip for a table cell: the claim as a band, the measurement as a dot with its interval.

    `axis`: where the claim begins and ends, where the axis begins and ends.
    """
    claim_low, claim_high, lowest, highest = axis
    width, height = 150, 22

    def x(position: float) -> float:
        inside = min(max(position, lowest), highest)
        return 6 + (inside - lowest) / (highest - lowest) * (width - 12)

    body = [
        f'<line class="axis" x1="6" x2="{width - 6}" y1="11" y2="11"/>',
        f'<rect x="{x(claim_low):.1f}" y="4" width="{max(2.0, x(claim_high) - x(claim_low)):.1f}" '
        'height="14" '
        'rx="2" fill="var(--series-2)" opacity="0.35"><title>the claim</title></rect>',
    ]
    if low is not None and high is not None:
        body.append(
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="11" y2="11" stroke="var(--series-0)" stroke-width="3"/>'
        )
    body.append(f'<circle cx="{x(value):.1f}" cy="11" r="3.6" fill="var(--series-0)"><title>measured</title></circle>')
    return Markup(
        f'<svg class="chart strip" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def sheet(title: str, drawings: list[Markup], columns: int, width: int, height: int) -> str:
    """Drawings of one size, row by row, as a file of its own: with the style that a page would give."""
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

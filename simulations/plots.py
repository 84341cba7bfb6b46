"""The charts of a run's report: curves, bars and lines as SVG text, pure functions of their numbers.

Classes carry all colours: `k-federated`, `k-local` and `k-pooled` for families, `n0` to `n3` for dashes within one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from metarisk_common.charts import Frame, Layout, Words, document, nice_ticks, path, spread, tag, tick_texts


@dataclass(frozen=True)
class Point:
    """A mean at x with the ends of its interval; where there is none, `low` and `high` equal `mean`."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """A named line. `style`: its CSS classes. `level`: drawn across the whole chart, from its only point."""

    title: str
    style: str
    points: tuple[Point, ...]
    level: bool = False


@dataclass(frozen=True)
class Bar:
    """One named value of a bar chart, and how it is written beside the bar."""

    name: str
    value: float
    text: str


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _across(item: Series, first: float, last: float) -> tuple[Point, ...]:
    if not item.level:
        return tuple(sorted(item.points, key=lambda point: point.x))
    only = item.points[0]
    return (Point(first, only.mean, only.low, only.high), Point(last, only.mean, only.low, only.high))


def curves(series: Sequence[Series], xs: Sequence[int], words: Words, layout: Layout, floor: float = 0.5) -> str:
    """Draw means against x (on a square-root scale) with their intervals; a wide layout names the lines at their ends.

    The y axis starts at `floor` or below: at what guessing gets, which is 0.5 for an AUC. The first series is the main
    one: it is drawn last, on top.
    """
    drawn = [Series(s.title, s.style, _across(s, min(xs), max(xs)), s.level) for s in series if s.points]
    lows = [point.low for item in drawn for point in item.points]
    highs = [point.high for item in drawn for point in item.points]
    ticks = nice_ticks(min(floor, *lows), max(highs)) if drawn else nice_ticks(floor, 1)
    right = layout.width - (318.0 if layout.wide else 10.0)
    frame = Frame(40.0, right, 30.0, layout.height - 48.0, ticks)
    root = math.sqrt(max(*xs, 1))

    def x(value: float) -> float:
        return frame.left + 12 + math.sqrt(value) / root * (frame.right - frame.left - 24)

    parts = frame.axis(words)
    parts.extend(tag("text", str(k), x=x(k), y=frame.bottom + 20, cls="tick middle") for k in xs)
    for item in reversed(drawn):
        forward = [(x(point.x), frame.y(point.high)) for point in item.points]
        backward = [(x(point.x), frame.y(point.low)) for point in reversed(item.points)]
        line = [(x(point.x), frame.y(point.mean)) for point in item.points]
        parts.append(tag("path", d=path([*forward, *backward]) + "Z", cls=f"band {item.style}"))
        parts.append(tag("path", d=path(line), cls=f"line {item.style}"))
        if not item.level:
            parts.extend(tag("circle", cx=cx, cy=cy, r=3.5, cls=f"dot {item.style}") for cx, cy in line)
    if layout.wide:
        parts.extend(_end_labels(drawn, frame))
    return document(words, layout, layout.height, parts)


def _end_labels(drawn: Sequence[Series], frame: Frame) -> list[str]:
    ends = [frame.y(item.points[-1].mean) for item in drawn]
    parts = []
    for item, end, height in zip(drawn, ends, spread(ends, 17, frame.top, frame.bottom), strict=True):
        leader = path([(frame.right - 6, end), (frame.right + 14, height), (frame.right + 36, height)])
        parts.append(tag("path", d=leader, cls=f"line leader {item.style}"))
        text = f"{_shortened(item.title, 36)} {item.points[-1].mean:.3f}"
        parts.append(tag("text", text, x=frame.right + 42, y=height + 4, cls=f"name {item.style}"))
    return parts


def gain_bars(bars: Sequence[Bar], words: Words, layout: Layout) -> str:
    """Draw one bar a name about a zero line, largest first; a value below zero has the class `loses`."""
    rows = sorted(bars, key=lambda bar: (-bar.value, bar.name))
    row_height = 24 if layout.wide else 38
    top, bottom = 26.0, 26.0 + row_height * len(rows)
    left, right = (270.0, layout.width - 20.0) if layout.wide else (4.0, layout.width - 10.0)
    values = [bar.value for bar in rows]
    ticks = nice_ticks(min([0.0, *values]), max([0.0, *values]), 6 if layout.wide else 4)
    room = 56.0  # for the value that is written beyond the end of a bar
    low_room = room if min([0.0, *values]) < 0 else 8.0

    def x(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return left + low_room + share * (right - left - low_room - room)

    parts = []
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        zero = "zero" if abs(tick) < (ticks[1] - ticks[0]) / 2 else "grid"
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=top - 6, y2=bottom, cls=zero))
        parts.append(tag("text", text, x=x(tick), y=14, cls="tick middle"))
    for index, bar in enumerate(rows):
        loses = " loses" if bar.value < 0 else ""
        y = top + row_height * index + (row_height - 18)
        bar_top = y - 8 if layout.wide else y + 3
        name = _shortened(bar.name, 34 if layout.wide else 44)
        anchor = {"x": left - 8, "cls": f"name end{loses}"} if layout.wide else {"x": left, "cls": f"name{loses}"}
        parts.append(tag("text", name, y=bar_top + 12 if layout.wide else y - 2, **anchor))
        start, width = min(x(bar.value), x(0)), max(abs(x(bar.value) - x(0)), 1.0)
        parts.append(tag("rect", x=start, y=bar_top, width=width, height=14.0, cls=f"bar{loses}"))
        beyond = (start - 6, "value end loses") if bar.value < 0 else (start + width + 6, "value")
        parts.append(tag("text", bar.text, x=beyond[0], y=bar_top + 11.5, cls=beyond[1]))
    parts.append(tag("text", words.x_label, x=(left + right) / 2, y=bottom + 20, cls="label middle"))
    return document(words, layout, bottom + 28, parts)


def budget_bars(bars: Sequence[Bar], budget: float, words: Words, layout: Layout) -> str:
    """Draw one thin upright bar a name, largest first, under a line at the budget; names are tooltips."""
    rows = sorted(bars, key=lambda bar: (-bar.value, bar.name))
    ticks = nice_ticks(0.0, max([budget, *(bar.value for bar in rows)]) * 1.05, 3)
    frame = Frame(40.0, layout.width - 10.0, 30.0, layout.height - 28.0, ticks)
    step = (frame.right - frame.left) / max(len(rows), 1)
    parts = frame.axis(words, below=22)
    for index, bar in enumerate(rows):
        y = frame.y(bar.value)
        over = " loses" if bar.value > budget else ""
        x, width = frame.left + step * (index + 0.12), step * 0.76
        rect = tag("rect", x=x, y=y, width=width, height=frame.bottom - y, cls=f"bar{over}")
        parts.append(f"<g>{tag('title', f'{bar.name}: {bar.text}')}{rect}</g>")
    line = frame.y(budget)
    parts.append(tag("line", x1=frame.left, x2=frame.right, y1=line, y2=line, cls="budget"))
    parts.append(tag("text", f"budget {budget:g}", x=frame.right, y=line - 6, cls="name end"))
    return document(words, layout, layout.height, parts)


def rounds_line(values: Sequence[tuple[int, float | None]], words: Words, layout: Layout) -> str:
    """Draw one number by round, from zero; a round without one leaves a gap in the line."""
    known = [value for _, value in values if value is not None and _finite(value)]
    frame = Frame(48.0, layout.width - 12.0, 30.0, layout.height - 48.0, nice_ticks(0.0, max([*known, 1e-9]), 4))
    last = max([number for number, _ in values], default=1)

    def x(number: float) -> float:
        return frame.left + 8 + (number - 1) / max(last - 1, 1) * (frame.right - frame.left - 16)

    parts = frame.axis(words)
    shown = sorted({1, *(t for t in nice_ticks(1, max(last, 2), 5) if 1 < t < last and t == int(t)), last})
    parts.extend(tag("text", f"{t:g}", x=x(t), y=frame.bottom + 20, cls="tick middle") for t in shown)
    run: list[tuple[float, float]] = []
    for number, value in [*values, (0, None)]:
        if value is not None and _finite(value):
            run.append((x(number), frame.y(value)))
        elif run:
            parts.append(tag("path", d=path(run), cls="line k-federated n0"))
            parts.extend(tag("circle", cx=cx, cy=cy, r=2.5, cls="dot k-federated") for cx, cy in run)
            run = []
    return document(words, layout, layout.height, parts)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"


def legend(series: Sequence[Series]) -> list[str]:
    """Return one list item a series, a sample of its line and its title, for layouts without room for names."""
    items = []
    for item in series:
        sample = tag("path", d="M1 6L29 6", cls=f"line {item.style}")
        items.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{sample}</svg>{escape(item.title)}</li>')
    return items

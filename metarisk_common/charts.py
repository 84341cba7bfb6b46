"""Charts as SVG text: built by hand, so that they take their colours from the page, in light and in dark.

Every chart is a pure function of its numbers, so one input gives one text, byte for byte. Each is drawn for one
`Layout`; the page shows the wide or the narrow one, and at its own size a label is as large as the text around it.
Classes carry all colours; what uses a chart says what its classes are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

MINUS = "\u2212"


@dataclass(frozen=True)
class Layout:
    """One drawing size: a suffix for ids, and width and height in CSS pixels (height 0: as tall as the rows need)."""

    name: str
    width: int
    height: int = 0

    @property
    def wide(self) -> bool:
        """Whether there is room beside the plot for names."""
        return self.name == "wide"


@dataclass(frozen=True)
class Words:
    """What a chart says in words: `key` (unique on the page), title, description, the axes with their units."""

    key: str
    title: str
    description: str
    x_label: str = ""
    y_label: str = ""


def tag(name: str, text: str | None = None, **attributes: object) -> str:
    """Return one element, all escaped; `cls` is the class, underscores in names are hyphens, floats have one digit."""
    parts = [name]
    for key, value in attributes.items():
        attribute = "class" if key == "cls" else key.replace("_", "-")
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        parts.append(f'{attribute}="{escape(shown, quote=True)}"')
    opening = " ".join(parts)
    return f"<{opening}/>" if text is None else f"<{opening}>{escape(text)}</{name}>"


def document(words: Words, layout: Layout, height: float, body: Iterable[str]) -> str:
    """Wrap elements in an `svg` that a screen reader announces with the chart's title and description."""
    key = f"{words.key}-{layout.name}"
    head = (
        f'<svg class="chart {layout.name}" viewBox="0 0 {layout.width} {height:.0f}" role="img" '
        f'aria-labelledby="{escape(key)}-t {escape(key)}-d">'
    )
    title = tag("title", words.title, id=f"{key}-t")
    description = tag("desc", words.description, id=f"{key}-d")
    return "\n".join([head, title, description, *body, "</svg>"])


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Return about `count` round numbers whose first is at most `low` and whose last is at least `high`."""
    span = high - low if high - low > 1e-9 else 1.0  # noqa: PLR2004  (equal up to rounding: any span will do)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return tuple(step * index for index in range(first, max(last, first + 1) + 1))


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Write ticks with just the digits that tell them apart, and with a real minus sign."""
    step = ticks[1] - ticks[0]
    exact = (d for d in range(8) if all(abs(round(t, d) - t) < step * 1e-3 for t in ticks))
    digits = next(exact, 8)
    return [f"{tick:.{digits}f}".replace("-", MINUS) if round(tick, digits) else f"{0:.{digits}f}" for tick in ticks]


def spread(positions: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Move labels apart so that neighbours are `gap` or more away, in their order, within the bounds where they fit."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    ceiling = lowest
    for index in order:
        placed[index] = max(positions[index], ceiling)
        ceiling = placed[index] + gap
    floor = highest
    for index in reversed(order):
        placed[index] = min(placed[index], floor)
        floor = placed[index] - gap
    return placed


@dataclass(frozen=True)
class Frame:
    """The plot area in pixels and the linear scale of its y axis."""

    left: float
    right: float
    top: float
    bottom: float
    ticks: tuple[float, ...]

    def y(self, value: float) -> float:
        """Pixels from the top at which a value is drawn."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.bottom - share * (self.bottom - self.top)

    def axis(self, words: Words, below: float = 42) -> list[str]:
        """Grid lines with their values, the y label above them, the x label `below` pixels under them."""
        parts = [tag("text", words.y_label, x=0, y=14, cls="label")]
        for tick, text in zip(self.ticks, tick_texts(self.ticks), strict=True):
            height = self.y(tick)
            parts.append(tag("line", x1=self.left, x2=self.right, y1=height, y2=height, cls="grid"))
            parts.append(tag("text", text, x=self.left - 8, y=height + 4, cls="tick end"))
        middle = (self.left + self.right) / 2
        parts.append(tag("text", words.x_label, x=middle, y=self.bottom + below, cls="label middle"))
        return parts


def path(points: Iterable[tuple[float, float]]) -> str:
    """Return the `d` of a path through points in pixels."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)

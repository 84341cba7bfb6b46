"""The chart of a bank's statement: what is spent over time, as a step line under the line of the budget.

Classes carry all colours: `line main k-federated` for what is spent, `budget` for the limit.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from metarisk_common.charts import Frame, Layout, Words, document, nice_ticks, path, tag

from .plain_words import epsilon_text

Steps = Sequence[tuple[float, float]]
"""(seconds since 1970, value from then on), ascending."""

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_SPACINGS: Final = (
    1, 2, 5, 10, 15, 30,
    _MINUTE, 2 * _MINUTE, 5 * _MINUTE, 10 * _MINUTE, 15 * _MINUTE, 30 * _MINUTE,
    _HOUR, 2 * _HOUR, 3 * _HOUR, 6 * _HOUR, 12 * _HOUR,
    _DAY, 2 * _DAY, 5 * _DAY, 10 * _DAY,
)  # fmt: skip
_MONTHS: Final = (1, 2, 3, 6, 12, 24, 60, 120, 240, 600, 1200)
_MONTHS_A_YEAR: Final = 12


def spending_chart(spent: Steps, limits: Steps, words: Words, layout: Layout) -> str:
    """Draw what is spent, from its first time to its last, under the budget as it stood at each time.

    Values that are not finite are left out; `words.x_label` is filled in with the days that the axis covers.
    """
    spent = [(when, value) for when, value in spent if math.isfinite(value)]
    limits = [(when, value) for when, value in limits if math.isfinite(value)]
    first = spent[0][0]
    last = max(spent[-1][0], first + 1.0)
    ticks = nice_ticks(0.0, max([1e-3, *(value for _, value in [*spent, *limits])]) * (1 - 1e-3), 4)
    frame = Frame(44.0, layout.width - (96.0 if layout.wide else 90.0), 30.0, layout.height - 48.0, ticks)

    def x(when: float) -> float:
        share = min(max((when - first) / (last - first), 0.0), 1.0)
        return frame.left + 6 + share * (frame.right - frame.left - 6)

    dated = Words(words.key, words.title, words.description, _days(first, last), words.y_label)
    parts = frame.axis(dated)
    for when, text in time_ticks(first, last, 6 if layout.wide else 3):
        parts.append(tag("line", x1=x(when), x2=x(when), y1=frame.bottom, y2=frame.bottom + 5, cls="zero"))
        parts.append(tag("text", text, x=x(when), y=frame.bottom + 20, cls="tick middle"))
    for values, style in ((limits, "budget"), (spent, "line main k-federated")):
        if values:
            corners = _staircase(values, last)
            parts.append(tag("path", d=path((x(when), frame.y(value)) for when, value in corners), cls=style))
    parts.extend(_end_labels(spent, limits, frame))
    return document(words, layout, layout.height, parts)


def _staircase(steps: Steps, last: float) -> list[tuple[float, float]]:
    """Give the corners of a line that keeps each value until the next one begins."""
    corners = [steps[0]]
    for when, value in steps[1:]:
        corners += [(when, corners[-1][1]), (when, value)]
    return [*corners, (max(last, corners[-1][0]), corners[-1][1])]


def _end_labels(spent: Steps, limits: Steps, frame: Frame) -> list[str]:
    """Name both lines at their right ends, apart from each other."""
    height = frame.y(spent[-1][1]) + 4
    parts = []
    if limits:
        limit = frame.y(limits[-1][1]) + 4
        nearer = 15.0 if height >= limit else -15.0
        height = limit + nearer if abs(height - limit) < abs(nearer) else height
        parts.append(tag("text", f"budget {limits[-1][1]:g}", x=frame.right + 4, y=limit, cls="name"))
    shown = f"spent {epsilon_text(spent[-1][1], 3)}"
    return [*parts, tag("text", shown, x=frame.right + 4, y=height, cls="name main k-federated")]


def _days(first: float, last: float) -> str:
    days = [f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d}" for when in (first, last)]
    return f"time (UTC), {days[0]}" if days[0] == days[1] else f"time (UTC), {days[0]} to {days[1]}"


def time_ticks(first: float, last: float, most: int) -> list[tuple[float, str]]:
    """Give at most `most + 1` round times between two, in seconds since 1970, each with its text in UTC."""
    for spacing in _SPACINGS:
        if (last - first) / spacing <= most:
            whole = range(math.ceil(first / spacing), math.floor(last / spacing) + 1)
            return [(float(index * spacing), _tick_text(index * spacing, spacing)) for index in whole]
    low, high = (_month(when) for when in (first, last))
    spacing = next((months for months in _MONTHS if (high - low) / months <= most), _MONTHS[-1])
    ticks = []
    for index in range(-(-low // spacing) * spacing, high + 1, spacing):
        when = datetime(index // _MONTHS_A_YEAR, index % _MONTHS_A_YEAR + 1, 1, tzinfo=UTC)
        if first <= when.timestamp() <= last:
            text = f"{when:%Y}" if spacing >= _MONTHS_A_YEAR else f"{when:%b %Y}"
            ticks.append((when.timestamp(), text))
    return ticks


def _month(when: float) -> int:
    date = datetime.fromtimestamp(when, UTC)
    return date.year * _MONTHS_A_YEAR + date.month - 1


def _tick_text(seconds: float, spacing: float) -> str:
    when = datetime.fromtimestamp(seconds, UTC)
    if spacing >= _DAY:
        return f"{when.day} {when:%b}"
    return f"{when:%H:%M:%S}" if spacing < _MINUTE else f"{when:%H:%M}"

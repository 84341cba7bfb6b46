"""A comparison as files: `table.csv` and `table.json` for programs, and one HTML page with its plots for people.

The page holds its style and its charts, loads nothing and runs no script.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from metarisk_common.charts import Frame, Layout, Words, document, nice_ticks, path, spread, tag
from metarisk_common.errors import ConfigError
from metarisk_common.files import write_atomically
from metarisk_common.pages import page_environment

from .compare_print import STAMP, epsilon_text, to_csv
from .compare_tables import Row, Table
from .findings import fixed, interval, signed
from .plots import Bar, Point, Series, curves, gain_bars, legend

PAGE = "comparison.html"
WIDE, NARROW = Layout("wide", 976, 430), Layout("narrow", 358, 340)
_USUAL = 3.0
_DASHES = 4


def write(folder: Path, table: Table) -> None:
    """Write the table and the page into a comparison's folder.

    Raises:
        ConfigError: a file cannot be written.

    """
    try:
        write_atomically(folder / "table.json", json.dumps(table, indent=1, allow_nan=False).encode())
        write_atomically(folder / "table.csv", to_csv(table).encode())
        write_atomically(folder / PAGE, render(table).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: the comparison's files cannot be written: {error.strerror}") from None


def render(table: Table) -> str:
    """Return the page; the same table gives the same text."""
    environment = page_environment()
    environment.filters.update(fixed=fixed, signed=signed, interval=interval, epsilon=epsilon_text)
    template = environment.from_string(files(__package__).joinpath("compare.html.j2").read_text(encoding="utf-8"))
    epsilons = _epsilons(table)
    # The one that readers look for first is shown first.
    headline = min(epsilons, key=lambda value: abs(value - _USUAL) if isinstance(value, float) else 1e9, default=None)
    shown = sorted(epsilons, key=lambda value: value != headline)
    gains = [gain for gain in table["gains"] if gain["epsilon"] == headline]
    return template.render(
        table=table,
        stamp=STAMP,
        headline=headline,
        gains=gains,
        losers={gain["method"]: _losers(gain["by_lender"]) for gain in gains},
        titles={row["method"]: row["title"] for row in table["rows"]},
        labels=[(epsilon, _label_charts(table, epsilon), _legend(table, epsilon)) for epsilon in shown],
        privacy=[(k, _privacy_charts(table, k)) for k in dict.fromkeys((min(table["k"]), _gain_k(table)))],
        bars={gain["method"]: _gain_charts(gain["method"], gain["by_lender"]) for gain in gains},
        rows=_by_method(table["rows"]),
        pairs=[pair for pair in table["pairs"] if pair["metric"] == "auc"],
    )


def _epsilons(table: Table) -> list[float | str]:
    """Return the methods' epsilons, the one without noise last."""
    found = {row["epsilon"] for row in table["rows"] if row["epsilon"] is not None}
    return sorted(found, key=float)


def _gain_k(table: Table) -> int:
    return table["gains"][0]["k"] if table["gains"] else max(table["k"])


def _by_method(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], epsilon_text(row["epsilon"])), []).append(row)
    return list(groups.values())


def _losers(by_lender: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(((name, gain) for name, gain in by_lender.items() if gain < 0), key=lambda item: (item[1], item[0]))


def _series(table: Table, epsilon: float | str) -> list[Series]:
    """Return a line for each method at an epsilon, and for each baseline."""
    found: list[Series] = []
    numbers: dict[str, int] = {}
    for rows in _by_method(table["rows"]):
        first = rows[0]
        if first["epsilon"] not in (None, epsilon):
            continue
        number = numbers.setdefault(first["kind"], 0)
        numbers[first["kind"]] += 1
        main = " main" if not found else ""
        style = f"k-{first['kind']} n{number % _DASHES}{main}"
        level = first["kind"] == "pooled"
        found.append(Series(first["title"], style, tuple(map(_point, rows[:1] if level else rows)), level=level))
    return found


def _point(row: Row) -> Point:
    mean, (low, high) = row["auc"]["mean"], row["auc"]["ci95"]
    return Point(row["k"], mean, mean if low is None else low, mean if high is None else high)


def _label_charts(table: Table, epsilon: float | str) -> str:
    text = epsilon_text(epsilon)
    words = Words(f"labels-{text.replace('.', '-')}", f"AUC by number of labels at epsilon {text}",
                  f"Mean AUC over {table['lenders']} lenders with 95% intervals, method by method.",
                  "labels of the lender's own", "AUC")  # fmt: skip
    series = _series(table, epsilon)
    return "\n".join(curves(series, table["k"], words, layout) for layout in (WIDE, NARROW))


def _legend(table: Table, epsilon: float | str) -> str:
    return "\n".join(legend(_series(table, epsilon)))


def _gain_charts(method: str, by_lender: Mapping[str, float]) -> str:
    bars = [Bar(name, gain, signed(gain)) for name, gain in by_lender.items()]
    words = Words(f"gain-{method}", "Gain of each lender", f"AUC gained by each of {len(bars)} lenders.", "AUC gained")
    return "\n".join(gain_bars(bars, words, layout) for layout in (WIDE, NARROW))


def _privacy_charts(table: Table, k: int) -> str:
    words = Words(f"privacy-{k}", f"AUC by epsilon with {k} labels", "Mean AUC of each method at each epsilon.",
                  f"epsilon (delta {table['delta']:g}); inf: no noise", f"AUC with {k} labels")  # fmt: skip
    return "\n".join(by_epsilon(table, k, words, layout) for layout in (WIDE, NARROW))


def by_epsilon(table: Table, k: int, words: Words, layout: Layout) -> str:
    """Draw mean AUC after k labels against epsilon, evenly spaced, a line a method; pooled ones are levels."""
    epsilons = _epsilons(table)
    lines: list[tuple[str, str, dict[float | str, float]]] = []
    numbers: dict[str, int] = {}
    for method in dict.fromkeys(row["method"] for row in table["rows"] if row["kind"] != "local"):
        rows = [row for row in table["rows"] if row["method"] == method and row["k"] == k]
        if not rows:
            continue
        kind = rows[0]["kind"]
        numbers[kind] = numbers.get(kind, -1) + 1
        everywhere = dict.fromkeys(epsilons, rows[0]["auc"]["mean"])
        own = {row["epsilon"]: row["auc"]["mean"] for row in rows if row["epsilon"] is not None}
        lines.append((rows[0]["title"], f"k-{kind} n{numbers[kind] % _DASHES}", own or everywhere))
    values = [value for _, _, points in lines for value in points.values()]
    ticks = nice_ticks(min(values), max(values), 5) if values else nice_ticks(0.5, 1)
    right = layout.width - (318.0 if layout.wide else 10.0)
    frame = Frame(52.0, right, 30.0, layout.height - 48.0, ticks)
    step = (frame.right - frame.left - 24) / max(1, len(epsilons) - 1)
    x = {epsilon: frame.left + 12 + step * place for place, epsilon in enumerate(epsilons)}
    parts = frame.axis(words)
    parts += [
        tag("text", epsilon_text(epsilon), x=place, y=frame.bottom + 20, cls="tick middle")
        for epsilon, place in x.items()
    ]
    for _, style, points in reversed(lines):
        at = [(x[epsilon], frame.y(value)) for epsilon, value in points.items()]
        parts.append(tag("path", d=path(at), cls=f"line {style}"))
        parts.extend(tag("circle", cx=cx, cy=cy, r=3.5, cls=f"dot {style}") for cx, cy in at)
    if layout.wide:
        ends = [frame.y(list(points.values())[-1]) for _, _, points in lines]
        for (title, style, points), end, height in zip(
            lines, ends, spread(ends, 17, frame.top, frame.bottom), strict=True
        ):
            leader = path([(frame.right - 6, end), (frame.right + 14, height), (frame.right + 36, height)])
            parts.append(tag("path", d=leader, cls=f"line leader {style}"))
            last = list(points.values())[-1]
            parts.append(tag("text", f"{title[:36]} {last:.3f}", x=frame.right + 42, y=height + 4, cls=f"name {style}"))
    return document(words, layout, layout.height, parts)

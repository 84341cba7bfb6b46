"""Charts and numbers in print: to scale, legible, and never kinder than what was measured."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarisk_common import charts
from simulations import plots
from simulations.findings import estimate, fixed, interval, ordered_methods, signed, spent, verdict


def compared(low: float | None, high: float | None) -> Any:
    mean = None if low is None or high is None else (low + high) / 2
    pair = {"method": "dp-reptile", "baseline": "local-logistic", "k": 50, "wins": 12, "losses": 8}
    return {**pair, "mean": mean, "ci95": [low, high]}


@given(st.floats(-0.2, 0.2), st.floats(0, 0.2))
def test_verdict_agrees_with_the_printed_interval(low: float, width: float) -> None:
    said = verdict(compared(low, low + width))
    printed = interval([low, low + width], 4).replace("\u2212", "-").split(" to ")
    first, last = (float(end) for end in printed)
    assert said == ("better" if first > 0 else "worse" if last < 0 else "not told apart")


def test_verdict_without_an_interval() -> None:
    assert verdict(compared(None, None)) == "not told apart"
    assert verdict(compared(math.nan, math.nan)) == "not told apart"
    assert verdict(None) == "not compared"


def test_estimate_is_none_where_nothing_was_measured() -> None:
    cell = {"auc": {"mean": 0.6936, "ci95": [0.67, 0.71]}}
    metrics: Any = {"summary": {"dp-reptile": {"50": cell}}}
    assert estimate(metrics, "dp-reptile", 0) is None
    assert estimate(metrics, "nobody", 50) is None
    assert estimate(metrics, "dp-reptile", 50) == cell["auc"]


def test_the_main_method_leads_and_kinds_stay_together() -> None:
    kinds = {"pooled-logistic": "pooled", "local-logistic": "local", "dp-joint": "federated", "dp-reptile": "federated"}
    metrics: Any = {"methods": {name: {"title": name, "kind": kind, "private": False} for name, kind in kinds.items()}}
    names = [name for name, _ in ordered_methods(metrics, "dp-reptile")]
    assert names == ["dp-reptile", "dp-joint", "local-logistic", "pooled-logistic"]


def test_numbers_in_print() -> None:
    assert [signed(value) for value in (0.0314, -0.0314, 0.0001, -0.0001)] == [
        "+0.031",
        "\u22120.031",
        "0.000",
        "0.000",
    ]
    assert [fixed(value) for value in (None, math.nan, math.inf)] == ["\u2013"] * 3
    assert interval([0.1, None]) == "\u2013"


@given(st.floats(0, 100))
def test_printed_epsilon_is_never_below_the_ledgers(epsilon: float) -> None:
    assert float(spent(epsilon)) >= epsilon - 1e-9
    assert float(spent(epsilon)) <= epsilon + 0.01 + 1e-9


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e3), st.integers(3, 8))
def test_ticks_cover_the_range_with_distinct_texts(low: float, span: float, count: int) -> None:
    ticks = charts.nice_ticks(low, low + span, count)
    assert ticks[0] <= low + span * 1e-6
    assert ticks[-1] >= low + span - span * 1e-6
    assert 2 <= len(ticks) <= count + 3
    if span > abs(low) * 1e-4:
        assert len(set(charts.tick_texts(ticks))) == len(ticks)


@given(st.lists(st.floats(0, 200), min_size=1, max_size=10))
def test_labels_keep_their_distance_and_their_order(positions: list[float]) -> None:
    placed = charts.spread(positions, 17, 0, 200)
    pairs = sorted(zip(positions, placed, strict=True))
    heights = sorted(placed)
    assert all(b - a >= 17 - 1e-6 for a, b in pairwise(heights))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs) if a[0] < b[0])
    assert max(placed) <= 200


def test_a_bar_is_as_long_as_its_value() -> None:
    bars = [plots.Bar("a", 0.1, "+0.100"), plots.Bar("b", 0.05, "+0.050"), plots.Bar("c", -0.05, "\u22120.050")]
    svg = plots.gain_bars(bars, charts.Words("g", "t", "d"), charts.Layout("wide", 900))
    rects = re.findall(r"<rect[^>]*>", svg)
    widths = [float(found.group(1)) for rect in rects if (found := re.search(r' width="([\d.]+)"', rect))]
    first, second, third = widths
    assert first == pytest.approx(2 * second, abs=0.2)
    assert third == pytest.approx(second, abs=0.2)
    assert 'class="bar loses"' in rects[2]


def test_a_round_without_an_update_leaves_a_gap() -> None:
    words, layout = charts.Words("n", "t", "d"), charts.Layout("wide", 400, 200)
    whole = plots.rounds_line([(1, 0.3), (2, 0.2), (3, 0.2), (4, 0.1)], words, layout)
    broken = plots.rounds_line([(1, 0.3), (2, 0.2), (3, None), (4, 0.1)], words, layout)
    assert whole.count("<path") == 1
    assert broken.count("<path") == 2
    assert broken.count("<circle") == 3

"""A volatility run by classes of assets, in the terminal and in the report: what decides stands there, by asset."""

from io import StringIO
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from metarisk_common.evaluation import EpisodeScore, summarise
from metarisk_common.intervals import estimate
from metarisk_common.yardsticks import VOLATILITY
from simulations.findings import Metrics
from simulations.market_classes import by_class, class_tables, classes_of
from simulations.report import ReportData, render_report
from simulations.scenarios import built_in, load_scenario

CLASSES = {"B1": "bonds", "B2": "bonds", "S1": "stocks", "S2": "stocks", "S3": "stocks"}
METHODS = {"start": "Reptile", "local-har": "Own HAR, k days", "pooled-har": "Pooled HAR"}
KS = (0, 20, 60)


def value(asset: str, k: int, draw: int, method: str) -> float:
    level = 0.8 if asset.startswith("B") else 0.2 + 0.01 * int(asset[1])
    gain = {"start": 0.001 * k, "local-har": -0.5, "pooled-har": 0.07}[method]
    return level + gain + 0.01 * draw + 0.004 * int(asset[1]) * (method == "start") * (k > 0)


def scores() -> list[EpisodeScore]:
    return [
        EpisodeScore(
            asset, k, draw, method,
            {"r2": (r2 := value(asset, k, draw, method)), "r2_own": r2 - 0.1, "qlike": 0.5, "mse": 0.4, "bias": 0.0},
        )
        for asset in CLASSES for k in KS for draw in range(2) for method in METHODS
        if k or method != "local-har"
    ]  # fmt: skip


def metrics() -> Metrics:
    found = scores()
    groups = by_class(found, CLASSES, "start", list(METHODS), KS)
    kinds = {"start": "federated", "local-har": "local", "pooled-har": "pooled"}
    gains = {"k": 60, "baseline": "local-har", "method": "start", "gains": dict.fromkeys(CLASSES, 0.5)}
    return cast(
        "Metrics",
        {
            "ks": KS,
            "draws": 2,
            "field": "volatility",
            "methods": {name: {"title": t, "kind": kinds[name], "private": False} for name, t in METHODS.items()},
            "summary": summarise(found, VOLATILITY),
            "paired": groups[0]["paired"],
            "gain_by_institution": gains,
            "share_harmed": {},
            "classes": groups,
        },
    )


def test_every_class_is_judged_on_its_own_assets_and_all_on_all() -> None:
    groups = {group["name"]: group for group in by_class(scores(), CLASSES, "start", list(METHODS), KS)}
    assert list(groups) == ["all", "stocks", "bonds"]
    assert groups["all"]["summary"] == summarise(scores(), VOLATILITY)
    assert groups["bonds"]["assets"] == ["B1", "B2"]
    stocks = groups["stocks"]
    assert stocks["assets"] == ["S1", "S2", "S3"]
    assert stocks["summary"]["pooled-har"]["0"]["r2"]["mean"] == pytest.approx(0.2 + 0.02 + 0.07 + 0.005)
    # An interval over three assets, whatever the number of draws.
    gain = next(row for row in stocks["paired"] if (row["baseline"], row["k"]) == ("pooled-har", 60))
    expected = estimate(np.array([0.06 + 0.004 * number - 0.07 for number in (1, 2, 3)]))
    assert gain["mean"] == pytest.approx(expected["mean"])
    assert gain["ci95"] == pytest.approx(expected["ci95"])
    assert (gain["wins"], gain["losses"]) == (1, 2)
    assert {(row["baseline"], row["k"]) for row in stocks["paired"]} == {
        ("local-har", 20), ("local-har", 60), ("pooled-har", 0), ("pooled-har", 20), ("pooled-har", 60),
    }  # fmt: skip


def test_adapted_is_compared_with_the_same_start_without_labels() -> None:
    stocks = by_class(scores(), CLASSES, "start", list(METHODS), KS)[1]
    assert [row["k"] for row in stocks["adapted"]] == [20, 60]
    assert stocks["adapted"][1]["mean"] == pytest.approx(0.06 + 0.008)
    assert stocks["adapted"][1]["wins"] == 3
    without = [score for score in scores() if score.k > 0]
    assert by_class(without, CLASSES, "start", list(METHODS), (20, 60))[0]["adapted"] == []


def test_one_class_is_not_shown_twice_and_a_table_need_not_know_of_any() -> None:
    bonds = [score for score in scores() if score.institution.startswith("B")]
    known = {name: kind for name, kind in CLASSES.items() if kind == "bonds"}
    assert [group["name"] for group in by_class(bonds, known, "start", list(METHODS), KS)] == ["bonds"]
    frame = pl.DataFrame({"desk": ["b", "a", "b"], "asset_class": ["x", "y", "x"]})
    assert classes_of(frame, "desk") == {"a": "y", "b": "x"}
    assert classes_of(frame.drop("asset_class"), "desk") == {}


def printed(found: Metrics) -> str:
    console = Console(file=StringIO(), width=80)
    for table in class_tables(found, "start"):
        console.print(table)
    return cast("StringIO", console.file).getvalue()


def test_the_terminal_shows_both_references_and_paired_intervals() -> None:
    text = printed(metrics())
    lines = [line.split() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    assert ["all", "stocks", "bonds"] in lines
    assert ["method", "(5)", "(3)", "(2)"] in lines
    assert ["Pooled", "HAR", "0.527", "0.295", "0.875"] in lines
    assert ["Pooled", "HAR", "0.427", "0.195", "0.775"] in lines
    # Against itself without labels, and against the pooled regression; two assets have no interval worth printing.
    assert ["itself", "without", "labels", "+0.067", "+0.068", "+0.066"] in lines
    assert ["Pooled", "HAR", "\u22120.003", "\u22120.002", "\u22120.004"] in lines
    assert ["\u00b10.004", "\u00b10.010", "\u2013"] in lines
    assert class_tables(cast("Metrics", {**metrics(), "classes": ()}), "start") == []


def report(found: Any) -> str:
    plan = load_scenario(built_in("volatility")).plan(epsilon=3.0).model_dump(mode="json")
    account = {"spent": 3.0, "declared_size": 100, "entries": 30}
    privacy: Any = {"epsilon_budget": 3.0, "delta": 1e-6, "unit": "one record", "by_institution": {"desk 1": account}}
    return render_report(
        ReportData(
            title="Volatility", scenario="volatility", created="2026-01-01", not_private=True, versions={}, plan=plan,
            privacy=privacy, journal=[], metrics=found, main_method="start", command="metarisk-simulate demo",
        )
    )  # fmt: skip


def test_the_report_shows_classes_and_does_not_call_days_people() -> None:
    text = report(metrics())
    start = text.index('id="s-classes"')
    section = " ".join(text[start : text.index("</section>", start)].split())
    assert '<th scope="col" class="number">stocks (3)</th>' in section
    assert '<td class="number">0.295</td>' in section
    assert '<td class="number">0.195</td>' in section
    assert section.count("itself without labels") == 1
    assert "+0.066</td>" in section.replace(" </td>", "</td>"), "two assets have no interval"
    assert "person" not in text
    assert "reaches an R2" in text
    bare = {key: value for key, value in metrics().items() if key != "classes"}
    assert "s-classes" not in report(bare)

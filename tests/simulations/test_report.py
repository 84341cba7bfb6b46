"""The report: honest in its words, complete in itself, safe against hostile names, the same for the same values."""

import inspect
import json
import math
import random
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from metarisk_common.evaluation import share_harmed
from metarisk_common.plan import Plan
from simulations.findings import finding
from simulations.report import ReportData, plan_hash, render_report, write_report

KS = (0, 20, 50, 100, 200)
LEVELS: dict[str, tuple[str, str, bool, tuple[float | None, ...]]] = {
    "local-logistic": ("Logistic regression", "local", False, (None, 0.571, 0.597, 0.619, 0.638)),
    "local-logistic-binned": ("Logistic regression, binned", "local", False, (None, 0.597, 0.624, 0.643, 0.664)),
    "local-lightgbm": ("LightGBM", "local", False, (None, 0.5, 0.548, 0.609, 0.644)),
    "dp-joint": ("Joint training, private", "federated", True, (0.6892, 0.6922, 0.6953, 0.6981, 0.7010)),
    "dp-reptile": ("metarisk: Reptile, private", "federated", True, (0.6871, 0.6904, 0.6936, 0.6969, 0.7003)),
    "reptile-no-dp": ("Reptile without privacy", "federated", False, (0.6905, 0.6915, 0.6941, 0.6980, 0.7006)),
    "pooled-logistic": ("Logistic regression, pooled", "pooled", False, (0.672, None, None, None, None)),
    "pooled-lightgbm": ("LightGBM, pooled", "pooled", False, (0.7006, None, None, None, None)),
}
LENDERS = (
    "Seacoast Commerce Bank", "CAPITAL ONE BK (USA) NATL ASSO", "JPMorgan Chase Bank", "Live Oak Banking Company",
    "Zions Bank, a Division of ZB", "M&T Bank", "Celtic Bank Corporation", "Banco Popular de Puerto Rico",
    "Readycap Lending", "Newtek Small Business Finance", "Cadence Bank", "TD Bank", "U.S. Bank", "KeyBank",
    "The Huntington National Bank", "Byline Bank", "First <Savings> & 'Loan'", "CDC Small Business Finance",
    "Harvest Small Business", "Unity Bank",
)  # fmt: skip


def _estimate(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def _metrics(rng: random.Random) -> Any:
    gains = {name: rng.gauss(0.07, 0.045) for name in LENDERS}
    gains["Unity Bank"] = -0.0312
    summary: dict[str, Any] = {name: {} for name in LEVELS}
    for name, (_, kind, _, means) in LEVELS.items():
        for k, mean in zip(KS, means if kind != "pooled" else means[:1] * 5, strict=True):
            if mean is not None:
                summary[name][str(k)] = {
                    "auc": _estimate(mean, 0.024),
                    "ks": _estimate(mean - 0.37, 0.02),
                    "log_loss": _estimate(0.62 - mean / 3, 0.02),
                    "brier": _estimate(0.26 - mean / 6, 0.01),
                    "worst_decile": {"auc": mean - 0.11},
                    "institutions": len(LENDERS),
                }
    paired = []
    for baseline in ("local-logistic", "local-logistic-binned", "dp-joint", "reptile-no-dp"):
        for k in (20, 50, 100, 200):
            mean = summary["dp-reptile"][str(k)]["auc"]["mean"] - summary[baseline][str(k)]["auc"]["mean"]
            half = 0.016 if baseline.startswith("local") else 0.0012
            wins = 19 if mean > 0 else 7
            counts = {"wins": wins, "losses": len(LENDERS) - wins}
            paired.append({"method": "dp-reptile", "baseline": baseline, "k": k, **_estimate(mean, half), **counts})
    return {
        "ks": list(KS),
        "draws": 10,
        "methods": {name: {"title": t, "kind": kind, "private": dp} for name, (t, kind, dp, _) in LEVELS.items()},
        "summary": summary,
        "paired": paired,
        "gain_by_institution": {"k": 50, "baseline": "local-logistic", "method": "dp-reptile", "gains": gains},
        "share_harmed": {"20": 0.14, "50": 0.1, "100": 0.08, "200": 0.05},
    }


def _plan() -> Plan:
    numeric = {"kind": "numeric", "name": "amount", "title": "Loan amount", "unit": "USD", "scale": "log"}
    columns = [
        {**numeric, "lower": 1000, "upper": 5e6, "bins": [2e4, 1e5]},
        {"kind": "categorical", "name": "sector", "categories": ["44", "72", "<b>other</b>"]},
    ]
    data = {"label": {"name": "charged_off"}, "institution": "bank", "columns": columns}
    mechanism = {"noise_multiplier": 13.9}
    return Plan.model_validate({"name": "SBA loans", "data": data, "mechanism": mechanism})


def build(*, not_private: bool = True) -> ReportData:
    """Plausible values of a run on small-business loans, with one hostile name."""
    rng = random.Random(3)
    names = [f"Community Bank No. {index + 1}" for index in range(58)] + ["<script>alert('x')</script> & Sons"]
    accounts: Any = {
        name: {
            "spent": 2.9998 - (rng.random() * 0.4 if index % 9 == 0 else 0),
            "declared_size": 400 + 37 * index,
            "entries": 20,
        }
        for index, name in enumerate(names)
    }
    journal: Any = [
        {
            "round": index + 1,
            "seconds": 0.61,
            "cohort": 59,
            "admitted": 58 if index in {3, 4} else 59,
            "refused": {"Community Bank No. 7": "budget"} if index in {3, 4} else {},
            "rejected": {},
            "absent": [],
            "quorum": True,
            "mean_update_norm": 0.21 * math.exp(-index / 7) + 0.05 + rng.gauss(0, 0.004),
            "server_learning_rate": 30 * (1 + math.cos(math.pi * index / 20)),
        }
        for index in range(20)
    ]
    return ReportData(
        title="Small-business loans: shared start under privacy",
        scenario="sba-loans",
        created="2026-01-31T12:00:00+00:00",
        not_private=not_private,
        versions={
            "metarisk": "0.1.0",
            "torch": "2.13.0",
            "flwr": "1.41.0",
            "opacus": "1.6.0",
            "dp-accounting": "0.6.0",
        },
        plan=_plan().model_dump(mode="json"),
        privacy={
            "epsilon_budget": 3.0,
            "delta": 1e-5,
            "unit": "one loan record of one lender",
            "by_institution": accounts,
        },
        journal=journal,
        metrics=_metrics(rng),
        main_method="dp-reptile",
        command="metarisk-simulate run loans.toml --epsilon 3 --seed 7",
    )


def paired(low: float | None, high: float | None, **over: Any) -> Any:
    values = {"method": "dp-reptile", "baseline": "local-logistic", "k": 50, "wins": 12, "losses": 8}
    mean = None if low is None or high is None else (low + high) / 2
    return {**values, "mean": mean, "ci95": [low, high], **over}


def with_metrics(report: ReportData, **over: Any) -> ReportData:
    return replace(report, metrics={**report.metrics, **over})  # type: ignore[typeddict-item]


class Page(HTMLParser):
    """Collects a page's elements and its text, and holds that every element that opens is closed."""

    VOID = frozenset({"meta", "br", "link", "hr", "img", "line", "path", "rect", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title", "desc"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(build())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_lender_is_named_and_no_name_is_markup(html: str, page: Page) -> None:
    report = build()
    for name in (*report.privacy["by_institution"], *LENDERS):
        assert name in page.text
        assert escape(name, quote=False) in html or escape(name) in html or name.replace("'", "&#39;") in html
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "savings", "iframe", "img", "link", "object"}


def test_hostile_text_anywhere_stays_text() -> None:
    hostile = '"><script>x</script>'
    report = build()
    methods = {name: {**method, "title": hostile} for name, method in report.metrics["methods"].items()}
    renamed = replace(
        with_metrics(report, methods=methods),
        title=hostile, scenario=hostile, command=hostile, created=hostile,
        versions={hostile: hostile}, plan={"name": hostile, "data": {"columns": []}},
        journal=[{**entry, "rejected": {hostile: hostile}, "absent": [hostile]} for entry in report.journal],
        privacy={**report.privacy, "unit": hostile},
    )  # fmt: skip
    assert "<script" not in render_report(renamed).lower()


def test_page_loads_nothing_and_runs_nothing(html: str, page: Page) -> None:
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", html, re.IGNORECASE)
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#")[:1] == "#"  # type: ignore[index]


def test_same_values_give_the_same_text(html: str) -> None:
    assert render_report(build()) == html


def test_charts_are_announced_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    charts = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 10
    for chart in charts:
        assert set(str(chart["aria-labelledby"]).split()) <= set(ids)


def test_losers_stand_in_the_text_the_chart_and_the_figures(html: str, page: Page) -> None:
    assert "Unity Bank (\u22120.031)" in page.text
    assert html.count('class="name end loses"') == 2
    assert "2 of 20 unseen lenders lose with 50 labels" in page.text


def test_headline_figures_are_those_of_the_metrics(page: Page) -> None:
    assert "0.694 and Logistic regression 0.597" in page.text
    assert "against Reptile without privacy , AUC with 50 labels differs by \u22120.0005" in page.text
    assert "a difference of +0.097 (95% interval 0.081 to 0.113)" in page.text
    assert "+0.070 (0.054 to 0.086)" in page.text
    assert "3.00 of 3.00 epsilon spent, the largest of 59 lenders" in page.text


@pytest.mark.parametrize(
    ("own", "rival", "expected"),
    [
        ((0.05, 0.09), (0.01, 0.03), "ranks risk better from the shared start than alone."),
        ((0.05, 0.09), (-0.01, 0.03), "better from the shared start than alone, but not demonstrably better"),
        ((0.05, 0.09), (-0.03, -0.01), "better from the shared start than alone, but worse than with the strongest"),
        ((0.05, 0.09), None, "the strongest local method was not compared."),
        ((-0.01, 0.09), (0.01, 0.03), "no better or worse than alone"),
        ((-0.09, -0.05), (0.01, 0.03), "ranks risk worse from the shared start than alone."),
        (None, None, "This run did not compare"),
    ],
)
def test_headline_says_no_more_than_the_intervals(own: Any, rival: Any, expected: str) -> None:
    pairs = [paired(*own)] if own else []
    pairs += [paired(*rival, baseline="local-logistic-binned")] if rival else []
    report = with_metrics(build(), paired=pairs)
    assert expected in finding(report.metrics, report.main_method)
    assert escape(finding(report.metrics, report.main_method)) in render_report(report)


def test_banner_only_where_the_noise_protects_nobody() -> None:
    assert "NOT PRIVATE" in render_report(build())
    assert "NOT PRIVATE" not in render_report(build(not_private=False))


def test_a_run_without_noise_has_no_epsilon_and_promises_nothing() -> None:
    report = build()
    accounts: Any = {name: {**one, "spent": math.inf} for name, one in report.privacy["by_institution"].items()}
    report = replace(report, privacy={**report.privacy, "epsilon_budget": math.inf, "by_institution": accounts})
    page = Page(render_report(report))
    assert "the noise switched off" in page.text
    assert "no bound" in page.text
    assert "What is promised" not in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)


def test_missing_numbers_become_dashes_never_nan() -> None:
    report = build()
    broken = {"mean": math.nan, "ci95": [None, None]}
    alone = {"mean": 0.7, "ci95": [None, None]}
    summary = {
        name: {**cells, "50": {"auc": broken}, "100": {"auc": alone}}
        for name, cells in report.metrics["summary"].items()
    }
    gains = {"k": 50, "baseline": "local-logistic", "method": "dp-reptile", "gains": {"A": math.nan, "B": 0.1}}
    journal = [{**report.journal[0], "mean_update_norm": None, "server_learning_rate": None}]
    report = with_metrics(
        report, summary=summary, gain_by_institution=gains, paired=[paired(None, None)], share_harmed={}
    )
    text = render_report(replace(report, journal=journal))  # type: ignore[arg-type]
    assert "nan" not in Page(text).text.lower().split()
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


def test_a_run_that_measured_nothing_still_reports() -> None:
    report = build()
    report = with_metrics(report, summary={}, paired=[], gain_by_institution=None, share_harmed={})
    report = replace(report, journal=[], privacy={**report.privacy, "by_institution": {}})
    text = Page(render_report(report)).text
    assert "did not compare" in text
    assert "The journal holds no round." in text


def test_missing_updates_name_the_lender_and_the_code() -> None:
    report = build()
    journal = [{**report.journal[0], "rejected": {"Slow Bank": "norm"}, "absent": ["Gone Bank"], "quorum": False}]
    text = Page(render_report(replace(report, journal=journal))).text  # type: ignore[arg-type]
    assert "Slow Bank 1 rejected by the server norm" in text
    assert "Gone Bank 1 no answer in time" in text
    assert "1 round had too few updates" in text


def test_plan_hash_is_the_one_that_banks_approve(page: Page) -> None:
    assert plan_hash(build().plan) == _plan().hash()
    assert _plan().hash() in page.text
    assert "mechanism \u00b7 noise multiplier 13.9" in page.text


def test_harm_is_explained_as_it_is_measured(page: Page) -> None:
    tolerance = inspect.signature(share_harmed).parameters["tolerance"].default
    assert f"by more than {tolerance}." in page.text


def test_report_survives_a_round_trip_through_json(html: str) -> None:
    report = build()
    again = {name: json.loads(json.dumps(getattr(report, name))) for name in ("metrics", "privacy", "journal", "plan")}
    assert render_report(replace(report, **again)) == html


def test_write_report_writes_what_render_returns(tmp_path: Path, html: str) -> None:
    write_report(tmp_path / "report.html", build())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html

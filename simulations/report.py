"""One run as one HTML file that needs nothing else: what was found, who loses, what privacy it cost, how to repeat it.

The file holds its style and its charts, loads nothing and runs no script, so it can be mailed, archived and printed.
Every text that comes from data is escaped. The words live in `report.html.j2`; this module decides what they may say.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from metarisk_common import charts
from metarisk_common.pages import page_environment

from . import plots
from .findings import (
    ABSENT,
    Metrics,
    Privacy,
    Round,
    estimate,
    finding,
    fixed,
    gains_of,
    interval,
    ordered_methods,
    paired_with,
    pairs,
    power,
    signed,
    spent,
    strongest_local,
    told,
    verdict,
)

Charts = dict[str, str]

WIDE, NARROW = charts.Layout("wide", 976, 470), charts.Layout("narrow", 358, 340)


@dataclass(frozen=True)
class ReportData:
    """Everything a report says, as plain values. `created` is ISO 8601 text, `command` repeats the run.

    `not_private`: the noise came from a seed or was switched off, so the report is stamped as protecting nobody.
    `plan` is the plan's JSON as a mapping; its digest is computed from it.
    """

    title: str
    scenario: str
    created: str
    not_private: bool
    versions: Mapping[str, str]
    plan: Mapping[str, object]
    privacy: Privacy
    journal: Sequence[Round]
    metrics: Metrics
    main_method: str
    command: str


def write_report(path: Path, report: ReportData) -> None:
    """Write `report` to `path` as one HTML file in UTF-8.

    Raises:
        OSError: the file cannot be written.

    """
    path.write_text(render_report(report), encoding="utf-8")


def render_report(report: ReportData) -> str:
    """Return the HTML of `report`; the same values give the same text."""
    metrics, privacy = report.metrics, report.privacy
    environment = page_environment()
    environment.filters.update(fixed=fixed, signed=signed, interval=interval, spent=spent, power=power)
    environment.globals.update(estimate=estimate, verdict=verdict, paired_with=paired_with, size=_size)
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    headline = gains_of(metrics, report.main_method)
    gains = sorted(headline["gains"].items(), key=lambda item: (-item[1], item[0]))
    accounts = sorted(privacy["by_institution"].items(), key=lambda item: (-item[1]["spent"], item[0]))
    schema = report.plan.get("data")
    return template.render(
        report=report,
        metrics=metrics,
        privacy=privacy,
        methods=ordered_methods(metrics, report.main_method),
        gains=gains,
        gains_of=headline,
        losers=[(name, gain) for name, gain in reversed(gains) if gain < 0],
        accounts=accounts,
        finding=finding(report.metrics, report.main_method),
        pairs=pairs(metrics),
        strongest=strongest_local(metrics, headline["k"]),
        lenders=max(
            [0, *(cell.get("institutions", 0) for cells in metrics["summary"].values() for cell in cells.values())]
        ),
        noise_off=not math.isfinite(privacy["epsilon_budget"]),
        federated=report.journal[-1].get("federated_metrics") if report.journal else None,
        refusals=_refusals(report.journal),
        charts=_charts(report),
        told=told(metrics),
        measures=_measures(metrics),
        plan_hash=plan_hash(report.plan),
        plan_rows=_flat({key: value for key, value in report.plan.items() if key != "data"}),
        schema=schema if isinstance(schema, Mapping) else {},
    )


def _measures(metrics: Metrics) -> list[str]:
    """Return the measures of the large table beside the headline: those that the field reports and the run has."""
    yardstick = told(metrics).yardstick
    known = {name for cells in metrics["summary"].values() for cell in cells.values() for name in cell}
    return [name for name in yardstick.metrics if name not in {yardstick.headline, "calibration"} and name in known]


def plan_hash(plan: Mapping[str, object]) -> str:
    """Return the digest that a bank approves: SHA-256 of the plan's canonical JSON (as `Plan.hash`)."""
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _size(group: int | Sequence[str]) -> int:
    return group if isinstance(group, int) else len(group)


def _refusals(journal: Sequence[Round]) -> list[tuple[str, str, str, int]]:
    """Return (lender, what happened, code, number of rounds), the most frequent first."""
    counts: dict[tuple[str, str, str], int] = {}
    for entry in journal:
        events = [(name, "declined by the lender", code) for name, code in entry["refused"].items()]
        events += [(name, "rejected by the server", code) for name, code in entry.get("rejected", {}).items()]
        events += [(name, "no answer in time", ABSENT) for name in entry.get("absent", ())]
        for event in events:
            counts[event] = counts.get(event, 0) + 1
    return sorted(((*event, count) for event, count in counts.items()), key=lambda row: (-row[3], row))


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.extend(_flat(value, f"{prefix}{key}."))
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + key, ABSENT if value is None or not text else text))
    return rows


def _charts(report: ReportData) -> Charts:
    """Return every chart's SVG, the wide drawing and the narrow one together, by name."""
    metrics, privacy = report.metrics, report.privacy
    gains = gains_of(metrics, report.main_method)
    known = gains["gains"]
    series = _series(metrics, report.main_method)
    words = told(metrics)
    measure = words.yardstick.title
    titles = {name: method["title"] for name, method in metrics["methods"].items()}
    said = "; ".join(f"{s.title}: " + ", ".join(f"{fixed(p.mean)} at {p.x:g}" for p in s.points) for s in series)
    curve = charts.Words(
        "curve", f"{measure} by number of labels", f"Mean {measure} over unseen {words.judged}. {said}.",
        f"labels at the new {words.judged_one} (square-root scale)", f"{measure}, mean over unseen {words.judged}",
    )  # fmt: skip
    losers = sum(value < 0 for value in known.values())
    gain = charts.Words(
        "gain", f"Gain of each unseen {words.judged_one} with {gains['k']} labels",
        f"{len(known) - losers} {words.judged} do not lose, {losers} lose. The table of this section has the numbers.",
        f"{measure} gained over {titles.get(gains['baseline'], gains['baseline'])}",
    )  # fmt: skip
    accounts, budget = privacy["by_institution"], privacy["epsilon_budget"]
    epsilon = charts.Words(
        "epsilon", f"Epsilon spent by each {words.one}",
        f"{len(accounts)} {words.many}, budget {budget:g}. The table of this section has the numbers.",
        f"participating {words.many}, largest first", "epsilon spent",
    )  # fmt: skip
    norms = charts.Words(
        "norm", "Mean norm of the meta-updates", "By round.", "round", "mean L2 norm of the noised meta-updates"
    )
    steps = charts.Words("step", "Server step", "By round.", "round", "server learning rate")
    gain_rows = [plots.Bar(name, value, signed(value)) for name, value in known.items()]
    spent_rows = [plots.Bar(name, one["spent"], spent(one["spent"], 4)) for name, one in accounts.items()]
    half = (charts.Layout("wide", 470, 250), charts.Layout("narrow", 358, 230))
    low = (charts.Layout("wide", 976, 200), charts.Layout("narrow", 358, 190)) if math.isfinite(budget) else ()
    sizes = [(r["round"], r["mean_update_norm"]) for r in report.journal]
    rates = [(r["round"], r["server_learning_rate"]) for r in report.journal]
    return {
        "curve": "\n".join(
            plots.curves(series, metrics["ks"], curve, layout, words.yardstick.words.floor) for layout in (WIDE, NARROW)
        ),
        "legend": "\n".join(plots.legend(series)),
        "gain": "\n".join(plots.gain_bars(gain_rows, gain, layout) for layout in (WIDE, NARROW)),
        "epsilon": "\n".join(plots.budget_bars(spent_rows, budget, epsilon, layout) for layout in low),
        "norm": "\n".join(plots.rounds_line(sizes, norms, layout) for layout in half),
        "step": "\n".join(plots.rounds_line(rates, steps, layout) for layout in half),
    }


def _series(metrics: Metrics, main_method: str) -> list[plots.Series]:
    """Return a line for each method that was measured; one that no label changes is a level."""
    lines: list[plots.Series] = []
    ranks = dict.fromkeys(("federated", "local", "pooled"), 0)
    for name, method in ordered_methods(metrics, main_method):
        points = []
        for k in metrics["ks"]:
            found = estimate(metrics, name, k)
            if found is not None and found["mean"] is not None:
                ends = [end for end in found["ci95"] if end is not None and math.isfinite(end)] or [found["mean"]]
                points.append(plots.Point(float(k), found["mean"], min(ends), max(ends)))
        style = f"k-{method['kind']} n{min(ranks[method['kind']], 3)}" + (" main" if name == main_method else "")
        ranks[method["kind"]] += 1
        if points:
            level = method["kind"] == "pooled" and len({point.mean for point in points}) == 1
            lines.append(plots.Series(method["title"], style, tuple(points), level))
    return lines

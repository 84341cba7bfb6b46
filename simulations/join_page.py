"""The report to one bank on whether to join, as files: one HTML page for people, and JSON for programs.

The page holds its style and its chart, loads nothing and runs no script. No cell of the bank's table is on it.
"""

import json
from importlib.resources import files
from pathlib import Path

from metarisk_common.charts import Layout, Words
from metarisk_common.errors import ConfigError
from metarisk_common.files import write_atomically
from metarisk_common.pages import page_environment

from .findings import fixed, interval, power, signed, spent
from .join_figures import Figure
from .join_report import SHARED, TITLES, AtLabels, Join, strongest_of
from .plots import Point, Series, curves, legend

WIDE, NARROW = Layout("wide", 976, 430), Layout("narrow", 358, 340)

HEADLINES = {
    "yes": "Yes: {name} gains from joining",
    "no": "No: {name} does better alone",
    "it depends": "It depends: {name} gains or loses by how many labels it has",
    "not shown": "Not shown: no gain for {name} stands out from chance",
}


def write(path: Path, report: Join) -> None:
    """Write the page at `path` and the same as JSON beside it.

    Raises:
        ConfigError: a file cannot be written.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".json"), json.dumps(report, indent=1, allow_nan=False).encode())
        write_atomically(path, render(report).encode())
    except OSError as error:
        raise ConfigError(f"{path}: the report cannot be written: {error.strerror}") from None


def render(report: Join) -> str:
    """Return the page; the same report gives the same text."""
    environment = page_environment()
    environment.filters.update(fixed=fixed, signed=signed, interval=interval, power=power, spent=spent)
    environment.globals.update(strongest_of=strongest_of)
    template = environment.from_string(files(__package__).joinpath("join.html.j2").read_text(encoding="utf-8"))
    words = Words("join", f"AUC by number of labels at {report['institution']}",
                  "The shared start, and each way of doing without it.", "labels of the bank's own", "AUC")  # fmt: skip
    series, ks = _series(report), [one["k"] for one in report["at"]]
    return template.render(
        report=report,
        headline=HEADLINES[report["verdict"]].format(name=report["institution"]),
        titles=TITLES,
        charts="\n".join(curves(series, ks, words, layout) for layout in (WIDE, NARROW)),
        legend="\n".join(legend(series)),
    )


def lines(report: Join) -> list[str]:
    """Return the report in a few lines for a terminal."""
    cost = report["cost"]
    price = "no privacy" if cost["epsilon"] is None else f"epsilon {spent(cost['epsilon'])} at delta {cost['delta']:g}"
    shown = [
        f"{report['verdict'].upper()}: {report['words']}",
        "",
        f"{'labels':>6}  {'shared':>7}  {'alone':>7}  {'gain':>8}  {'95% interval':18}  verdict    against",
    ]
    for one in report["at"]:
        rival = strongest_of(one)
        shown.append(
            f"{one['k']:6d}  {fixed(one['auc']):>7}  {fixed(rival['auc']):>7}  {signed(rival['gain_auc']['mean']):>8}  "
            f"{interval(rival['gain_auc']['ci95']):18}  {one['verdict']:9}  {TITLES[rival['method']]}"
        )
    shown += ["", f"Level with its own best from: {report['crossover_words']} labels"]
    shown.append(
        f"Taking part costs {price}, for {cost['unit']}, over {cost['rounds']} rounds, {cost['steps']} steps in all."
    )
    if not cost["delta_fits"]:
        shown.append(
            f"The plan's delta is too large for {report['records']} records: at most {power(cost['delta_limit'])}."
        )
    shown.append(
        f"Intervals: this bank, {report['records']} records, {report['draws']} draws of labels; nothing of other banks."
    )
    if report["not_private"]:
        shown.append("NOT PRIVATE: the run is a simulation whose noise comes from a seed, or has none.")
    return shown


def _series(report: Join) -> list[Series]:
    shared = tuple(_point(one["k"], one["auc"], None) for one in report["at"])
    found = [Series(TITLES[SHARED], "k-federated n0 main", shared)]
    names = dict.fromkeys(rival["method"] for one in report["at"] if one["k"] > 0 for rival in one["rivals"])
    for number, name in enumerate(names):
        points = tuple(_of(one, name) for one in report["at"] if any(r["method"] == name for r in one["rivals"]))
        found.append(Series(TITLES[name], f"k-local n{number % 4}", points))
    return found


def _of(one: AtLabels, name: str) -> Point:
    """Return a rival's AUC, with the gain's interval around it seen from the shared start's curve."""
    rival = next(rival for rival in one["rivals"] if rival["method"] == name)
    return _point(one["k"], rival["auc"], rival["gain_auc"])


def _point(k: int, mean: float, gain: Figure | None) -> Point:
    low, high = (None, None) if gain is None else gain["ci95"]
    if gain is None or low is None or high is None:
        return Point(k, mean, mean, mean)
    return Point(k, mean, mean + gain["mean"] - high, mean + gain["mean"] - low)

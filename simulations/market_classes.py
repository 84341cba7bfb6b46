"""A volatility run by classes of assets: what each method is worth on each, and what the main one gains, paired.

Assets are the sample: draws of one overlap in time and are averaged within it first, so that an interval (Student's t)
has as many values as there are assets. Assets of one market move together, which no interval over assets knows of.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NotRequired, cast

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from metarisk_common.evaluation import EpisodeScore, paired_difference, summarise
from metarisk_common.yardsticks import VOLATILITY

from .findings import ABSENT, Estimate, Metrics, fixed, gains_of, ordered_methods, signed
from .markets import CLASS

Groups = Sequence[Mapping[str, Any]]
"""What `by_class` returns."""


class ClassMetrics(Metrics):
    """A run's metrics where assets have classes."""

    classes: NotRequired[Groups]


_REFERENCES: Final = {"r2": "the training mean", "r2_own": "each asset's own past mean"}

ALL: Final = "all"
"""Name of the group of all assets."""

FEW: Final = 3
"""Assets below which an interval over them says nothing."""


def classes_of(frame: pl.DataFrame, institution: str) -> dict[str, str]:
    """Return each judged institution's class; empty where the table does not say."""
    if CLASS not in frame.columns:
        return {}
    pairs = frame.select(pl.col(institution).cast(pl.String), pl.col(CLASS).cast(pl.String)).unique()
    return dict(sorted(pairs.iter_rows()))


def by_class(
    scores: Sequence[EpisodeScore], classes: Mapping[str, str], main: str, methods: Sequence[str], ks: Sequence[int]
) -> list[dict[str, Any]]:
    """Summarise all assets and each class, the largest first.

    Each has `name`, `assets` (names), `summary` (as a run's), `paired`: the main method less each other at every k,
    and `adapted`: the main method at every k less itself at k = 0; both in R2.
    """
    found = []
    names = sorted(set(classes.values()), key=lambda name: (-sum(one == name for one in classes.values()), name))
    for name in [ALL, *names] if len(names) > 1 else names:
        own = [score for score in scores if name == ALL or classes[score.institution] == name]
        scored = {(score.method, score.k) for score in own}
        found.append(
            {
                "name": name,
                "assets": sorted({score.institution for score in own}),
                "summary": summarise(own, VOLATILITY),
                "paired": [
                    {"method": main, "baseline": other, "k": k} | _paired(own, main, other, k)
                    for other in methods
                    for k in ks
                    if other != main and (other, k) in scored
                ],
                "adapted": [{"method": main, "k": k} | _paired(own, main, main, k, 0) for k in ks if k > 0 and 0 in ks],
            }
        )
    return found


def _paired(
    scores: Sequence[EpisodeScore], main: str, other: str, k: int, k_other: int | None = None
) -> dict[str, Any]:
    found = paired_difference(scores, main, other, k, VOLATILITY.headline, k_b=k_other)
    return {key: found[key] for key in ("mean", "ci95", "wins", "losses")}


def class_tables(metrics: Metrics, main: str) -> list[Table]:
    """Return R2 by class for every method, and what the main method gains over each, at the k where gains are shown.

    Empty where the run does not know of classes.
    """
    groups = cast("ClassMetrics", metrics).get("classes", ())
    if not groups:
        return []
    return [*(_levels(metrics, groups, main, measure) for measure in _REFERENCES), _gains(metrics, groups, main)]


def _levels(metrics: Metrics, groups: Groups, main: str, measure: str) -> Table:
    k = gains_of(metrics, main)["k"]
    table = _table(f"R2 with {k} labels, against {_REFERENCES[measure]}", groups)
    for name, method in ordered_methods(metrics, main):
        cells = [group["summary"].get(name, {}).get(str(k), {}).get(measure) for group in groups]
        if any(cells):
            style = "bold" if name == main else ""
            table.add_row(
                Text(method["title"]), *(fixed(cell["mean"]) if cell else ABSENT for cell in cells), style=style
            )
    return table


def _gains(metrics: Metrics, groups: Groups, main: str) -> Table:
    k = gains_of(metrics, main)["k"]
    table = _table(f"R2 with {k} labels: {metrics['methods'][main]['title']} less each, paired", groups)
    adapted = [next((row for row in group["adapted"] if row["k"] == k), None) for group in groups]
    if any(adapted):
        table.add_row(Text("itself without labels"), *map(_difference, adapted, groups), end_section=True)
    for name, method in ordered_methods(metrics, main):
        rows = [
            next((row for row in group["paired"] if row["baseline"] == name and row["k"] == k), None)
            for group in groups
        ]
        if any(rows):
            table.add_row(Text(method["title"]), *map(_difference, rows, groups))
    return table


def _difference(found: Estimate | None, group: Mapping[str, Any]) -> Text:
    """Write a difference over half its interval, which fewer than three assets do not have."""
    if found is None or found["mean"] is None:
        return Text(ABSENT)
    low, high = found["ci95"]
    known = len(group["assets"]) >= FEW and low is not None and high is not None
    half = f"\u00b1{fixed((high - low) / 2)}" if known and high is not None and low is not None else ABSENT
    return Text.assemble(signed(found["mean"]), "\n", (half, "dim"))


def _table(title: str, groups: Groups) -> Table:
    table = Table(title=title, title_justify="left", title_style="", pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("method", min_width=26)
    for group in groups:
        table.add_column(f"{group['name']}\n({len(group['assets'])})", justify="right", no_wrap=True)
    return table

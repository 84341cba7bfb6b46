"""How the table of a comparison is printed: for a terminal, and line by line as CSV."""

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from .compare_tables import Pair, Row, Table
from .comparison import LOCAL, POOLED
from .findings import ABSENT, fixed, signed

STAMP = "NOT PRIVATE: a simulation whose noise comes from seeds, so that it can be repeated."
_DIGITS = 4


def lines(table: Table) -> RenderableType:
    """Return what a terminal shows: AUC, calibration, differences from the reference, and crossovers."""
    parts: list[RenderableType] = [
        Text(f"{table['title']}: {table['split']}; {table['lenders']} judged, {table['draws']} draws, seeds "
             f"{', '.join(map(str, table['seeds']))}, delta {table['delta']:g}"),
        _grid(table, "AUC by number of labels, 95% intervals over lenders", _auc),
        _grid(table, "Log-loss by number of labels", _log_loss),
        _grid(table, "Calibration error in percentage points, by number of labels", _calibration),
    ]  # fmt: skip
    for title, kind in (
        (f"AUC less that of {table['reference_title']} at the same epsilon, paired", "reference"),
        ("AUC less that without labels, paired", "labels"),
        ("AUC less that at the next larger epsilon, paired", "privacy"),
    ):
        pairs = [pair for pair in table["pairs"] if pair["kind"] == kind and pair["metric"] == "auc"]
        if pairs:
            parts.append(_pair_grid(table, title, pairs))
    parts.append(_harm_grid(table))
    if table["crossover"]:
        parts.append(Text("Labels from which on a lender's own best model is level (paired interval reaches 0):"))
        parts += [Text(f"  {_name(table, at['method'], at['epsilon'])}: {at['words']}") for at in table["crossover"]]
    if table["left_out"]:
        parts.append(Text(f"Too small to be judged, and left out: {', '.join(table['left_out'])}"))
    parts.append(Text(STAMP))
    return Group(*parts)


def to_csv(table: Table) -> str:
    """Write one line a method, epsilon and k, with its difference from the reference at the same epsilon and k."""
    paired = {
        (pair["method"], pair["epsilon"], pair["k"]): pair
        for pair in table["pairs"]
        if pair["kind"] == "reference" and pair["metric"] == "auc" and pair["method"] not in LOCAL + POOLED
    }
    heads = ["method", "title", "kind", "epsilon", "k", "lenders", "auc", "auc_low", "auc_high", "worst_decile", "ks",
             "log_loss", "brier", "calibration_error", "share_harmed", "lenders_harmed", "difference",
             "difference_low", "difference_high", "wins", "losses"]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in table["rows"]:
        pair = paired.get((row["method"], row["epsilon"], row["k"]))
        compared = [pair["mean"], *pair["ci95"], pair["wins"], pair["losses"]] if pair else [None] * 5
        own = [row[key] for key in ("worst_decile", "ks", "log_loss", "brier", "calibration_error", "share_harmed",
                                    "lenders_harmed")]  # fmt: skip
        head = [row["method"], row["title"], row["kind"], row["epsilon"], row["k"], row["lenders"]]
        writer.writerow([*head, row["auc"]["mean"], *row["auc"]["ci95"], *own, *compared])
    return text.getvalue()


def epsilon_text(epsilon: float | str | None) -> str:
    """Write an epsilon in a few characters."""
    return "" if epsilon is None else str(epsilon) if isinstance(epsilon, str) else f"{epsilon:g}"


def _name(table: Table, method: str, epsilon: float | str | None) -> str:
    title = next(row["title"] for row in table["rows"] if row["method"] == method)
    return title if epsilon is None else f"{title}, epsilon {epsilon_text(epsilon)}"


def _empty(title: str, heads: Sequence[str]) -> Grid:
    grid = Grid(title=title, title_justify="left", title_style="", pad_edge=False, box=box.SIMPLE_HEAD)
    grid.add_column("method", max_width=34)
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    return grid


def _grid(table: Table, title: str, cell: object) -> Grid:
    grid = _empty(title, ["epsilon", *map(str, table["k"])])
    assert callable(cell)  # noqa: S101
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in table["rows"]:
        found.setdefault((row["method"], epsilon_text(row["epsilon"])), {})[row["k"]] = row
    for (_, epsilon), by_k in found.items():
        title = next(iter(by_k.values()))["title"]
        grid.add_row(Text(title), epsilon, *(cell(by_k[k]) if k in by_k else ABSENT for k in table["k"]))
    return grid


def _auc(row: Row) -> Text:
    return Text.assemble(fixed(row["auc"]["mean"], _DIGITS), "\n", (_half(row["auc"]["ci95"]), "dim"))


def _half(ends: Sequence[float | None]) -> str:
    """Write half an interval's width: a row of them fits a terminal, and the intervals are even."""
    low, high = ends
    return "" if low is None or high is None else f"\u00b1{(high - low) / 2:.4f}"


def _log_loss(row: Row) -> Text:
    return Text(fixed(row["log_loss"], _DIGITS))


def _calibration(row: Row) -> Text:
    return Text(fixed(100 * row["calibration_error"], 1))


def _pair_grid(table: Table, title: str, pairs: Sequence[Pair]) -> Grid:
    ks = [k for k in table["k"] if any(pair["k"] == k for pair in pairs)]
    grid = _empty(title, ["epsilon", *map(str, ks)])
    found: dict[tuple[str, str], dict[int, Pair]] = {}
    for pair in pairs:
        own, other = epsilon_text(pair["epsilon"]), epsilon_text(pair["other_epsilon"])
        # A baseline has no epsilon, and what it is compared with has; the other way round as well.
        epsilon = own if pair["kind"] == "privacy" else own or other
        found.setdefault((pair["method"], epsilon), {})[pair["k"]] = pair
    for (method, epsilon), by_k in found.items():
        name = _name(table, method, None)
        grid.add_row(Text(name), epsilon, *(_difference(by_k[k]) if k in by_k else ABSENT for k in ks))
    return grid


def _difference(pair: Pair) -> Text:
    return Text.assemble(signed(pair["mean"], _DIGITS), "\n", (_half(pair["ci95"]), "dim"))


def _harm_grid(table: Table) -> Grid:
    ks = [k for k in table["k"] if k > 0]
    grid = _empty("Draws that lose more than 0.005 AUC by adapting, in percent", ["epsilon", *map(str, ks)])
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in table["rows"]:
        if row["share_harmed"] is not None:
            found.setdefault((row["title"], epsilon_text(row["epsilon"])), {})[row["k"]] = row["share_harmed"]
    for (title, epsilon), by_k in found.items():
        grid.add_row(Text(title), epsilon, *(fixed(100 * by_k[k], 1) if k in by_k else ABSENT for k in ks))
    return grid

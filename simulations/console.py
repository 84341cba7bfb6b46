"""What a terminal shows of a run: the table of results, every lender's epsilon, and the bar while rounds go by."""

import math
from types import TracebackType
from typing import Self

from rich import box
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from metarisk_common.yardsticks import CREDIT, FieldWords

from .findings import (
    ABSENT,
    PAIRED_DIGITS,
    Estimate,
    FederatedMetrics,
    Metrics,
    Privacy,
    estimate,
    fixed,
    gains_of,
    interval,
    ordered_methods,
    power,
    signed,
    spent,
    told,
)

NAME_CELLS = 26
"""Terminal cells that a lender's name may take in the list of ledgers, as long as cut names still differ."""

_EVEN = 0.0005  # half of the last digit shown


def results_table(metrics: Metrics, main_method: str) -> Table:
    """Return the headline measure after each k: the main method first, then federated, local and pooled ones.

    A 95% interval that lies evenly about its mean is written as half its width, which keeps the table narrow.
    """
    lenders = max(
        [0, *(cell.get("institutions", 0) for cells in metrics["summary"].values() for cell in cells.values())]
    )
    words = told(metrics)
    measure = words.yardstick.title
    title = (
        f"{measure} by number of labels with 95% intervals: {lenders} unseen {words.judged}, {metrics['draws']} draws"
    )
    table = Table(title=title, title_justify="left", title_style="", pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("method", max_width=38)
    for k in metrics["ks"]:
        table.add_column(str(k), justify="right", no_wrap=True)
    methods = ordered_methods(metrics, main_method)
    for (name, method), following in zip(methods, [*methods[1:], None], strict=True):
        cells = [_cell(estimate(metrics, name, k)) for k in metrics["ks"]]
        last = following is None or name == main_method or following[1]["kind"] != method["kind"]
        style = "bold" if name == main_method else ""
        table.add_row(Text(method["title"]), *cells, style=style, end_section=last)
    return table


def differences_table(metrics: Metrics, main_method: str) -> Table | None:
    """Return the main method less each other one, on the same lenders and draws, at the k where gains are shown.

    These are what decides: their intervals are far narrower than those of the means. None where nothing was compared.
    """
    k = gains_of(metrics, main_method)["k"]
    rows = [pair for pair in metrics["paired"] if pair["k"] == k and pair["method"] == main_method]
    if not rows:
        return None
    main = metrics["methods"][main_method]["title"]
    title = f"{told(metrics).yardstick.title} with {k} labels: {main} less each other method, paired"
    table = Table(title=title, title_justify="left", title_style="", pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("less", max_width=34)
    for heading in ("difference", "95% interval", "wins", "losses"):
        table.add_column(heading, justify="right", no_wrap=True)
    order = [name for name, _ in ordered_methods(metrics, main_method)]
    for pair in sorted(rows, key=lambda pair: order.index(pair["baseline"])):
        title = metrics["methods"][pair["baseline"]]["title"]
        table.add_row(
            Text(title),
            signed(pair["mean"], PAIRED_DIGITS),
            interval(pair["ci95"], PAIRED_DIGITS),
            str(pair["wins"]),
            str(pair["losses"]),
        )
    return table


def federated_line(found: FederatedMetrics | None, words: FieldWords = CREDIT.words) -> Text | None:
    """Return what the lenders' own score histograms say of the result; None where they were not asked."""
    if found is None:
        return None
    lenders = f"federated metrics, from the noised score histograms of {len(found['admitted'])} {words.institutions}"
    if "auc" not in found:
        return Text(f"{lenders}: the noise leaves nothing to judge by")
    figures = (
        f"AUC {fixed(found['auc'])} (noise {fixed(found['auc_noise_std'], PAIRED_DIGITS)}), KS {fixed(found['ks'])}"
    )
    return Text(f"{lenders}, on the {words.records} learned from: {figures}")


def privacy_lines(privacy: Privacy, words: FieldWords = CREDIT.words) -> RenderableType:
    """Return what every lender's ledger says was spent, in columns, under a line that names the extremes."""
    budget, accounts = privacy["epsilon_budget"], privacy["by_institution"]
    claim = f"delta {power(privacy['delta'])}, for {privacy['unit']}"
    if not accounts:
        return Text(f"epsilon: no {words.institution} has a ledger ({claim})")
    if not math.isfinite(budget):
        return Text(f"epsilon: no bound, for none of {len(accounts)} {words.institutions}; the noise was switched off")
    ordered = sorted(accounts.items(), key=lambda item: (item[1]["spent"], item[0]))
    (lowest, low), (highest, high) = ordered[0], ordered[-1]
    least, most = spent(low["spent"]), spent(high["spent"])
    extent = f"each {most}" if least == most else f"from {least} ({lowest}) to {most} ({highest})"
    who = f"{len(accounts)} {words.institutions}"
    head = Text(f"epsilon spent of {budget:g} by {who}, from their ledgers, rounded up: {extent}; {claim}")
    width = max(cell_len(name) for name in accounts)
    if len({name[: NAME_CELLS - 1] for name in accounts}) == len(accounts):
        width = min(NAME_CELLS, width)
    entries = []
    for name, account in sorted(accounts.items()):
        entry = Text(name)
        entry.truncate(width, overflow="ellipsis", pad=True)
        over = account["spent"] > budget
        entry.append(f" {spent(account['spent'])}", style="bold red" if over else "")
        entries.append(entry)
    return Group(head, Columns(entries, padding=(0, 3), column_first=True))


class RoundProgress:
    """A bar over rounds on standard error: round, norm of the updates, epsilon spent of budget, time left.

    Where standard error is no terminal, a plain line for every tenth of the rounds takes its place. A run that is
    resumed starts at its first update: what an earlier process did does not count into the time left.
    """

    def __init__(
        self, rounds: int, epsilon_budget: float, *, quiet: bool = False, console: Console | None = None
    ) -> None:
        """Prepare for `rounds` rounds; `quiet` shows nothing; `console` is standard error unless given."""
        self._rounds = rounds
        self._budget = epsilon_budget
        self._console = console or Console(stderr=True)
        self._plain = not quiet and not self._console.is_terminal
        self._shown: int | None = None
        columns = (
            TextColumn("round {task.completed} of {task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=quiet or self._plain)
        self._task = self._bar.add_task("", total=rounds, state="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands, whether the rounds ended or were interrupted."""
        self._bar.stop()

    def update(self, completed: int, mean_update_norm: float | None, epsilon_spent: float) -> None:
        """Show that `completed` rounds are done, with the last one's mean update norm and the epsilon spent so far."""
        epsilon = (
            f"epsilon {spent(epsilon_spent)} of {spent(self._budget)}" if math.isfinite(self._budget) else "no privacy"
        )
        norm = f"update norm {fixed(mean_update_norm)}, " if mean_update_norm is not None else ""
        tenth = completed * 10 // max(self._rounds, 1)
        first = self._shown is None
        if self._plain and not first and tenth != self._shown:
            self._console.print(
                f"round {completed} of {self._rounds}: {norm}{epsilon}", highlight=False, soft_wrap=True
            )
        self._shown = tenth
        if first:
            self._bar.reset(self._task, completed=completed)
        self._bar.update(self._task, completed=completed, state=f"{norm}{epsilon}")


def _cell(found: Estimate | None) -> Text:
    if found is None:
        return Text(ABSENT)
    low, high = found["ci95"]
    ends = interval(found["ci95"]).replace(" to ", ABSENT)
    if low is not None and high is not None and found["mean"] is not None:
        uneven = abs((low + high) / 2 - found["mean"]) > _EVEN
        ends = ends if uneven else f"\u00b1{fixed((high - low) / 2)}"
    return Text.assemble(fixed(found["mean"]), "\n", (ends, "dim"))

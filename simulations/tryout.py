"""What an operator and a few banks need to try the production system by hand: real loans, split by lender, and a plan.

A table a lender, as that bank would have it, and `plan.json`. The rest is left to the commands that are to be tried.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import polars as pl

from metarisk_common.errors import ConfigError
from metarisk_common.files import write_atomically
from metarisk_common.plan import Plan
from metarisk_common.table import check_table, check_two_classes, labels, split_by_institution

from .scenarios import Scenario, load_scenario, split
from .tables import read_scenario_table, table_name

PLAN_FILE = "plan.json"
ROUNDS, DEADLINE_SECONDS = 10, 60.0
RUNS_WITHIN_BUDGET = 2
"""A bank's budget in the commands that are printed: as many times what the run costs, so that it can be run again."""


@dataclass(frozen=True)
class Lender:
    """A bank of the try-out. `table`: its loans, CSV; `declared_size`: public, rounded; `rows`: for the bank's eyes."""

    name: str
    table: Path
    declared_size: int
    rows: int

    @property
    def folder(self) -> str:
        """What the printed commands call the bank's folder."""
        return self.table.stem


@dataclass(frozen=True)
class TryOut:
    """A try-out's folder: `epsilon` is what the plan costs a bank that answers all of it, at the plan's delta."""

    path: Path
    plan: Plan
    epsilon: float
    lenders: tuple[Lender, ...]

    @property
    def budget(self) -> float:
        """The budget that the printed commands give each bank."""
        return RUNS_WITHIN_BUDGET * self.epsilon


def prepare(path: Path, scenario_path: Path, *, lenders: int, epsilon: float) -> TryOut:
    """Lay out a try-out's folder, whole or not at all.

    Args:
        path: the folder; it must not exist, or be empty.
        scenario_path: the scenario whose table is split; its institutions that take no part stay out here too.
        lenders: how many of its institutions.
        epsilon: what the whole run is to cost each bank.

    Raises:
        ConfigError: the folder is in use or cannot be written, the scenario is wrong, there are fewer lenders, or the
            plan's delta is too large for the largest.
        DataError: the table does not fit the schema, or a lender has one outcome only.

    """
    _check_place(path)
    scenario = load_scenario(scenario_path)
    where = table_name(scenario, scenario_path)
    tables = _chosen(scenario, read_scenario_table(scenario, scenario_path), where, lenders)
    sizes = {name: rounded(_size(table, scenario)) for name, table in tables.items()}
    plan = plan_for(scenario, sizes, epsilon)
    try:
        # Laid out beside its place and moved there whole: a folder that exists is complete.
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            made.chmod(0o755)
            names = _file_names(tables)
            for name, table in tables.items():
                # Whose loans these are is no column of the bank's own table.
                table.drop(scenario.columns.institution).write_csv(made / names[name])
            write_atomically(made / PLAN_FILE, plan.to_json().encode())
            made.replace(path)
        except BaseException:
            rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path}: a try-out cannot be laid out here: {error.strerror}") from None
    found = tuple(Lender(name, path / names[name], sizes[name], table.height) for name, table in tables.items())
    return TryOut(path, plan, epsilon, found)


def plan_for(scenario: Scenario, sizes: Mapping[str, int], epsilon: float) -> Plan:
    """Build a plan of a few short rounds that goes on without one of the banks, and costs each of them `epsilon`.

    Args:
        scenario: gives the schema, the model and the banks' steps.
        sizes: declared sizes.
        epsilon: over all rounds, at the scenario's delta.

    Raises:
        ConfigError: the delta is too large for the largest bank, or nothing can be so cheap.

    """
    limit = 1 / (10 * max(sizes.values()))
    if scenario.privacy.delta > limit:
        raise ConfigError(
            f"privacy.delta: {scenario.privacy.delta:g} is too large for a bank of {max(sizes.values())} records; it "
            f"may be at most 1 / (10 * records) = {limit:.2g}"
        )
    change = {"rounds": ROUNDS, "min_reports": max(1, len(sizes) - 1), "deadline_seconds": DEADLINE_SECONDS}
    short = scenario.model_copy(update={"server": scenario.server.model_copy(update=change)})
    try:
        return short.plan(epsilon=epsilon)
    except ValueError as error:
        raise ConfigError(f"--epsilon {epsilon:g}: no noise makes the plan so cheap: {error}") from None


def rounded(size: int) -> int:
    """Give the number that a bank of this size declares: its first two digits, and of less than a hundred the first."""
    return max(10, round(size, min(-1, 2 - len(str(size)))))


def _chosen(scenario: Scenario, frame: pl.DataFrame, where: str, lenders: int) -> dict[str, pl.DataFrame]:
    """Choose lenders that differ in size: the largest of each declared size first, and by name where sizes agree."""
    check_table(frame, scenario.columns, where)
    tables = split_by_institution(frame, scenario.columns, where)
    seen = split(scenario, list(tables)).seen
    if lenders > len(seen):
        raise ConfigError(f"--lenders {lenders}: the table has {len(seen)} that take part; ask for at most so many")
    met: dict[int, int] = {}
    order = []
    for name in sorted(seen, key=lambda name: (-_size(tables[name], scenario), name)):
        size = rounded(_size(tables[name], scenario))
        met[size] = met.get(size, 0) + 1
        order.append((met[size], -size, name))
    chosen = {name: tables[name] for _, _, name in sorted(order)[:lenders]}
    for name, table in chosen.items():
        lender = f"{where}: institution '{name}'"
        check_two_classes(labels(table, scenario.columns.label, lender), lender)
    return chosen


def _size(table: pl.DataFrame, scenario: Scenario) -> int:
    unit = scenario.columns.privacy_unit
    return table.height if unit is None else table[unit].n_unique()


def _file_names(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "bank"
        tries = (f"{plain}.csv" if number == 1 else f"{plain}-{number}.csv" for number in count(1))
        found[name] = next(file for file in tries if file not in found.values())
    return found


def _check_place(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path}: the folder is not empty; choose another with --out")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; name a folder that does not exist yet with --out")


def summary(made: TryOut) -> dict[str, object]:
    """What was written, for scripts."""
    return {
        "folder": str(made.path),
        "plan": str(made.path / PLAN_FILE),
        "plan_hash": made.plan.hash(),
        "rounds": made.plan.outer.rounds,
        "quorum": made.plan.outer.min_reports,
        "epsilon": made.epsilon,
        "delta": made.plan.mechanism.delta,
        "lenders": [
            {"name": lender.name, "table": str(lender.table), "declared_size": lender.declared_size}
            for lender in made.lenders
        ],
    }


def lines(made: TryOut) -> list[str]:
    """What was written, and the commands that make a federation of it on this machine, to be pasted in this order."""
    outer, plan = made.plan.outer, shlex.quote(str(made.path / PLAN_FILE))
    told = [f"{made.path}: {len(made.lenders)} banks with their own loans, and {PLAN_FILE}", ""]
    told += [f"  {lender.name}: {lender.table}, declared size {lender.declared_size}" for lender in made.lenders]
    told += [
        "",
        f"plan {made.plan.hash()}",
        (
            f"{outer.rounds} rounds of at most {outer.deadline_seconds:g} seconds, quorum {outer.min_reports}; all of "
            f"it costs a bank epsilon {made.epsilon:g} at delta {made.plan.mechanism.delta:g}"
        ),
        "",
        "The operator; `up` runs until Ctrl-C, in a terminal of its own:",
        "metarisk-server init consortium --name 'Try-out' --host 127.0.0.1",
        "metarisk-server up consortium",
    ]
    for lender in made.lenders:
        name, folder = shlex.quote(lender.name), lender.folder
        told += [
            "",
            f"{lender.name}, and the operator who enrols it; `up` in a terminal of its own:",
            (
                f"metarisk-client init {folder} --name {name} --data {shlex.quote(str(lender.table))} "
                f"--declared-size {lender.declared_size} --epsilon {made.budget:g} --server 127.0.0.1:9092 "
                "--ca consortium/certificates/ca.pem --yes"
            ),
            f"metarisk-server enroll {name} {folder}/node.pub --folder consortium",
            f"metarisk-client check {folder} --plan {plan}",
            f"metarisk-client approve {plan} --folder {folder}",
            f"metarisk-client up {folder}",
        ]
    return [*told, "", "The operator:", f"metarisk-server run {plan} --folder consortium"]


def check_epsilon(epsilon: float) -> None:
    """Refuse a cost that no plan can have.

    Raises:
        ConfigError: it is no finite number above 0.

    """
    if not 0 < epsilon < math.inf:
        raise ConfigError("--epsilon: must be a finite number above 0; banks answer no plan without noise")

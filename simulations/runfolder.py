"""A run's folder: everything that a run was made from and everything that came of it, in one place.

run.json            what was asked for: run id, engine, split, declared sizes, versions
scenario.json       the scenario as it was
plan.json           the plan that every bank approved
banks/001-name/     a bank: institution.toml, data.parquet, approved/, ledger.sqlite
unseen.parquet      records that are judged: of the institutions that take no part, or of later segments
checkpoint/         the server's state; journal.jsonl: a line a round
initializations.safetensors   meta-parameters by method
metrics.json, episodes.json, report.html
"""

import json
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl

from client.app import FOLDER_KEY, SIMULATION_KEY
from client.approval import approve
from client.config import CONFIG_FILE
from client.ledger import Ledger
from metarisk_common.config import toml_text, validate
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.files import write_atomically
from metarisk_common.plan import Plan, read_plan
from metarisk_common.schema import CategoricalColumn, Schema
from metarisk_common.table import (
    categories,
    check_table,
    check_two_classes,
    labels,
    require_columns,
    split_by_institution,
)
from metarisk_common.tasks import few_shot_draw, few_shot_in_time
from server.journal import read_journal
from server.rounds import JOURNAL

from .inprocess import Node
from .scenarios import Scenario, Split, split
from .unseen import learned_from, unseen_tasks

_INFO = {
    "run_id",
    "created",
    "engine",
    "not_private",
    "seed",
    "epsilon",
    "banks",
    "unseen",
    "declared_sizes",
    "versions",
}
_MICROSECONDS_A_DAY = 86_400_000_000
PACKAGES = ("metarisk-federated", "flwr", "torch", "opacus", "dp-accounting", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a prepared run and what its files say."""

    path: Path
    scenario: Scenario
    plan: Plan
    info: Mapping[str, Any]

    @property
    def not_private(self) -> bool:
        """Whether the banks' noise is reproducible, or switched off, so that nothing here protects anyone."""
        return bool(self.info["not_private"])

    @property
    def epsilon(self) -> float:
        """Budget of every bank; may be infinite."""
        return math.inf if self.info["epsilon"] is None else float(self.info["epsilon"])

    @property
    def bank_folders(self) -> dict[str, Path]:
        """Each bank's folder by its name, in order of names."""
        return {name: self.path / "banks" / folder for name, folder in self.info["banks"].items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Declared sizes."""
        return {name: int(size) for name, size in self.info["declared_sizes"].items()}

    def nodes(self) -> list[Node]:
        """The banks as nodes of a grid."""
        return [
            Node(name, {FOLDER_KEY: str(folder), SIMULATION_KEY: "yes"}) for name, folder in self.bank_folders.items()
        ]

    def spent(self) -> dict[str, dict[str, float]]:
        """Read from each bank's ledger what it has spent; a bank that was never asked has spent nothing."""
        found = {}
        for name, folder in self.bank_folders.items():
            path = folder / "ledger.sqlite"
            entry = {"spent": 0.0, "declared_size": self.sizes[name], "entries": 0}
            if path.exists():
                with Ledger.read(path) as ledger:
                    entry |= {"spent": ledger.spent(), "entries": ledger.counter}
            found[name] = entry
        return found

    def journal(self) -> list[dict[str, Any]]:
        """The server's records, one a round."""
        return read_journal(self.path / JOURNAL)


def prepare(
    path: Path, scenario: Scenario, frame: pl.DataFrame, *, where: str, epsilon: float | None, engine: str
) -> RunFolder:
    """Check a table, split it by institution, and lay out a run's folder with a folder for each bank.

    Args:
        path: the run's folder; it must not hold a run.
        scenario: the experiment.
        frame: all records.
        where: the table's name, for messages.
        epsilon: budget in place of the scenario's.
        engine: which engine is to run it.

    Raises:
        ConfigError: the folder is in use or cannot be written, the split leaves a side empty, or the plan's limits
            would keep institutions out.
        DataError: the table does not fit the schema, or an institution is too small to be judged.

    """
    _check_place(path)
    check_table(frame, scenario.columns, where)
    _check_categories(frame, scenario.columns, where)
    judged = unseen_tasks(scenario, frame, where)
    tables = split_by_institution(learned_from(scenario, frame), scenario.columns, where)
    parts = _who(scenario, frame, tables)
    for name in sorted({*parts.seen, *judged}):
        y = labels(judged[name] if name in judged else tables[name], scenario.columns.label, where)
        _check_institution(scenario, name, y, name in judged, where)
        if name in judged and scenario.columns.regression:
            _check_judged_numbers(scenario, judged[name], y, f"{where}: institution '{name}'")
    budget = scenario.privacy.epsilon if epsilon is None else epsilon
    plan = scenario.plan(epsilon=budget)
    _check_limits(scenario, {name: _size(tables[name], scenario.columns) for name in parts.seen})
    try:
        # Laid out beside its place and moved there whole: a folder that exists is complete.
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            made.chmod(0o755)
            info = _lay_out(made, scenario, plan, tables, parts, judged, budget, engine)
            made.replace(path)
        except BaseException:
            rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path}: a run cannot be laid out here: {error.strerror}") from None
    return RunFolder(path, scenario, plan, info)


def _who(scenario: Scenario, frame: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> Split:
    """Split the whole table's institutions; who has too little from before what came later takes no part."""
    parts = split(scenario, frame[scenario.columns.institution].cast(pl.String).unique().to_list())
    return Split(tuple(name for name in parts.seen if name in tables), parts.unseen)


def _lay_out(
    path: Path,
    scenario: Scenario,
    plan: Plan,
    tables: Mapping[str, pl.DataFrame],
    parts: Split,
    judged: Mapping[str, pl.DataFrame],
    budget: float,
    engine: str,
) -> dict[str, Any]:
    folders = {name: f"{index:03d}-{_slug(name)}" for index, name in enumerate(parts.seen, 1)}
    for name, folder in folders.items():
        _write_bank(path / "banks" / folder, name, tables[name], scenario, plan, budget)
    pl.concat(list(judged.values())).write_parquet(path / "unseen.parquet")
    write_atomically(path / "scenario.json", scenario.model_dump_json(by_alias=True, indent=1).encode())
    write_atomically(path / "plan.json", plan.to_json().encode())
    info = {
        "run_id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": engine,
        "not_private": scenario.seed is not None or plan.mechanism.noise_multiplier == 0,
        "seed": scenario.seed,
        "epsilon": budget if math.isfinite(budget) else None,
        "plan_hash": plan.hash(),
        "banks": folders,
        "unseen": list(judged),
        "declared_sizes": {name: _size(tables[name], scenario.columns) for name in parts.seen},
        "versions": {package: version(package) for package in PACKAGES},
    }
    write_atomically(path / "run.json", json.dumps(info, indent=1).encode())
    return info


def open_run(path: Path) -> RunFolder:
    """Open a prepared run.

    Raises:
        ConfigError: the folder holds no run, or its description is damaged.

    """
    values: object = None
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        values = json.loads((path / "scenario.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = {}
    if not isinstance(info, dict) or not info.keys() >= _INFO:
        raise ConfigError(f"{path}: holds no run that can be opened; name a folder that 'run' or 'demo' has made")
    scenario = validate(values, Scenario, where=str(path / "scenario.json"))
    return RunFolder(path, scenario, read_plan(path / "plan.json"), info)


def unused_folder(base: Path, name: str) -> Path:
    """Return `base/name-001`, or the next number that is free."""
    taken = [int(found.group(1)) for item in base.glob(f"{name}-*") if (found := re.search(r"-(\d{3,})$", item.name))]
    return base / f"{name}-{max(taken, default=0) + 1:03d}"


def _check_place(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path}: the folder is not empty; choose another with --out, or continue it with --resume")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; name a folder that does not exist yet with --out")


def _check_institution(scenario: Scenario, name: str, y: np.ndarray, unseen: bool, where: str) -> None:  # noqa: FBT001
    """Raise for what would only come to light after training, at the end of a long run."""
    institution = f"{where}: institution '{name}'"
    if len(name) > 200:  # noqa: PLR2004 - what a message's field may hold
        raise DataError(f"{where}: an institution's name has {len(name)} characters; shorten it to 200")
    if scenario.columns.regression:
        return
    check_two_classes(y, institution)
    positive = [k for k in scenario.evaluation.k if k > 0]
    if unseen and positive:
        few_shot_draw(
            y, k_min=positive[0], k_max=positive[-1], seed_parts=(), where=institution,
            min_positives=scenario.evaluation.min_positives,
        )  # fmt: skip


def _check_judged_numbers(scenario: Scenario, table: pl.DataFrame, y: np.ndarray, institution: str) -> None:
    """Raise where no draw can be made of an institution whose label is a number."""
    evaluation = scenario.evaluation
    # As `evaluation.run_episodes` has it: without labels to learn from, the draw is that of two of them.
    positive = [k for k in evaluation.k if k > 0] or [2]
    if evaluation.embargo is not None and evaluation.day is not None:
        few_shot_in_time(
            numbers_of(table, evaluation.day, institution), k_max=positive[-1], embargo=evaluation.embargo,
            least_judged=evaluation.least_judged, seed_parts=(), where=institution,
        )  # fmt: skip
        return
    # At random, both parts of a draw hold labels on either side of half a unit above the centre.
    high = int(np.count_nonzero(y > 0.5))  # noqa: PLR2004 - as `few_shot_draw` tells two classes apart
    if len(y) < positive[-1] + 2 or min(high, len(y) - high) < 2:  # noqa: PLR2004 - one in either part
        raise DataError(
            f"{institution}: {len(y)} records cannot be drawn at random for supports of up to {positive[-1]}: "
            f"that takes {positive[-1] + 2}, 2 or more above the label's centre + scale / 2 and 2 or more below"
        )


def numbers_of(table: pl.DataFrame, column: str, where: str) -> np.ndarray:
    """Return `(rows,)` of a column that no model sees; dates and times count in days.

    Raises:
        DataError: the column is missing, or holds something else in a row.

    """
    require_columns(table, (column,), where)
    values = table[column]
    if values.dtype.is_temporal():
        found = values.cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / _MICROSECONDS_A_DAY
    else:
        found = values.cast(pl.Float64, strict=False)
    if found.null_count() or not found.is_finite().all():
        raise DataError(f"{where}: column '{column}' must hold a number or a date in every row that is judged")
    return found.to_numpy()


def _check_categories(frame: pl.DataFrame, schema: Schema, where: str) -> None:
    """Refuse a categorical column of which nothing is known: its categories were misspelt, not met by nobody."""
    for column in schema.columns:
        if isinstance(column, CategoricalColumn):
            known = categories(frame, column, where).is_in(list(column.categories))
            if not known.any():
                raise DataError(
                    f"{where}: column '{column.name}' holds none of the schema's categories in any row; "
                    "write them as they stand in the table"
                )


def _check_limits(scenario: Scenario, sizes: Mapping[str, int]) -> None:
    largest = max(sizes, key=lambda name: sizes[name])
    outer = scenario.server
    if sizes[largest] > outer.max_declared_size:
        raise ConfigError(
            f"server.max_declared_size: {outer.max_declared_size} keeps out '{largest}' with {sizes[largest]} records"
        )
    if len(sizes) < outer.min_reports:
        raise ConfigError(f"server.min_reports: {outer.min_reports} can never come from {len(sizes)} institutions")
    limit = 1 / (10 * sizes[largest])
    if scenario.privacy.delta > limit:
        raise ConfigError(
            f"privacy.delta: {scenario.privacy.delta:g} is too large for '{largest}' with {sizes[largest]} records; "
            f"it may be at most 1 / (10 * records) = {limit:.2g}"
        )


def _write_bank(folder: Path, name: str, table: pl.DataFrame, scenario: Scenario, plan: Plan, budget: float) -> None:
    folder.mkdir(parents=True)
    table.write_parquet(folder / "data.parquet")
    lines = [
        f"name = {toml_text(name)}",
        'data = "data.parquet"',
        f"declared_size = {_size(table, plan.data)}",
        "",
        "[policy]",
        f"epsilon = {'inf' if math.isinf(budget) else repr(float(budget))}",
        f"delta = {scenario.privacy.delta!r}",
        f"min_noise_multiplier = {min(0.5, plan.mechanism.noise_multiplier)!r}",
    ]
    if scenario.seed is not None:
        lines += ["", "[simulation]   # reproducible noise: NOT PRIVATE", f"seed = {scenario.seed}"]
    (folder / CONFIG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    approve(folder, plan)


def _size(table: pl.DataFrame, schema: Schema) -> int:
    """Count what is protected: records, or privacy units where the schema names them."""
    return table.height if schema.privacy_unit is None else table[schema.privacy_unit].n_unique()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "bank"

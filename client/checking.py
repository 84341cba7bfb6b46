"""A bank's table held against a plan, before anything is approved. All of it is private and for the bank's eyes only.

Which rows are left out is asked of the very rule that an order is answered by (`table.usable_rows`), one column at a
time, so that what is told here is what would happen.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import polars as pl

from metarisk_common.errors import DataError, RefusedError
from metarisk_common.features import ColumnCounts, Encoder
from metarisk_common.initialisation import meta_shapes
from metarisk_common.plan import Plan
from metarisk_common.schema import NumericColumn, NumericLabel, Schema
from metarisk_common.table import check_repeats, check_two_classes, usable_rows

from .charges import charges_of
from .check_table import Found, Kinds, found_columns
from .config import Institution
from .ledger import Ledger
from .plain_words import Cost, Terms, cost_of, describe, until_text
from .policy import check_plan
from .sources import Filtered, source_batches
from .tally import Tally, tally

NO_NUMBER: Final = "is not a finite number"
REFUSED: Final = "is empty, which the plan refuses"
NO_OUTCOME: Final = "is neither of the two outcomes"
NO_KEY: Final = "is empty"

_FAR_OFF: Final = 1.25
_DELTA_SHARE: Final = 10
_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class Unfit:
    """Rows that would be left out because of one column; a row may be counted under several."""

    column: str
    why: str
    rows: int


@dataclass(frozen=True)
class SegmentCounts:
    """What is used of one segment. `units`: privacy units, which are the rows where the plan names no other."""

    segment: str
    rows: int
    units: int
    positives: int


@dataclass(frozen=True)
class Check:
    """What a plan would make of a table.

    Attributes:
        source_rows: where the table is read from; those that the bank's own filters remove are not in it.
        filtered: rows that each filtered column removes, where the filters are applied here and not in a database; a
            row may be counted under several.
        rows: in the table.
        unfit_rows: left out because a cell does not fit; `unfit` says which columns are to blame.
        over_limit_rows: left out because their privacy unit has too many, or has them in several segments.
        unlisted_rows: of the others, those in no segment that the plan lists; left out too where it learns by segment.
        used: rows that are learned from; `units` their privacy units, `positives` those with the outcome.
        found: where each column of the plan is read from, and what kind of cells are there.
        encoded: rows that fit and are within their privacy unit's limit; `columns` counts cells of these.
        columns: of those rows, what is missing, clipped or unknown.
        segments: a line for each that the plan lists; empty where it lists none.
        warnings: what should be looked at before approving.
        problems: why the table cannot be used as it is; empty if it can.

    """

    source_rows: int
    filtered: dict[str, int]
    rows: int
    unfit_rows: int
    unfit: tuple[Unfit, ...]
    over_limit_rows: int
    unlisted_rows: int
    used: int
    units: int
    positives: int
    found: dict[str, Found]
    encoded: int
    columns: dict[str, ColumnCounts]
    segments: tuple[SegmentCounts, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class PlanCheck:
    """What a plan would cost the bank, and whether its policy takes it.

    `standing`: what it is approved with already, if it is; `refusal`: why the policy does not take it, or empty.
    """

    cost: Cost
    standing: Terms | None
    refusal: str
    warnings: tuple[str, ...]


def check_data(
    institution: Institution, plan: Plan, *, strict: bool = False, on_rows: Callable[[int], None] | None = None
) -> Check:
    """Read the bank's table in batches and find what the plan would use of it.

    Args:
        institution: the bank's folder.
        plan: the plan.
        strict: raise for whatever does not fit, instead of counting it.
        on_rows: told now and then how many rows were read.

    Raises:
        DataError: the file cannot be read, a column is missing or of a kind that the plan cannot mean; with `strict`,
            any cell that does not fit and every problem too.

    """
    schema, where, filtered = plan.data, institution.table_title, Filtered()
    kinds = Kinds(schema)
    unfit: Counter[tuple[str, str]] = Counter()

    def count_unfit(frame: pl.DataFrame) -> None:
        unfit.update({(one.column, one.why): one.rows for one in _unfit(frame, schema, where)})

    batches = kinds.watched(source_batches(institution, schema, filtered))
    counted = tally(batches, schema, where, on_unfit=count_unfit, strict=strict, on_rows=on_rows)
    # What is learned from: the listed segments, and with whole institutions as tasks the last place too.
    learned = np.ones(len(counted.records), np.bool_)
    learned[-1] = not schema.segments or plan.inner.task != "segment"
    problems = tuple(_problems(counted, learned, schema, where))
    if strict and problems:
        raise DataError(problems[0])
    found = Check(
        source_rows=filtered.rows,
        filtered=dict(filtered.by_column),
        rows=counted.rows,
        unfit_rows=counted.rows - counted.fitting,
        unfit=tuple(Unfit(column, why, rows) for (column, why), rows in unfit.items()),
        over_limit_rows=counted.fitting - counted.encoded,
        unlisted_rows=int(counted.records[-1]) if schema.segments else 0,
        used=int(counted.records[learned].sum()),
        units=int(counted.units[learned].sum()),
        positives=int(counted.positives[learned].sum()),
        found=found_columns(institution, schema, kinds),
        encoded=counted.encoded,
        columns=counted.columns,
        segments=tuple(
            SegmentCounts(name, int(counted.records[at]), int(counted.units[at]), int(counted.positives[at]))
            for at, name in enumerate(schema.segments)
        ),
        warnings=(),
        problems=problems,
    )
    return replace(found, warnings=tuple(_warnings(found, institution, plan)))


def check_cost(institution: Institution, plan: Plan) -> PlanCheck:
    """Hold a plan against the bank's policy, its budget, and the cap that it is approved with, if it is.

    Raises:
        IntegrityError: the ledger is damaged.

    """
    cost, standing = plan_cost(institution, plan, None)
    if standing is not None and standing.cap is not None:
        cost, _ = plan_cost(institution, plan, standing.cap)
    try:
        check_plan(plan, institution.config)
        refusal = ""
    except RefusedError as error:
        refusal = str(error)
    size = sum(math.prod(shape) for shape in meta_shapes(plan, Encoder(plan.data).width).values())
    words = describe(plan, cost, size=size, terms=standing or Terms(), standing=standing)
    return PlanCheck(cost, standing, refusal, words.warnings)


def plan_cost(institution: Institution, plan: Plan, cap: float | None) -> tuple[Cost, Terms | None]:
    """Account for a whole run of a plan on top of the bank's ledger, if it has one, and tell its standing terms.

    Raises:
        IntegrityError: the ledger is damaged.

    """
    plan_hash, budget = plan.hash(), institution.budget
    if not institution.ledger_path.exists():
        return cost_of(plan, budget=budget, cap=cap, spent=(), under_plan=()), None
    with Ledger.read(institution.ledger_path) as ledger:
        charges, standing = charges_of(ledger.entries()), ledger.approvals().get(plan_hash)
    spent = [charge.event for charge in charges]
    under_plan = [charge.event for charge in charges if charge.key.plan_hash == plan_hash]
    cost = cost_of(plan, budget=budget, cap=cap, spent=spent, under_plan=under_plan)
    if standing is None:
        return cost, None
    return cost, Terms(standing.epsilon, None if standing.until_seconds is None else until_text(standing.until_seconds))


def _unfit(frame: pl.DataFrame, schema: Schema, where: str) -> Iterator[Unfit]:
    """Ask for one column at a time which rows it would leave out, all others being as they should."""
    fitting = schema.label.centre if isinstance(schema.label, NumericLabel) else str(schema.label.positive)
    outcome = pl.lit(fitting).alias(schema.label.name)
    bare = schema.model_copy(update={"columns": (), "identifier": None, "privacy_unit": None})

    def count(table: pl.DataFrame, update: dict[str, object]) -> int:
        return int((~usable_rows(table, bare.model_copy(update=update), where)).sum())

    found = [Unfit(schema.label.name, NO_NUMBER if schema.regression else NO_OUTCOME, count(frame, {}))]
    found += [
        Unfit(key, NO_KEY, count(frame.with_columns(outcome), {"identifier": key}))
        for key in dict.fromkeys(filter(None, (schema.identifier, schema.privacy_unit)))
    ]
    for column in schema.columns:
        if not isinstance(column, NumericColumn):
            continue  # Whatever is no category that the plan knows counts as "other".
        any_number = column.model_copy(update={"missing": "indicator"})
        for name in column.sources:
            single = any_number.model_copy(update={"source": name, "divide_by": None})
            found.append(Unfit(name, NO_NUMBER, count(frame.with_columns(outcome), {"columns": (single,)})))
        if column.missing == "refuse":
            table = frame.with_columns(outcome)
            absent = count(table, {"columns": (column,)}) - count(table, {"columns": (any_number,)})
            found.append(Unfit(column.name, REFUSED, absent))
    yield from dict.fromkeys(one for one in found if one.rows)


def _problems(counted: Tally, learned: np.ndarray, schema: Schema, where: str) -> Iterator[str]:
    """Say why a table cannot be used; `learned`: the segments whose rows would be, as in the tally."""
    used = learned & (counted.records > 0)
    if counted.rows == 0:
        yield f"{where}: holds no rows; export the table again with one row for each record"
    elif counted.fitting == 0:
        yield f"{where}: not one of its {counted.rows} rows fits the plan's schema; the columns at fault are counted"
    elif not used.any():
        yield f"{where}: none of its rows is of a segment that the plan lists; check column '{schema.segment}'"
    else:
        try:
            check_two_classes(np.concatenate([counted.lowest[used], counted.highest[used]]), where)
        except DataError as error:
            yield str(error)
    if schema.identifier is not None:
        try:
            check_repeats(counted.repeats, counted.fitting, schema.identifier, where)
        except DataError as error:
            yield str(error)


def _warnings(found: Check, institution: Institution, plan: Plan) -> Iterator[str]:
    size, delta = institution.config.declared_size, institution.config.policy.delta
    units = "records" if plan.data.privacy_unit is None else f"values of '{plan.data.privacy_unit}'"
    if found.source_rows > found.rows:
        by = ", ".join(f"{name} {rows:,}" for name, rows in found.filtered.items() if rows)
        yield (
            f"{found.source_rows - found.rows:,} of {found.source_rows:,} rows are removed by the filters in "
            f"institution.toml{by and f' ({by})'}"
        )
    if found.unfit_rows:
        yield (
            f"{found.unfit_rows:,} of {found.rows:,} rows do not fit and would be left out without a word to anybody; "
            "the columns at fault are listed"
        )
    if found.over_limit_rows:
        yield (
            f"{found.over_limit_rows:,} rows would be left out: the plan uses at most "
            f"{plan.data.max_records_per_unit} of each '{plan.data.privacy_unit}', all of one segment"
        )
    if found.unlisted_rows:
        what = "would be left out" if plan.inner.task == "segment" else "are learned from all the same"
        yield f"{found.unlisted_rows:,} rows are of no segment that the plan lists, and {what}"
    without = [one.segment for one in found.segments if one.positives in {0, one.rows}]
    if without and plan.inner.task == "segment":
        yield f"segments without records of both outcomes, to which little can be adapted: {', '.join(without)}"
    if found.units and max(size, found.units) > _FAR_OFF * min(size, found.units):
        yield (
            f"declared_size = {size:,} is far from the {found.units:,} {units} that would be used; declare a rounded "
            "number near to it that anybody may know, never the exact count"
        )
    if delta * _DELTA_SHARE * found.units > 1 + _ROUNDING:
        yield (
            f"policy.delta = {delta:g} is above 1 / (10 * {found.units:,}), too large for as many {units}: a larger "
            "declared_size needs a smaller delta, and a ledger keeps the delta that it was made with"
        )
    if institution.config.simulation is not None:
        yield "section 'simulation' seeds the noise: NOT PRIVATE, and refused outside simulations"

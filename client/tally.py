"""A table counted against a schema batch by batch, so that what is checked may be far larger than the memory.

Which records are used is told by the very rules that an order is answered by (`table.usable_rows`, `dataset.limited`).
Of a record nothing is kept; of each identifier and privacy unit a hash of 64 bits: among ten million, two different
ones have the same hash in about three tables of a million.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import polars as pl

from metarisk_common.features import ColumnCounts, Encoder
from metarisk_common.schema import Schema
from metarisk_common.table import check_table, labels, segments, units, usable_rows

_Whole = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Tally:
    """What a schema makes of a table.

    The last place of the arrays is for records in no segment that the schema lists; where it lists none, for all.

    Attributes:
        rows: in the table; `fitting` of them have cells that fit, and `encoded` of these are within their privacy
            unit's limit.
        columns: of the encoded rows, what is missing, clipped or unknown.
        repeats: records that fit and have an identifier that an earlier one has.
        records: (segments + 1,) int64, encoded rows.
        positives: (segments + 1,) int64, those of them with a label above one half.
        units: (segments + 1,) int64, their privacy units, or `records` where every record is one.
        lowest: (segments + 1,) float64, the lowest label, `inf` of none; `highest` likewise, `-inf` of none.

    """

    rows: int
    fitting: int
    encoded: int
    columns: dict[str, ColumnCounts]
    repeats: int
    records: _Whole
    positives: _Whole
    units: _Whole
    lowest: npt.NDArray[np.float64]
    highest: npt.NDArray[np.float64]


def tally(
    batches: Iterable[pl.DataFrame],
    schema: Schema,
    where: str,
    *,
    on_unfit: Callable[[pl.DataFrame], None],
    strict: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> Tally:
    """Count what a schema makes of a table's batches, each of which is let go before the next is read.

    Args:
        batches: the table, under the schema's names and in its order.
        schema: of the plan.
        where: opens the message of an error.
        on_unfit: called with each batch in which rows do not fit.
        strict: raise for a cell that does not fit.
        on_rows: told after each batch how many rows were read so far.

    Raises:
        DataError: a column is missing or of a kind that the schema cannot mean; with `strict`, a cell does not fit,
            and the message names the batch's rows where it is not the first.

    """
    # Repeated identifiers are asked for at the end, over all batches.
    single = schema.model_copy(update={"identifier": None})
    encoder, limit = Encoder(schema), _Limit(schema.max_records_per_unit)
    sums = _Sums(len(schema.segments) + 1)
    columns: dict[str, ColumnCounts] = {}
    identifiers: list[_Hashes] = []
    rows = fitting_rows = 0
    for frame in batches:
        place = where if rows == 0 else f"{where}, rows {rows + 1:,} to {rows + frame.height:,}"
        rows += frame.height
        if strict and frame.height:
            check_table(frame, single, place)
        fits = usable_rows(frame, schema, place)
        if not fits.all():
            on_unfit(frame)
        fitting = frame.filter(fits)
        fitting_rows += fitting.height
        if schema.identifier is not None:
            identifiers.append(units(fitting, schema.identifier, place).hash().to_numpy())
        new = np.ones(fitting.height, np.bool_)
        if schema.privacy_unit is not None:
            kept, first = limit.admit(*_owners(fitting, schema, place))
            fitting, new = fitting.filter(pl.Series(kept)), first[kept]
        _, counts = encoder.encode(fitting, place)
        columns = {name: _added(columns.get(name), found) for name, found in counts.columns.items()}
        sums.add(_listed(fitting, schema, place), labels(fitting, schema.label, place), new)
        if on_rows is not None:
            on_rows(rows)
    return Tally(
        rows=rows,
        fitting=fitting_rows,
        encoded=int(sums.records.sum()),
        columns=columns,
        repeats=_repeats(identifiers),
        records=sums.records,
        positives=sums.positives,
        units=sums.units,
        lowest=sums.lowest,
        highest=sums.highest,
    )


class _Sums:
    """Counts by segment."""

    def __init__(self, size: int) -> None:
        self.records, self.positives, self.units = (np.zeros(size, np.int64) for _ in range(3))
        self.lowest, self.highest = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, listed: _Whole, y: npt.NDArray[np.float32], new: npt.NDArray[np.bool_]) -> None:
        size = len(self.records)
        self.records += np.bincount(listed, minlength=size)
        self.positives += np.bincount(listed[y > 0.5], minlength=size)  # noqa: PLR2004 - halfway between the labels
        self.units += np.bincount(listed[new], minlength=size)
        np.minimum.at(self.lowest, listed, y)
        np.maximum.at(self.highest, listed, y)


@dataclass
class _Run:
    """Units in order of their hashes: the segment of each one's first record, and how many records were admitted."""

    unit: _Hashes
    segment: _Hashes
    admitted: _Whole


@dataclass
class _Limit:
    """The rule of `dataset.limited`, told batch after batch: of each unit the first `most` in its first one's segment.

    What is known of the units so far lies in sorted runs, each more than twice as long as the next (the runs of a
    log-structured merge tree), so that a unit is found in a few bisections and moved a few times in all.
    """

    most: int
    runs: list[_Run] = field(default_factory=list)

    def admit(self, unit: _Hashes, segment: _Hashes) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Tell of each record, in the table's order, whether it is used, and whether it is the first of its unit."""
        order = np.argsort(unit, kind="stable")
        keys, begins, group = np.unique(unit[order], return_index=True, return_inverse=True)
        home, before = segment[order][begins], np.zeros(len(keys), np.int64)
        new = np.ones(len(keys), np.bool_)
        known: list[tuple[_Run, _Whole, npt.NDArray[np.bool_]]] = []
        for run in self.runs:
            at = np.minimum(np.searchsorted(run.unit, keys), len(run.unit) - 1)
            hit = run.unit[at] == keys
            home[hit], before[hit], new[hit] = run.segment[at[hit]], run.admitted[at[hit]], False
            known.append((run, at, hit))
        same = segment[order] == home[group]
        earlier = np.cumsum(same) - same
        nth = before[group] + earlier - earlier[begins][group]
        used = same & (nth < self.most)
        admitted = before + np.bincount(group[used], minlength=len(keys))
        for run, at, hit in known:
            run.admitted[at[hit]] = admitted[hit]
        if new.any():
            self._remember(_Run(keys[new], home[new], admitted[new]))
        kept, first = np.empty(len(unit), np.bool_), np.zeros(len(unit), np.bool_)
        kept[order] = used
        first[order[begins[new]]] = True
        return kept, first

    def _remember(self, run: _Run) -> None:
        while self.runs and len(self.runs[-1].unit) <= 2 * len(run.unit):
            last = self.runs.pop()
            order = np.argsort(np.concatenate([last.unit, run.unit]), kind="stable")
            run = _Run(
                np.concatenate([last.unit, run.unit])[order],
                np.concatenate([last.segment, run.segment])[order],
                np.concatenate([last.admitted, run.admitted])[order],
            )
        self.runs.append(run)


def _owners(frame: pl.DataFrame, schema: Schema, where: str) -> tuple[_Hashes, _Hashes]:
    """Give hashes of whose each record is, and of the segment it lies in; without segments all lie in one."""
    unit = units(frame, schema.privacy_unit or "", where).hash().to_numpy()
    if schema.segment is None:
        return unit, np.zeros_like(unit)
    return unit, segments(frame, schema.segment, where).hash().to_numpy()


def _listed(frame: pl.DataFrame, schema: Schema, where: str) -> _Whole:
    """Give the place of each record's segment among those that the schema lists; the one after them is for the rest."""
    rest = len(schema.segments)
    if schema.segment is None or not rest:
        return np.full(frame.height, rest, np.int64)
    names = segments(frame, schema.segment, where)
    places = names.replace_strict(list(schema.segments), list(range(rest)), default=rest, return_dtype=pl.Int64)
    return places.to_numpy()


def _repeats(identifiers: list[_Hashes]) -> int:
    if not identifiers:
        return 0
    every = np.concatenate(identifiers)
    identifiers.clear()
    every.sort()
    return int(np.count_nonzero(every[1:] == every[:-1]))


def _added(one: ColumnCounts | None, other: ColumnCounts) -> ColumnCounts:
    if one is None:
        return other
    return ColumnCounts(**{part.name: getattr(one, part.name) + getattr(other, part.name) for part in fields(one)})

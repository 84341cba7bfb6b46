"""From the columns of a table to the inputs of a model, with public constants only.

Nothing here is fitted. Centres, spreads and variances follow from what the schema claims in public: that each
bin of a numeric column holds its declared share of records, spread evenly inside the bin, and that categories have
theirs. A wrong claim costs accuracy, never privacy: one record's inputs depend on that record alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl

from .errors import ConfigError
from .interactions import INTERACTIONS, RandomTrees, Splits
from .schema import CategoricalColumn, NumericColumn, Schema
from .table import categories, numbers, require_columns

DEFAULT_BINS: Final = 6
"""Bins of a numeric column that declares none."""

MISSING_SHARE: Final = 0.02
"""Public share of missing values in a column with an indicator."""

OTHER_SHARE: Final = 0.01
"""Smallest public share of a categorical column's `other`."""

MIN_VARIANCE: Final = 1e-3
"""An input is scaled as if its public variance were at least this: rare categories may not grow without bound."""

_MAX_DIGITS: Final = 17  # more do not tell two floats apart


@dataclass(frozen=True)
class ColumnCounts:
    """What the encoding met in one column: counts of cells, for the bank alone."""

    missing: int
    clipped_below: int = 0
    clipped_above: int = 0
    unknown_categories: int = 0


@dataclass(frozen=True)
class Counts:
    """What the encoding met in a table. Derived from private records: shown at the bank, never sent."""

    rows: int
    columns: dict[str, ColumnCounts]


class Encoder:
    """The public map from a record to model inputs.

    Each input is centred by its public mean and multiplied by its public variance (at least `MIN_VARIANCE`) to
    the power of `-variance_power`. A public constant then makes the expected squared norm of a row 1, the
    constant input `intercept` included. Last, a row with a larger norm is brought to norm 1 by shrinking
    everything but the intercept, which stays the same for every record.

    Where the schema asks for `interactions`, the leaves of public random trees stand between the columns' own inputs
    and the intercept. Both parts are bounded by themselves, by what is left of norm 1, in the schema's shares.

    Attributes:
        names: one for each input, for people; the last is "intercept".
        groups: the column that each input comes from, "interactions" for leaves, "intercept" for the last.
        width: number of inputs.
        second_moment: (width,) float64, the public expectation of each squared input; sums to 1.

    """

    def __init__(self, schema: Schema) -> None:
        """Derive every constant from `schema`.

        Raises:
            ConfigError: a column's bounds or bins can't be told apart in floating-point arithmetic, or there are
                too few columns for the trees of `interactions`.

        """
        encoding = schema.encoding
        self._columns = tuple(
            _Numeric(column, encoding.clip_standardised) if isinstance(column, NumericColumn) else _Categorical(column)
            for column in schema.columns
        )
        variance = np.concatenate([column.variance for column in self._columns])
        scale = np.maximum(variance, MIN_VARIANCE) ** -encoding.variance_power
        second_moment = variance * scale**2
        self._intercept = encoding.intercept
        self._trees, share, left_out = None, 0.0, frozenset[str]()
        if encoding.interactions is not None:
            share, left_out = encoding.interactions.share, frozenset(encoding.interactions.leave_out)
        self._split = [column for column in self._columns if column.name not in left_out]
        if encoding.interactions is not None:
            try:
                self._trees = RandomTrees([column.splits() for column in self._split], encoding.interactions)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        limit = math.sqrt(1 - encoding.intercept**2)
        self._limit, self._trees_limit = limit * math.sqrt(1 - share), limit * math.sqrt(share)
        shrink = self._limit / math.sqrt(float(second_moment.sum()))
        self._scale = scale * shrink
        names = [name for column in self._columns for name in column.names]
        groups = [column.name for column in self._columns for _ in column.names]
        moments = [second_moment * shrink**2]
        if self._trees is not None:
            names += self._trees.names
            groups += [INTERACTIONS] * len(self._trees.names)
            moments.append(self._trees.second_moment * self._trees_limit**2)
        self.names: tuple[str, ...] = (*names, "intercept")
        self.groups: tuple[str, ...] = (*groups, "intercept")
        self.width: int = len(self.names)
        self.second_moment = np.concatenate([*moments, [encoding.intercept**2]])

    def encode(self, frame: pl.DataFrame, where: str = "the table") -> tuple[np.ndarray, Counts]:
        """Encode every row; rows don't influence one another.

        Args:
            frame: the schema's input columns, others are ignored; the label isn't needed.
            where: opens the message of an error, usually the file's path.

        Returns:
            x: (rows, width) float32, finite, each row of norm at most 1 (to rounding); and counts for the bank.

        Raises:
            DataError: a column is missing or holds cells that don't fit the schema.

        """
        require_columns(frame, tuple(name for column in self._columns for name in column.sources), where)
        inputs = np.empty((self.width, frame.height), dtype=np.float32)
        squares = np.zeros(frame.height)
        counts: dict[str, ColumnCounts] = {}
        position = 0
        for column in self._columns:
            values, counts[column.name] = column.read(frame, where)
            for value, mean in zip(values, column.mean, strict=True):
                scaled = (value - mean) * self._scale[position]
                squares += scaled * scaled
                inputs[position] = scaled
                position += 1
        # The squares were summed input by input: a row's sum is rounded in the same way whatever rows stand by it.
        inputs[:position] *= self._limit / np.sqrt(np.maximum(squares, self._limit**2))
        if self._trees is not None:
            leaves = self._trees.encode([column.positions(frame, where) for column in self._split])
            inputs[position:-1] = leaves.T * np.float32(self._trees_limit)
        inputs[-1] = self._intercept
        return np.ascontiguousarray(inputs.T), Counts(frame.height, counts)


class _Numeric:
    """One standardised input, one for each bin, and one that says that the value is missing.

    The piecewise-linear inputs are equation 1 of Gorishniy et al. (2022), "On Embeddings for Numerical Features in
    Tabular Deep Learning": 0 below the bin, 1 above it, linear inside, here on the column's scale. Positions are
    computed on a range cut to [0, 1], which neither centre nor spread of the outcome depends on.
    """

    def __init__(self, column: NumericColumn, clip_standardised: float) -> None:
        self._column = column
        self._clip = clip_standardised
        self.name, self.sources = column.name, column.sources
        bins = len(column.bins) + 1 if column.bins else DEFAULT_BINS
        with np.errstate(all="ignore"):  # what overflows or collapses is reported below
            ends = self._transform(np.array([column.lower, column.upper]))
            self._origin, self._length = ends[0], ends[1] - ends[0]
            declared = (self._transform(np.array(column.bins)) - self._origin) / self._length
            self._edges = np.concatenate([[0.0], declared if column.bins else np.arange(1, bins) / bins, [1.0]])
            self._widths = np.diff(self._edges)
        if not (np.isfinite(self._length) and self._length > 0 and np.all(self._widths > 0)):
            raise ConfigError(
                f"column '{column.name}': bounds and bins can't be told apart on a {column.scale} scale; "
                "move the bins further apart, or the bounds nearer to one another",
            )
        low, high = self._edges[:-1], self._edges[1:]
        inside = np.array(column.shares or (1 / bins,) * bins)
        self._shares = inside = inside / inside.sum()
        self._centre = float(inside @ (low + high) / 2)
        self._spread = math.sqrt(float(inside @ (low**2 + low * high + high**2) / 3) - self._centre**2)
        above = 1 - np.cumsum(inside)
        mean, square = above + inside / 2, above + inside / 3
        self.mean = np.concatenate([[0.0], mean])
        self.variance = np.concatenate([[1.0], square - mean**2])
        self.names = (column.name, *(f"{column.name} > {edge}" for edge in self._edge_texts()))
        if column.missing == "indicator":
            self.names = (*self.names, f"{column.name} is missing")
            self.mean = np.append(self.mean, MISSING_SHARE)
            self.variance = np.append(self.variance, MISSING_SHARE * (1 - MISSING_SHARE))

    def read(self, frame: pl.DataFrame, where: str) -> tuple[Iterator[np.ndarray], ColumnCounts]:
        series = numbers(frame, self._column, where)
        absent = series.is_null().to_numpy()
        values = series.fill_null(self._column.lower).to_numpy()
        counts = ColumnCounts(
            missing=int(absent.sum()),
            clipped_below=int((values < self._column.lower).sum()),
            clipped_above=int((values > self._column.upper).sum()),
        )
        return self._inputs(np.clip(values, self._column.lower, self._column.upper), absent), counts

    def splits(self) -> Splits:
        declared = np.array(self._column.bins, dtype=np.float64)
        edges = declared if len(declared) else self._back(self._origin + self._length * self._edges[1:-1])
        return Splits(self.name, edges, self._shares, self._edge_texts()[1:])

    def positions(self, frame: pl.DataFrame, where: str) -> np.ndarray:
        """Each record's value within the bounds, (rows,); what is missing is at the lower one."""
        values = numbers(frame, self._column, where).fill_null(self._column.lower).to_numpy()
        return np.asarray(np.clip(values, self._column.lower, self._column.upper))

    def _inputs(self, values: np.ndarray, absent: np.ndarray) -> Iterator[np.ndarray]:
        place = (self._transform(values) - self._origin) / self._length
        standardised = np.clip((place - self._centre) / self._spread, -self._clip, self._clip)
        yield np.where(absent, self.mean[0], standardised)
        for low, width, mean in zip(self._edges, self._widths, self.mean[1:], strict=False):
            yield np.where(absent, mean, np.clip((place - low) / width, 0.0, 1.0))
        if self._column.missing == "indicator":
            yield absent.astype(np.float64)

    def _transform(self, values: np.ndarray) -> np.ndarray:
        scale = self._column.scale
        return np.log(values) if scale == "log" else np.log1p(values) if scale == "log1p" else values

    def _back(self, places: np.ndarray) -> np.ndarray:
        scale = self._column.scale
        return np.exp(places) if scale == "log" else np.expm1(places) if scale == "log1p" else places

    def _edge_texts(self) -> tuple[str, ...]:
        # The lower edge of each bin, in the column's own unit and in as few digits as keep them apart.
        column = self._column
        if column.bins:
            edges, digits = [column.lower, *column.bins], 15
        else:
            places = self._origin + self._length * self._edges[:-1]
            edges, digits = [float(edge) for edge in self._back(places)], 6
        while digits < _MAX_DIGITS and len({f"{edge:.{digits}g}" for edge in edges}) < len(edges):
            digits += 1
        return tuple(f"{edge:.{digits}g}" for edge in edges)


class _Categorical:
    """One input for each declared category and one for anything else: 1 where the record has it, else 0."""

    def __init__(self, column: CategoricalColumn) -> None:
        self._column = column
        self.name, self.sources = column.name, column.sources
        count = len(column.categories)
        declared = column.shares or (1 / count,) * count
        shares = np.array([*declared, max(1 - sum(declared), OTHER_SHARE)])
        self.mean = shares / shares.sum()
        self.variance = self.mean * (1 - self.mean)
        self.names = (*(f"{column.name} = {category}" for category in column.categories), f"{column.name} is other")

    def read(self, frame: pl.DataFrame, where: str) -> tuple[Iterator[np.ndarray], ColumnCounts]:
        text = categories(frame, self._column, where)
        other = len(self._column.categories)
        place = self._codes(text)
        missing = text.null_count()
        unknown = int((place == other).sum()) - missing
        inputs = ((place == category).astype(np.float64) for category in range(other + 1))
        return inputs, ColumnCounts(missing=missing, unknown_categories=unknown)

    def splits(self) -> Splits:
        texts = (*(str(category) for category in self._column.categories), "other")
        return Splits(self.name, np.empty(0), self.mean, texts)

    def positions(self, frame: pl.DataFrame, where: str) -> np.ndarray:
        """Each record's category, (rows,), its place in the public list; one more for any other."""
        return self._codes(categories(frame, self._column, where)).astype(np.float64)

    def _codes(self, text: pl.Series) -> np.ndarray:
        known = self._column.categories
        codes = text.replace_strict(list(known), list(range(len(known))), default=len(known), return_dtype=pl.Int64)
        return codes.fill_null(len(known)).to_numpy()

"""Bins and shares of a bank's columns as a charged release: what a schema needs and nobody has published.

A schema's constants are public. Where the world knows none, a bank may release them from its own records, once, and
pay: one noised count for every cell of a public grid over each column's public bounds, or for each public category.

Released is `counts + N(0, (z m sqrt(c))^2 I)` over the cells of all c columns, with noise multiplier z and at most m
records a privacy unit (m = 1 where the unit is a record). Sensitivity, under zero-out adjacency: a record adds one to
one cell of each column, so it moves the counts by at most sqrt(c) in Euclidean norm, and a unit, whose records may all
fall into the same cells, by at most m sqrt(c). That is one step of the Gaussian mechanism over all records, a
`gaussian_histograms` event (Dwork and Roth 2014, Theorem A.1). Quantiles and shares are read off the noised counts and
cost nothing more. Grid, bounds and categories never come from the records.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field

from metarisk_common.calibration import noise_multiplier_for
from metarisk_common.config import Frozen, toml_text
from metarisk_common.errors import ConfigError, DataError, RefusedError
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.schema import CategoricalColumn, Column, NumericColumn, Schema, canonical_hash
from metarisk_common.table import categories, numbers, usable_rows

from .approval import open_ledger
from .config import CONFIG_FILE, Institution
from .dataset import limited
from .ledger import OrderKey
from .rng import SecureRandom
from .sources import read_source

GRID: Final = 256
"""Cells of a numeric column's grid, even on the column's scale between its bounds."""

_DIGITS: Final = 3


class Request(Frozen):
    """What is asked of the records: public, and all that the release depends on besides them."""

    columns: tuple[Column, ...] = Field(min_length=1)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    privacy_unit: str | None = None
    max_records_per_unit: int = Field(default=1, ge=1)
    grid: int = Field(default=GRID, ge=4, le=100_000)

    @property
    def event(self) -> PrivacyEvent:
        """What answering costs."""
        return PrivacyEvent("gaussian_histograms", self.noise_multiplier, 1.0, 1)

    @property
    def std(self) -> float:
        """Standard deviation of every cell's noise."""
        return self.noise_multiplier * self.max_records_per_unit * math.sqrt(len(self.columns))


@dataclass(frozen=True)
class Constants:
    """Noised counts by column, (cells,) float64: a grid's, or the categories' in their order and one of all others.

    `epsilon`: what the ledger has spent in all, with this release. `repeated`: the stored release was given again.
    """

    counts: dict[str, npt.NDArray[np.float64]]
    std: float
    epsilon: float
    repeated: bool


def request_for(schema: Schema, names: tuple[str, ...], *, epsilon: float, delta: float, grid: int = GRID) -> Request:
    """Build the request that spends `epsilon` by itself.

    Raises:
        ConfigError: a name is not of the schema, or epsilon cannot be spent.

    """
    known = {column.name: column for column in schema.columns}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--column {unknown[0]}: the schema has no such column; it has: {', '.join(known)}")
    if not 0 < epsilon < math.inf:
        raise ConfigError("--epsilon: must be a finite number above 0")
    chosen = tuple(known[name] for name in dict.fromkeys(names)) or schema.columns
    noise = noise_multiplier_for(epsilon, delta, sample_rate=1.0, steps=1)
    return Request(
        columns=chosen,
        noise_multiplier=noise,
        privacy_unit=schema.privacy_unit,
        max_records_per_unit=schema.max_records_per_unit,
        grid=grid,
    )


def release(institution: Institution, schema: Schema, request: Request) -> Constants:
    """Charge the bank's ledger, then count with noise; what was released before under this request is given again.

    Rows whose cells in these columns do not fit count as zero, and of a unit with too many records the first ones.

    Raises:
        RefusedError: the bank's policy wants more noise.
        BudgetExhaustedError: it would pass the budget; nothing was read.
        DataError: the table lacks a column, or cannot be read; the reservation stays charged.
        IntegrityError: the ledger is damaged.

    """
    least = institution.config.policy.min_noise_multiplier
    if request.noise_multiplier < least:
        raise RefusedError(
            f"{institution.folder / CONFIG_FILE}: policy.min_noise_multiplier is {least:g}, and this release would "
            f"have {request.noise_multiplier:g}; ask for a smaller --epsilon",
            code="noise",
        )
    digest = canonical_hash(request)
    key = OrderKey(f"constants-{digest[:32]}", 1, digest, hashlib.sha256(digest.encode()).hexdigest(), "constants")
    with open_ledger(institution) as ledger:
        ledger.approve(digest)
        stored = ledger.released_report(key)
        if stored is None:
            reservation = ledger.reserve(key, request.event)
            try:
                counts = noised_counts(_records(institution, schema, request), request, _noise(institution, digest))
            except DataError:
                ledger.abandon(reservation)
                raise
            content = {name: count.tolist() for name, count in counts.items()}
            ledger.release(reservation, json.dumps(content).encode())
        else:
            counts = {name: np.array(count) for name, count in json.loads(stored).items()}
        return Constants(counts, request.std, ledger.spent(), stored is not None)


def noised_counts(
    frame: pl.DataFrame, request: Request, rng: SecureRandom, where: str = "the table"
) -> dict[str, npt.NDArray[np.float64]]:
    """Count a table's records by cell of each column, with noise; the module says what that releases."""
    return {
        column.name: (count := _counts(frame, column, request.grid, where)) + rng.normal(count.shape, request.std)
        for column in request.columns
    }


def toml_lines(schema: Schema, found: Constants, *, bins: int) -> str:
    """Write what was found as lines of a schema: edges between which about as many records lie, and shares."""
    lines = []
    for column in schema.columns:
        if column.name not in found.counts:
            continue
        count = found.counts[column.name]
        head = f"[[schema.columns]]\nkind = {toml_text(column.kind)}\nname = {toml_text(column.name)}\n"
        if isinstance(column, NumericColumn):
            edges, shares = quantile_bins(column, count, bins)
            bounds = f"lower = {column.lower!r}\nupper = {column.upper!r}\nscale = {toml_text(column.scale)}\n"
            lines.append(f"{head}{bounds}bins = {_numbers(edges)}\nshares = {_numbers(shares)}\n")
        else:
            shares = category_shares(count)
            names = ", ".join(toml_text(category) for category in column.categories)
            lines.append(f"{head}categories = [{names}]\nshares = {_numbers(shares)}\n")
    return "\n".join(lines)


def quantile_bins(
    column: NumericColumn, counts: npt.NDArray[np.float64], bins: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read bins off noised counts: edges inside the bounds, rounded, and the share of records in each bin.

    Fewer bins where values stand so close together that edges would coincide.
    """
    positive = np.maximum(counts, 0.0)
    places = np.linspace(0.0, 1.0, len(counts) + 1)
    total = np.concatenate([[0.0], np.cumsum(positive)])
    if not total[-1]:
        return (), ()
    share = total / total[-1]
    wanted = np.interp(np.arange(1, bins) / bins, share, places)
    values = [_rounded(float(value)) for value in _back(column, wanted)]
    edges = tuple(sorted({value for value in values if column.lower < value < column.upper}))
    if not edges:
        return (), ()
    at = np.interp(_place(column, np.array(edges)), places, share)
    shares = np.clip(np.diff(np.concatenate([[0.0], at, [1.0]])), 1e-3, 1.0)
    return edges, tuple(round(float(value), 4) for value in shares / shares.sum())


def category_shares(counts: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Read the categories' shares off noised counts, that of all others left out; each is above 0, together below 1."""
    positive = np.maximum(counts, max(1e-3 * counts.sum(), 1e-9))
    share = positive / positive.sum()
    return tuple(math.floor(float(value) * 1e4) / 1e4 or 1e-4 for value in share[:-1])


def _records(institution: Institution, schema: Schema, request: Request) -> pl.DataFrame:
    where = institution.table_title
    frame = read_source(institution, schema)
    # One row's own cells decide about it, never how many there are: nothing here may fail for what one record holds.
    numeric = tuple(column for column in request.columns if isinstance(column, NumericColumn))
    frame = frame.filter(usable_rows(frame, schema.model_copy(update={"columns": numeric, "identifier": None}), where))
    if request.privacy_unit is not None:
        frame, _ = limited(frame, schema, request.privacy_unit, where)
    return frame


def _counts(frame: pl.DataFrame, column: Column, grid: int, where: str) -> npt.NDArray[np.float64]:
    if isinstance(column, CategoricalColumn):
        known = list(column.categories)
        text = categories(frame, column, where)
        codes = text.replace_strict(known, list(range(len(known))), default=len(known), return_dtype=pl.Int64)
        return np.bincount(codes.fill_null(len(known)).to_numpy(), minlength=len(known) + 1).astype(np.float64)
    values = numbers(frame, column, where).drop_nulls().to_numpy()
    place = _place(column, np.clip(values, column.lower, column.upper))
    cell = np.minimum((place * grid).astype(np.int64), grid - 1)
    return np.bincount(cell, minlength=grid).astype(np.float64)


def _noise(institution: Institution, digest: str) -> SecureRandom:
    simulation = institution.config.simulation
    if simulation is None:
        return SecureRandom.from_system()
    return SecureRandom.seeded(simulation.seed, institution.config.name, digest, "constants")


def _transformed(column: NumericColumn, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(
        np.log(values) if column.scale == "log" else np.log1p(values) if column.scale == "log1p" else values
    )


def _place(column: NumericColumn, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return where values lie between the bounds on the column's scale, 0 to 1."""
    low, high = _transformed(column, np.array([column.lower, column.upper]))
    return np.asarray((_transformed(column, values) - low) / (high - low))


def _back(column: NumericColumn, places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = _transformed(column, np.array([column.lower, column.upper]))
    values = low + places * (high - low)
    return np.asarray(
        np.exp(values) if column.scale == "log" else np.expm1(values) if column.scale == "log1p" else values
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _numbers(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:.15g}' for value in values)}]"

"""What the schema claims about records, as a sample of model inputs: for every expectation that must be public.

Each column is drawn as the schema says that it is spread: a numeric one by its bins' shares and evenly, on its scale,
inside a bin; a categorical one by its categories' shares; missing values with their public share. Columns are drawn
independently, for the schema says nothing of how they go together. No record of any bank is read.
"""

from typing import Final

import numpy as np
import polars as pl

from .features import MISSING_SHARE, OTHER_SHARE, Encoder
from .schema import CategoricalColumn, NumericColumn, Schema

_SEED: Final = 20
_NO_CATEGORY: Final = "\0 none of them"


def public_inputs(schema: Schema, rows: int) -> np.ndarray:
    """Draw model inputs as the schema claims them, always the same ones.

    They go through the very encoder that the banks use: bins, centring, scaling and the bound on a row's norm included.

    Returns:
        (rows, width) float64.

    """
    random = np.random.default_rng(_SEED)
    # Columns may share a source or be divided by another: what is claimed is claimed of the outcome.
    plain: list[NumericColumn | CategoricalColumn] = []
    drawn: dict[str, pl.Series] = {}
    for column in schema.columns:
        if isinstance(column, NumericColumn):
            plain.append(column.model_copy(update={"source": None, "divide_by": None}))
            drawn[column.name] = pl.Series(_numbers(column, rows, random), nan_to_null=True)
        else:
            plain.append(column)
            drawn[column.name] = pl.Series(_categories(column, rows, random))
    encoder = Encoder(schema.model_copy(update={"columns": tuple(plain)}))
    x, _ = encoder.encode(pl.DataFrame(drawn), "the public sample")
    return x.astype(np.float64)


def _numbers(column: NumericColumn, rows: int, random: np.random.Generator) -> np.ndarray:
    """Values of a numeric column, (rows,); NaN where one is missing."""
    edges = _scaled(column, np.array([column.lower, *column.bins, column.upper]))
    bins = len(edges) - 1
    shares = np.array(column.shares or (1 / bins,) * bins)
    chosen = random.choice(bins, size=rows, p=shares / shares.sum())
    places = edges[chosen] + (edges[chosen + 1] - edges[chosen]) * random.random(rows)
    values: np.ndarray = np.clip(_unscaled(column, places), column.lower, column.upper)
    if column.missing == "indicator":
        values = np.where(random.random(rows) < MISSING_SHARE, np.nan, values)
    return values


def _categories(column: CategoricalColumn, rows: int, random: np.random.Generator) -> np.ndarray:
    count = len(column.categories)
    declared = column.shares or (1 / count,) * count
    shares = np.array([*declared, max(1 - sum(declared), OTHER_SHARE)])
    names: np.ndarray = np.array([*column.categories, _NO_CATEGORY], dtype=object)
    return np.take(names, random.choice(count + 1, size=rows, p=shares / shares.sum()))


def _scaled(column: NumericColumn, values: np.ndarray) -> np.ndarray:
    return np.log(values) if column.scale == "log" else np.log1p(values) if column.scale == "log1p" else values


def _unscaled(column: NumericColumn, places: np.ndarray) -> np.ndarray:
    return np.exp(places) if column.scale == "log" else np.expm1(places) if column.scale == "log1p" else places

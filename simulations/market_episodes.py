"""The rivals of a volatility forecast: what traders have without a federation, judged on the same days.

Forecasts are of the logarithm of variance, in the label's standardised units; what a rival forecasts of variance itself
is brought to the same target by one constant (`markets.LOG_OF_MEAN`).

For QLIKE all methods alike are retransformed by half the variance of their residuals (`volatility_metrics`), on records
before the judged days alone. What was learned from desks takes its residuals on the desks' records, at the
start that is not adapted: the k residuals of a support are too few, and those of the fit itself. A regression on the
k days alone has no others, and takes the pooled one's. What knows an asset's whole past has its residuals there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from metarisk_common.evaluation import EvaluationSet, Method, Predictor, Wrapped
from metarisk_common.schema import NumericLabel
from metarisk_common.volatility_metrics import half_variance

from .markets import HALF_VARIANCE, OWN_MEAN

Matrix = npt.NDArray[Any]

_FORECASTS: Final = {"har_all": "Own HAR, all past", "ewma": "EWMA, own past", "garch": "GARCH(1,1), own past"}


def forecasts_in(frame: pl.DataFrame) -> tuple[str, ...]:
    """Return the rivals whose forecasts a table holds as columns of their own."""
    return tuple(name for name in _FORECASTS if name in frame.columns)


def with_forecasts(
    sets: Sequence[EvaluationSet], frame: pl.DataFrame, institution: str, label: NumericLabel
) -> list[EvaluationSet]:
    """Append the rivals' forecasts to `raw`, in the label's standardised units, in the order of `forecasts_in`.

    After them come what retransforms each, where the table says so, in the same order and units. The asset's own past
    mean, where the table has it, becomes the yardstick's "own_reference".

    Args:
        sets: of the table, by institution.
        frame: the table.
        institution: its column of institutions.
        label: the number that is forecast.

    """
    names, found = forecasts_in(frame), []
    spreads = [f"{name}{HALF_VARIANCE}" for name in names if f"{name}{HALF_VARIANCE}" in frame.columns]
    tables = {name: part for (name,), part in frame.group_by(institution, maintain_order=True)}
    for item in sets:
        table = tables[item.institution]
        forecasts = [(_column_of(table, name) - label.centre) / label.scale for name in names]
        raw = np.column_stack([item.raw, *forecasts, *(_column_of(table, name) / label.scale for name in spreads)])
        extra = dict(item.extra)
        if OWN_MEAN in table.columns:
            extra["own_reference"] = (_column_of(table, OWN_MEAN) - label.centre) / label.scale
        found.append(replace(item, raw=raw, extra=extra))
    return found


def _column_of(table: pl.DataFrame, name: str) -> Matrix:
    return table[name].cast(pl.Float64).to_numpy()


@dataclass(frozen=True)
class LocalHAR:
    """The heterogeneous autoregression by least squares on the k days alone (Corsi 2009, equation 7, in logarithms).

    `inputs`: how many columns of `raw` look back; those after them are rivals' forecasts.
    """

    inputs: int
    name: ClassVar[str] = "local-har"
    needs_support: ClassVar[bool] = True

    def fit(self, _x: Matrix, raw: Matrix, y: Matrix) -> Predictor:
        """Fit on `raw: (k, columns)`."""
        return _linear(raw[:, : self.inputs], y)


@dataclass(frozen=True)
class Fixed:
    """A forecast that no labels change. `retransform`: the column of `raw` that retransforms it, where there is one."""

    name: str
    predictor: Predictor
    retransform: int | None = None
    needs_support: ClassVar[bool] = False

    def fit(self, _x: Matrix, _raw: Matrix, _y: Matrix) -> Predictor:
        """Return the one predictor."""
        return self.predictor


def rivals(raw: Matrix, y: Matrix, forecasts: Sequence[str]) -> list[tuple[Method, str, str]]:
    """Return the field's rivals with their titles and kinds.

    Args:
        raw: (rows, columns) inputs of what the desks learned from.
        y: (rows,) standardised targets.
        forecasts: of the judged table, from `forecasts_in`.

    """
    width = raw.shape[1]
    own: list[tuple[Method, str, str]] = [
        (
            Fixed(f"local-{name}", partial(_column, width + place), width + len(forecasts) + place),
            _FORECASTS[name],
            "local",
        )
        for place, name in enumerate(forecasts)
    ]
    return [
        (LocalHAR(width), "Own HAR, k days", "local"),
        *own,
        (Fixed("pooled-har", _linear(raw, y)), "Pooled HAR", "pooled"),
    ]


class Learned(NamedTuple):
    """The records that desks learned from: `x: (rows, width)`, `raw: (rows, columns)` and targets `y: (rows,)`."""

    x: Matrix
    raw: Matrix
    y: Matrix


@dataclass(frozen=True)
class Retransformed(Wrapped):
    """A method whose forecasts say how far they lie below the logarithm of the variance; see the module."""

    below: float

    def fit(self, x: Matrix, raw: Matrix, y: Matrix) -> Predictor:
        """Fit the method; the predictor gives (rows, 2): forecasts, and the one distance."""
        return partial(_beside, self.method.fit(x, raw, y), self.below)


def retransformed(methods: Sequence[Method], learned: Learned, scale: float) -> list[Method]:
    """Return the methods with the retransformation that QLIKE asks for, in their order.

    Args:
        methods: of `rivals`, and initializations, which give (rows,) forecasts.
        learned: records before the judged days.
        scale: one standardised unit in log-variance.

    """
    pooled = next((_below(method, learned, scale) for method in methods if method.name == "pooled-har"), 0.0)
    found: list[Method] = []
    for method in methods:
        if isinstance(method, Fixed):
            # One and the same predictor at every k, so that its scores need no second look.
            beside = (
                partial(_with_column, method.predictor, method.retransform, pooled)
                if method.retransform is not None
                else partial(_beside, method.predictor, _below(method, learned, scale))
            )
            found.append(Fixed(method.name, beside))
        else:
            found.append(Retransformed(method, pooled if method.needs_support else _below(method, learned, scale)))
    return found


def _below(method: Method, learned: Learned, scale: float) -> float:
    """Return half the residual variance of a method that has seen no support, in standardised units."""
    start = method.fit(learned.x[:0], learned.raw[:0], learned.y[:0])
    return half_variance(learned.y * scale, start(learned.x, learned.raw) * scale) / scale


def _beside(predictor: Predictor, below: float, x: Matrix, raw: Matrix) -> Matrix:
    forecasts = predictor(x, raw)
    return np.column_stack([forecasts, np.full(len(forecasts), below)])


def _with_column(predictor: Predictor, place: int, otherwise: float, x: Matrix, raw: Matrix) -> Matrix:
    # A run that was made before tables had such columns can still be judged.
    below = raw[:, place] if place < raw.shape[1] else np.full(len(raw), otherwise)
    return np.column_stack([predictor(x, raw), below])


def _linear(inputs: Matrix, y: Matrix) -> Predictor:
    """Least squares with a constant; where there are more columns than days, the solution of least norm.

    A forecast beyond all targets that it was estimated on gives way to their mean, as traders have it: the "insanity
    filter" (Bollerslev, Patton and Quaedvlieg 2016, "Exploiting the Errors", section 3.2). Without it a regression on
    20 days is worse than any, for inputs far from those days.
    """
    target = np.asarray(y, np.float64)
    weights, *_ = np.linalg.lstsq(_with_constant(inputs), target, rcond=None)
    width, low, high, mean = inputs.shape[1], target.min(), target.max(), target.mean()

    def predict(_x: Matrix, raw: Matrix) -> Matrix:
        forecasts = _with_constant(raw[:, :width]) @ weights
        return np.asarray(np.where((forecasts < low) | (forecasts > high), mean, forecasts))

    return predict


def _with_constant(inputs: Matrix) -> Matrix:
    return np.column_stack([np.ones(len(inputs)), inputs])


def _column(place: int, _x: Matrix, raw: Matrix) -> Matrix:
    return np.asarray(raw[:, place])

"""The rivals of a volatility forecast: what traders have without a federation, judged on the same days.

Forecasts are of the logarithm of variance, in the label's standardised units; what a rival forecasts of variance itself
is brought to the same target by one constant (`markets.LOG_OF_MEAN`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import polars as pl

from metarisk_common.evaluation import EvaluationSet, Method, Predictor
from metarisk_common.schema import NumericLabel

Matrix = npt.NDArray[Any]

_FORECASTS: Final = {"ewma": "EWMA, own past", "garch": "GARCH(1,1), own past"}


def forecasts_in(frame: pl.DataFrame) -> tuple[str, ...]:
    """Return the rivals whose forecasts a table holds as columns of their own."""
    return tuple(name for name in _FORECASTS if name in frame.columns)


def with_forecasts(
    sets: Sequence[EvaluationSet], frame: pl.DataFrame, institution: str, label: NumericLabel
) -> list[EvaluationSet]:
    """Append the rivals' forecasts to `raw`, in the label's standardised units, in the order of `forecasts_in`.

    Args:
        sets: of the table, by institution.
        frame: the table.
        institution: its column of institutions.
        label: the number that is forecast.

    """
    names, found = forecasts_in(frame), []
    tables = {name: part for (name,), part in frame.group_by(institution, maintain_order=True)}
    for item in sets:
        values = tables[item.institution].select(pl.col(names).cast(pl.Float64)).to_numpy()
        found.append(replace(item, raw=np.column_stack([item.raw, (values - label.centre) / label.scale])))
    return found


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
    """A forecast that no labels change."""

    name: str
    predictor: Predictor
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
        (Fixed(f"local-{name}", _column(width + place)), _FORECASTS[name], "local")
        for place, name in enumerate(forecasts)
    ]
    return [(LocalHAR(width), "Own HAR", "local"), *own, (Fixed("pooled-har", _linear(raw, y)), "Pooled HAR", "pooled")]


def _linear(inputs: Matrix, y: Matrix) -> Predictor:
    """Least squares with a constant; where there are more columns than days, the solution of least norm."""
    weights, *_ = np.linalg.lstsq(_with_constant(inputs), np.asarray(y, np.float64), rcond=None)
    width = inputs.shape[1]

    def predict(_x: Matrix, raw: Matrix) -> Matrix:
        return np.asarray(_with_constant(raw[:, :width]) @ weights)

    return predict


def _with_constant(inputs: Matrix) -> Matrix:
    return np.column_stack([np.ones(len(inputs)), inputs])


def _column(place: int) -> Predictor:
    def predict(_x: Matrix, raw: Matrix) -> Matrix:
        return np.asarray(raw[:, place])

    return predict

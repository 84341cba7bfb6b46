"""What the shared initialization is measured against, and the initialization itself, as methods of `evaluation`.

Local methods have an institution's k labels and nothing else; pooled ones have every training institution's records in
one place, which nobody may have. All of them get their inputs without bins (`raw_matrix`), in the form that suits them,
and constants chosen once for the best mean AUC on training lenders of the loans, so that none is a man of straw.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple

import lightgbm
import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from metarisk_common.adaptation import DEFAULT_TAU2
from metarisk_common.adapters import predict
from metarisk_common.evaluation import Predictor, Wrapped
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec
from metarisk_common.prior_correction import adapt_selected, corrected, offset
from metarisk_common.schema import CategoricalColumn, NumericColumn, Schema
from metarisk_common.table import categories, numbers, require_columns

Matrix = npt.NDArray[Any]

_REPEATABLE: Final[dict[str, Any]] = {
    "objective": "binary",
    "seed": 0,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
_LOCAL_TREES: Final[dict[str, Any]] = _REPEATABLE | {
    "num_leaves": 3,
    "min_data_in_leaf": 3,
    "min_data_in_bin": 1,
    "feature_pre_filter": False,
    "max_bin": 31,
    "learning_rate": 0.1,
    "feature_fraction": 0.3,
    "lambda_l2": 1.0,
}
_POOLED_TREES: Final[dict[str, Any]] = _REPEATABLE | {
    "num_leaves": 15,
    "min_data_in_leaf": 100,
    "learning_rate": 0.05,
    "feature_fraction": 0.5,
}


class RawMatrix(NamedTuple):
    """Inputs without bins: `values: (rows, columns) float64`, the columns' names, and which are 0/1 of a category."""

    values: Matrix
    names: tuple[str, ...]
    categorical: npt.NDArray[np.bool_]


def raw_matrix(frame: pl.DataFrame, schema: Schema, where: str = "the table") -> RawMatrix:
    """Build the baselines' inputs from the schema's columns.

    Numbers are clipped to the public bounds and put on the schema's scale, NaN where missing. Categories become one 0/1
    column each and one for anything else.

    Raises:
        DataError: a column is missing or holds cells that do not fit the schema.

    """
    require_columns(frame, tuple(name for column in schema.columns for name in column.sources), where)
    values: list[Matrix] = []
    names: list[str] = []
    categorical: list[bool] = []
    for column in schema.columns:
        if isinstance(column, NumericColumn):
            values.append(_number(frame, column, where))
            names.append(column.name)
            categorical.append(False)
            continue
        codes = _codes(frame, column, where)
        labels = [*column.categories, "other"]
        values.extend((codes == code).astype(np.float64) for code in range(len(labels)))
        names.extend(f"{column.name} = {label}" for label in labels)
        categorical.extend([True] * len(labels))
    return RawMatrix(np.column_stack(values), tuple(names), np.array(categorical))


@dataclass(frozen=True)
class LocalLogistic:
    """Logistic regression on the k labels alone, on inputs standardised over those k records.

    `inverse_penalty` is scikit-learn's C.
    """

    inverse_penalty: float = 0.01
    name: ClassVar[str] = "local-logistic"
    needs_support: ClassVar[bool] = True

    def fit(self, _x: Matrix, raw: Matrix, y: Matrix) -> Predictor:
        """Fit on `raw: (k, columns)`, both outcomes among the labels."""
        return _logistic(raw, y, self.inverse_penalty)


@dataclass(frozen=True)
class LocalLogisticBinned:
    """Logistic regression on the k labels alone, on the encoded inputs that the federated model has."""

    inverse_penalty: float = 1.0
    name: ClassVar[str] = "local-logistic-binned"
    needs_support: ClassVar[bool] = True

    def fit(self, x: Matrix, _raw: Matrix, y: Matrix) -> Predictor:
        """Fit on `x: (k, width)`, both outcomes among the labels."""
        model = LogisticRegression(C=self.inverse_penalty, max_iter=1000).fit(x.astype(np.float64), y)
        return partial(_scorecard, model.coef_[0], float(model.intercept_[0]))


@dataclass(frozen=True)
class LocalLightGBM:
    """Gradient-boosted stumps and three-leaf trees on the k labels alone."""

    trees: int = 50
    name: ClassVar[str] = "local-lightgbm"
    needs_support: ClassVar[bool] = True

    def fit(self, _x: Matrix, raw: Matrix, y: Matrix) -> Predictor:
        """Fit on `raw: (k, columns)`."""
        return _boosted(raw, y, _LOCAL_TREES, self.trees)


@dataclass(frozen=True)
class Pooled:
    """A model of all training institutions' records; it ignores an institution's own labels."""

    name: str
    predictor: Predictor
    needs_support: ClassVar[bool] = False

    def fit(self, _x: Matrix, _raw: Matrix, _y: Matrix) -> Predictor:
        """Return the one predictor."""
        return self.predictor


def pooled_logistic(raw: Matrix, y: Matrix, *, inverse_penalty: float = 1.0) -> Pooled:
    """Fit "pooled-logistic" on all training institutions' `raw: (rows, columns)`, without privacy."""
    return Pooled("pooled-logistic", _logistic(raw, y, inverse_penalty))


def pooled_lightgbm(raw: Matrix, y: Matrix, *, trees: int = 200) -> Pooled:
    """Fit "pooled-lightgbm", the oracle that no bank may have, on all training institutions' `raw: (rows, columns)`."""
    return Pooled("pooled-lightgbm", _boosted(raw, y, _POOLED_TREES, trees))


@dataclass(frozen=True)
class ModelInitialization:
    """Parameters learned from the training institutions, adapted to the k labels; k = 0 is the parameters themselves.

    `method`, `prior_variance` and `prior` as in `adapters.adapt_params`; `base_rate`: the share of positives that the
    labels stand for where theirs is another, None where they are a plain sample.
    """

    name: str
    spec: ModelSpec
    params: Params
    method: str = "auto"
    prior_variance: float = DEFAULT_TAU2
    prior: Matrix | None = None
    base_rate: float | None = None
    needs_support: ClassVar[bool] = False

    def fit(self, x: Matrix, _raw: Matrix, y: Matrix) -> Predictor:
        """Adapt to `x: (k, width)`."""
        adapted = adapt_selected(
            self.spec,
            self.params,
            x,
            y,
            by=_offset(y, self.base_rate),
            method=self.method,
            prior_variance=self.prior_variance,
            prior=self.prior,
        )
        return partial(_predict, self.spec, adapted.params)


@dataclass(frozen=True)
class Corrected(Wrapped):
    """A local method whose labels were selected: its probabilities are moved to the base rate, which ranks nothing."""

    base_rate: float

    def fit(self, x: Matrix, raw: Matrix, y: Matrix) -> Predictor:
        """Fit the method, and take out of its log odds what the selection has put there."""
        predictor, by = self.method.fit(x, raw, y), _offset(y, self.base_rate)

        def predict(x: Matrix, raw: Matrix) -> Matrix:
            return corrected(predictor(x, raw), by)

        return predict


def _offset(y: Matrix, base_rate: float | None) -> float:
    share = float(np.mean(y)) if len(y) else 0.0
    # Labels of one outcome say nothing of how they were selected.
    return 0.0 if base_rate is None or not 0 < share < 1 else offset(share, base_rate)


def _predict(spec: ModelSpec, params: Params, x: Matrix, _raw: Matrix) -> Matrix:
    return predict(spec, params, x)


def _scorecard(weights: Matrix, intercept: float, x: Matrix, _raw: Matrix) -> Matrix:
    return np.asarray(expit(x.astype(np.float64) @ weights + intercept))


def _logistic(raw: Matrix, y: Matrix, inverse_penalty: float) -> Predictor:
    # What is missing, and what does not vary here, takes the mean: it then says nothing.
    known = ~np.isnan(raw)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, raw, 0.0).sum(axis=0) / count
    deviation = np.sqrt(np.square(np.where(known, raw - mean, 0.0)).sum(axis=0) / count)
    scale = np.where(deviation > 0, deviation, np.inf)
    model = LogisticRegression(C=inverse_penalty, max_iter=1000).fit(_standardise(raw, mean, scale), y)
    coefficients, intercept = model.coef_[0], float(model.intercept_[0])

    def predict(_x: Matrix, raw: Matrix) -> Matrix:
        return np.asarray(expit(_standardise(raw, mean, scale) @ coefficients + intercept))

    return predict


def _standardise(raw: Matrix, mean: Matrix, scale: Matrix) -> Matrix:
    return np.nan_to_num((raw - mean) / scale, copy=False)


def _boosted(raw: Matrix, y: Matrix, params: dict[str, Any], trees: int) -> Predictor:
    # The Booster itself: scikit-learn's wrapper costs more than a fit on a handful of labels.
    booster = lightgbm.train(params, lightgbm.Dataset(raw, y), num_boost_round=trees)

    def predict(_x: Matrix, raw: Matrix) -> Matrix:
        return np.asarray(booster.predict(raw, num_threads=1))

    return predict


def _number(frame: pl.DataFrame, column: NumericColumn, where: str) -> Matrix:
    values = numbers(frame, column, where).fill_null(float("nan")).to_numpy()
    clipped = np.clip(values, column.lower, column.upper)
    if column.scale == "linear":
        return np.asarray(clipped)
    return np.asarray(np.log(clipped) if column.scale == "log" else np.log1p(clipped))


def _codes(frame: pl.DataFrame, column: CategoricalColumn, where: str) -> npt.NDArray[np.int64]:
    """Return each record's place in the public list of categories, the list's length for anything else."""
    other = len(column.categories)
    text = categories(frame, column, where)
    codes = text.replace_strict(list(column.categories), list(range(other)), default=other, return_dtype=pl.Int64)
    return np.asarray(codes.fill_null(other).to_numpy())

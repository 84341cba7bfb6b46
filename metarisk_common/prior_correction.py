"""Adapting to labels that were selected on what they say: the share of positives among them is not the true one.

An analyst who labels every fraud and a few sound payments, or a draw that must hold five frauds, changes the odds of
every record by one factor, whatever its inputs are: among the labels the log odds lie

    d = logit(share of positives among the labels) - logit(base rate)

above the true ones (Prentice and Pyke 1979, "Logistic disease incidence models and case-control studies"; King and
Zeng 2001, "Logistic regression in rare events data", equation 7; Elkan 2001, "The foundations of cost-sensitive
learning", theorem 2). The initialization speaks of true odds, so it is moved up by d before it meets the labels and
what comes out is moved down by d after: the labels are explained as what they are, and the prior stays where it
belongs. To move a model down that was adapted as if the labels were a plain sample would correct twice where few labels
have hardly moved it.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from .adaptation import DEFAULT_TAU2
from .adapters import Adapted, adapt_params
from .params import Params
from .plan import ModelSpec

Vector = npt.NDArray[np.float64]


def offset(label_share: float, base_rate: float) -> float:
    """Return d, by how much log odds among selected labels lie above the true ones.

    Args:
        label_share: share of positives among the labels, or in the table that they are a random part of.
        base_rate: the true one.

    Raises:
        ValueError: one of them is not between 0 and 1.

    """
    for name, value in (("label_share", label_share), ("base_rate", base_rate)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value:g}")
    return float(logit(label_share) - logit(base_rate))


def corrected(p: Vector, by: float) -> Vector:
    """Take `by` out of the log odds of probabilities `p: (rows,)` that were learned from the selected labels alone."""
    return np.asarray(expit(logit(p) - by))


def adapt_selected(
    spec: ModelSpec,
    params: Params,
    x: Vector,
    y: Vector,
    *,
    by: float,
    method: str = "auto",
    prior_variance: float = DEFAULT_TAU2,
    prior: Vector | None = None,
) -> Adapted:
    """Adapt as `adapters.adapt_params` does, to labels whose log odds lie `by` above the true ones.

    Args:
        spec: a model of two outcomes; of a number only where `by` is 0.
        params: the initialization, which speaks of true odds; not changed.
        x: (k, width) encoded inputs, the encoder's constant intercept last; k may be 0.
        y: (k,) outcomes.
        by: d, from `offset`; 0 is a plain sample.
        method: as there.
        prior_variance: as there.
        prior: as there.

    Raises:
        ValueError: as there; or the label is a number, or `by` is not finite.

    """
    if not by or not len(y):
        return adapt_params(spec, params, x, y, method=method, prior_variance=prior_variance, prior=prior)
    if spec.loss == "squared" or not math.isfinite(by):
        raise ValueError("labels can be corrected by a finite shift of the log odds, of one of two outcomes")
    constant = float(x[0, -1])
    moved = _moved(spec, params, by, constant)
    found = adapt_params(spec, moved, x, y, method=method, prior_variance=prior_variance, prior=prior)
    return Adapted(_moved(spec, found.params, -by, constant), found.method, found.strength, found.folds_log_loss)


def _moved(spec: ModelSpec, params: Params, by: float, constant: float) -> Params:
    """Move every log odds that a model gives by the same amount."""
    if spec.kind == "mlp":
        return {**params, "head.bias": np.asarray(params["head.bias"], np.float64) + by}
    weights = np.array(params["points.weight"], np.float64)
    weights[..., -1] += by / constant
    return {**params, "points.weight": weights}

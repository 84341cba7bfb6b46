"""Which way to adapt, and how far: chosen by the labels' own leave-one-out log-loss, with a charge on leaving the norm.

A fit has seen its labels, so its loss on them flatters it, and the wider its prior the more. What counts is the loss on
each label at the fit to all others. It needs no second fit: at the maximum a posteriori the logit of record i without
its own label is, to second order in what that label changes,

    eta_i + h_i / (1 - h_i) (p_i - y_i) / w_i,    w_i = p_i (1 - p_i),  h = diag(A (I + A'A)^-1 A'),  A = sqrt(w) x tau

(Rad and Maleki 2020, "A scalable estimate of the out-of-sample prediction error via approximate leave-one-out
cross-validation", section 2.3). There are no folds to draw, so neither a seed nor the order of the records decides.

A sum of k such losses is the logarithm of a chance, in nats, and a candidate's charge is the logarithm of the odds
against it before any label is seen. Every choice therefore keeps the promise

    loss(chosen) - loss(any other) <= charge(other) - charge(chosen),

and leaving the initialization alone is given up, on the labels' own word, for at most its charge of nats in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from .adaptation import map_linear, map_logistic

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

_LARGEST_LEVERAGE = 1.0 - 1e-9


@dataclass(frozen=True)
class Candidate:
    """A way to adapt a model whose logit is, or is taken as, linear in what moves.

    Attributes:
        label: its key among the losses.
        method: how it is adapted, one of `adapters.METHODS`.
        strength: as in `adapters.Adapted`.
        inputs: (k, m) what the weights are multiplied with.
        weights: (m,) where they start.
        tau2: (m,) prior variances; all 0 where nothing moves.
        charge: nats that it must be better by than a candidate that is free.
        errors: standard errors of the difference to the free candidate that it must be better by besides.

    """

    label: str
    method: str
    strength: float | None
    inputs: Vector
    weights: Vector
    tau2: Vector
    charge: float = 0.0
    errors: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The candidate chosen, its weights adapted, and each candidate's mean leave-one-out log-loss by label."""

    candidate: Candidate
    weights: Vector
    losses: dict[str, float]


def leave_one_out_losses(adapted: Vector, x: Array, y: Array, tau2: Array) -> Vector:
    """Log-loss of each record at the fit to all the others.

    Args:
        adapted: (m,) what `map_logistic` found on these records.
        x: (k, m) inputs.
        y: (k,) outcomes 0 and 1.
        tau2: (m,) prior variances of that fit.

    Returns:
        (k,) float64 nats. Exact where `tau2` is 0; a record that is the only one is judged at about the start.

    """
    eta = x @ adapted
    probability = expit(eta)
    curvature = np.maximum(probability * (1.0 - probability), np.finfo(np.float64).tiny)
    moving = np.flatnonzero(tau2)
    scaled = np.sqrt(curvature)[:, None] * x[:, moving] * np.sqrt(tau2[moving])
    leverage = np.minimum(_leverages(scaled), _LARGEST_LEVERAGE)
    without = eta + leverage / (1.0 - leverage) * (probability - y) / curvature
    return np.asarray(np.logaddexp(0.0, (1.0 - 2.0 * y) * without))


def choose(candidates: Sequence[Candidate], y: Array) -> Choice:
    """Choose the candidate with the least sum of leave-one-out losses and charges, the earlier one at a tie.

    Args:
        candidates: the first is the free one, that others are measured by; all have the same k records.
        y: (k,) outcomes 0 and 1; they may be all the same.

    Raises:
        ValueError: there is no candidate, or as `map_logistic`.

    """
    if not candidates:
        raise ValueError("there is no way to adapt to choose from")
    fitted = [map_logistic(one.weights, one.inputs, y, tau2=one.tau2) for one in candidates]
    losses = [
        leave_one_out_losses(weights, one.inputs, y, one.tau2) for one, weights in zip(candidates, fitted, strict=True)
    ]
    totals = [
        float(loss.sum()) + one.charge + (one.errors * _standard_error(loss - losses[0]) if one.errors else 0.0)
        for one, loss in zip(candidates, losses, strict=True)
    ]
    best = int(np.argmin(totals))
    means = {one.label: float(loss.mean()) for one, loss in zip(candidates, losses, strict=True)}
    return Choice(candidates[best], fitted[best], means)


def choose_width(weights: Vector, x: Array, y: Array, variances: Sequence[float]) -> tuple[float, dict[str, float]]:
    """Choose how wide a prior around a linear model of a number is, by the labels' exact leave-one-out error.

    A ridge fit without record i errs there by e_i / (1 - h_i) (Allen 1974, PRESS), with e its residuals on all records
    and h the leverages. Leaving the model alone, a variance of 0, is given up only where another is better by more than
    one standard error of the difference.

    Args:
        weights: (m,) where the model starts.
        x: (k, m) inputs.
        y: (k,) numbers.
        variances: to choose among.

    Returns:
        The variance, and each one's mean squared error by its text.

    """
    errors = {}
    for tau2 in variances:
        fitted = map_linear(weights, x, y, tau2=tau2)
        leverage = np.minimum(_leverages(x * np.sqrt(tau2)), _LARGEST_LEVERAGE)
        errors[tau2] = np.square((y - x @ fitted) / (1.0 - leverage))
    best = min(variances, key=lambda tau2: float(errors[tau2].sum()))
    if (
        0.0 in errors
        and best
        and float((errors[0.0] - errors[best]).sum()) < _standard_error(errors[0.0] - errors[best])
    ):
        best = 0.0
    return best, {f"{tau2:g}": float(found.mean()) for tau2, found in errors.items()}


def _leverages(a: Vector) -> Vector:
    """Return diag(A (I + A'A)^-1 A') for A (rows, width), inverting the smaller of I + A A' and I + A'A."""
    rows, width = a.shape
    if rows < width:
        return np.asarray(1.0 - np.diag(np.linalg.inv(np.eye(rows) + a @ a.T)))
    return np.asarray(np.sum((a @ np.linalg.inv(np.eye(width) + a.T @ a)) * a, axis=1))


def _standard_error(differences: Vector) -> float:
    """Standard error of the sum; one label says nothing of how labels differ, which counts as infinitely much."""
    count = len(differences)
    return float(np.sqrt(count) * differences.std(ddof=1)) if count > 1 else float("inf")

"""Few-shot adaptation: the shared initialization as a prior, a bank's few labels as evidence.

Both functions find the maximum a posteriori parameters under independent normal priors around the initialization,

    min over w of  sum_i loss(y_i, f(x_i; w)) + 1/2 sum_j (w_j - w0_j)^2 / tau2_j,

which is the proximal objective of MR-MTL (Liu et al. 2022) and of iMAML (Rajeswaran et al. 2019): no labels give the
initialization, many labels give the local fit. `map_logistic` solves it exactly for a scorecard; `adapt` for any model.

What comes out depends on the records without noise: it carries no DP claim and stays inside the bank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor

from .models import record_losses

Array = npt.NDArray[Any]
Loss = Callable[[Tensor, Tensor], Tensor]
"""`(outputs, y) -> losses`, one a record and differentiable in the outputs."""

DEFAULT_TAU2 = 0.3
"""Prior variance of each weight on unit-norm inputs: the safe default found on lenders held out from learning."""

_TOLERANCE = 1e-9
_MAX_ITERATIONS = 100
_SUFFICIENT_DECREASE = 1e-4


def map_logistic(w0: Array, x: Array, y: Array, *, tau2: float | Array = DEFAULT_TAU2) -> npt.NDArray[np.float64]:
    """Adapt a scorecard's weights to a few labelled records, exactly.

    Damped Newton in v = (w - w0) / tau, where the Hessian is I + A'A with A = sqrt(p (1 - p)) x tau. Its system is
    solved on the smaller side (Woodbury), so a step costs O(k^2 width + k^3) for k < width. In v the objective is
    1-strongly convex: the result lies within the final gradient norm of the one minimum, 1e-9 where no row of x tau
    is longer than 1.

    Args:
        w0: (width,) the initialization.
        x: (k, width) inputs, the intercept's input among them; k may be 0.
        y: (k,) outcomes 0 and 1.
        tau2: prior variance, one for all weights or (width,); a weight with 0 does not move.

    Returns:
        (width,) float64 adapted weights.

    Raises:
        ValueError: shapes do not fit, values are not finite, or tau2 is negative.
        ArithmeticError: Newton's method did not converge, which inputs of ordinary size cannot cause.

    """
    start, rows, outcome = (np.asarray(value, dtype=np.float64) for value in (w0, x, y))
    variance = np.asarray(tau2, dtype=np.float64)
    _check(start, rows, outcome, variance)
    tau = np.broadcast_to(np.sqrt(variance), start.shape)
    scaled, offset = rows * tau, rows @ start
    sign = 1.0 - 2.0 * outcome

    def objective(v: Array) -> float:
        return float(np.logaddexp(0.0, sign * (offset + scaled @ v)).sum() + 0.5 * (v @ v))

    v = np.zeros_like(start)
    tolerance = _TOLERANCE * max(1.0, float(np.sqrt(np.square(scaled).sum(axis=1).max(initial=0.0))))
    value = objective(v)
    for _ in range(_MAX_ITERATIONS):
        probability = expit(offset + scaled @ v)
        gradient = scaled.T @ (probability - outcome) + v
        if float(np.linalg.norm(gradient)) <= tolerance:
            return start + tau * v
        step = -_solve(np.sqrt(probability * (1.0 - probability))[:, None] * scaled, gradient)
        v, value = _descend(objective, v, value, step, float(gradient @ step))
    raise ArithmeticError(
        f"adaptation did not converge in {_MAX_ITERATIONS} Newton steps; are inputs and tau2 of ordinary size?"
    )


def map_linear(w0: Array, x: Array, y: Array, *, tau2: float | Array = DEFAULT_TAU2) -> npt.NDArray[np.float64]:
    """Adapt a linear model of a number to a few labelled records, exactly: ridge regression around `w0`.

    The objective above with the loss 1/2 (y - x w)^2: tau2 counts in units of the noise's variance, which is at most 1
    where the label is standardised. Solved on the smaller side, as for `map_logistic`.

    Args:
        w0: (width,) the initialization.
        x: (k, width) inputs; k may be 0.
        y: (k,) numbers.
        tau2: prior variance, one for all weights or (width,); a weight with 0 does not move.

    Returns:
        (width,) float64 adapted weights.

    Raises:
        ValueError: shapes do not fit, values are not finite, or tau2 is negative.

    """
    start, rows, outcome = (np.asarray(value, dtype=np.float64) for value in (w0, x, y))
    variance = np.asarray(tau2, dtype=np.float64)
    _check_shapes(start, rows, outcome, variance)
    if not np.isfinite(outcome).all():
        raise ValueError("y must be finite")
    tau = np.broadcast_to(np.sqrt(variance), start.shape)
    scaled = rows * tau
    return np.asarray(start + tau * _solve(scaled, scaled.T @ (outcome - rows @ start)))


def adapt(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor],
    params: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    strength: float = 1.0 / DEFAULT_TAU2,
    loss: Loss = record_losses,
) -> dict[str, Tensor]:
    """Adapt any differentiable model by full-batch L-BFGS on the same objective, with 1/tau2 = `strength`.

    For a model that is linear in its parameters the minimum is the one `map_logistic` finds; otherwise it is the
    local minimum whose basin the initialization lies in, or where 500 steps lead. The work is done in float64, on the
    parameters' device.

    Args:
        forward: `(params, x) -> outputs (rows,)`, e.g. `functools.partial(models.forward, model)`.
        params: the initialization by name; not changed.
        x: (rows, width) inputs; rows may be 0.
        y: (rows,) outcomes.
        strength: weight of 1/2 |params - initialization|^2.
        loss: loss of each record; their sum is minimised.

    Returns:
        Adapted parameters, named, shaped and typed like `params`.

    Raises:
        ValueError: `strength` is not positive and finite, or the adapted parameters are not finite.

    """
    if not 0 < strength < float("inf"):
        raise ValueError("strength must be positive and finite")
    start = {name: value.detach().double() for name, value in params.items()}
    free = {name: value.clone().requires_grad_() for name, value in start.items()}
    inputs, outcome = x.double(), y.double()
    optimizer = torch.optim.LBFGS(
        list(free.values()),
        max_iter=_MAX_ITERATIONS * 5,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            total = loss(forward(free, inputs), outcome).sum()
            for name, value in free.items():
                total = total + 0.5 * strength * (value - start[name]).square().sum()
            total.backward()  # type: ignore[no-untyped-call]
        return total.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    if not all(bool(torch.isfinite(value).all()) for value in free.values()):
        raise ValueError("adaptation diverged: inputs or the initialization are not finite")
    return {name: value.detach().to(params[name].dtype) for name, value in free.items()}


def _check(w0: Array, x: Array, y: Array, tau2: Array) -> None:
    _check_shapes(w0, x, y, tau2)
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("y may hold only 0 and 1")


def _check_shapes(w0: Array, x: Array, y: Array, tau2: Array) -> None:
    if w0.ndim != 1 or x.shape != (len(y), w0.size) or y.ndim != 1:
        raise ValueError(f"shapes do not fit: w0 {w0.shape}, x {x.shape}, y {y.shape}")
    if tau2.shape not in ((), w0.shape) or not np.isfinite(tau2).all() or np.any(tau2 < 0):
        raise ValueError("tau2 must be one finite number at or above 0, or one for each weight")
    if not (np.isfinite(w0).all() and np.isfinite(x).all()):
        raise ValueError("w0 and x must be finite")


def _solve(a: Array, gradient: Array) -> Array:
    """Return (I + A'A)^-1 gradient for A (rows, width), factorising the smaller of A A' and A'A."""
    rows, width = a.shape
    if rows < width:
        inner = np.linalg.solve(np.eye(rows) + a @ a.T, a @ gradient)
        return np.asarray(gradient - a.T @ inner)
    return np.asarray(np.linalg.solve(np.eye(width) + a.T @ a, gradient))


def _descend(
    objective: Callable[[Array], float], v: Array, value: float, step: Array, slope: float
) -> tuple[Array, float]:
    """Halve the Newton step until it descends enough (Armijo); differences below rounding count as descent."""
    slack = 1e-13 * (1.0 + abs(value))
    size = 1.0
    while True:
        candidate = v + size * step
        reached = objective(candidate)
        if reached <= value + _SUFFICIENT_DECREASE * size * slope + slack:
            return candidate, reached
        size *= 0.5

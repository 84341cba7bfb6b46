"""Every way to adapt an initialization to a bank's few labels behind one call, and scoring with what comes out.

`none` leaves the initialization as it is. `intercept` moves the intercept alone: base rates differ more between lenders
than anything else does. `head` moves the last layer, of a scorecard everything, the intercept under a wide prior of its
own. `sgd` takes full-batch gradient steps on the mean log-loss (Finn et al. 2017, equation 1). `prox` is the maximum a
posteriori under one prior variance for every parameter (Liu et al. 2022), `prior` the same under variances learned from
what banks released. `auto` chooses among all but the last and `sgd`, and how far each goes, by the labels' own
leave-one-out log-loss.

What comes out depends on the records without noise: it carries no DP claim and stays inside the bank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch.func import grad, vmap

from .adaptation import DEFAULT_TAU2, adapt, map_linear, map_logistic
from .initialisation import RATE, model_params, param_shapes
from .models import build, forward, record_losses, squared_losses, to_arrays, to_tensors
from .params import Params
from .plan import ModelSpec
from .selection import Candidate, choose, choose_width

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

METHODS: Final = ("none", "intercept", "head", "sgd", "prox", "prior", "auto")

INTERCEPT_TAU2: Final = 0.5
"""Prior variance of the intercept, as a logit, where it is free to find the base rate."""

PRIOR_SHARE: Final = 0.1
"""Share of the learned variances that `prior` takes: a tenth, for they are overstated where columns go together. On the
loans even that does harm after joint training, as `compare simulations/compare_loans.toml` shows."""

SGD_STEPS: Final = 5
SGD_LEARNING_RATE: Final = 2.0

# Of `auto`, all found by cross-validation over the training lenders of the loans. What must be better by how many nats
# than the narrow prior, and how many times as wide the wider priors are; the widest needs two standard errors besides,
# for the loss of a fit that follows its labels that closely is itself an uncertain thing.
_CHARGE_NONE = 1.0
_CHARGE_INTERCEPT = 1.0
_CHARGE_WIDE, _WIDE = 2.0, 10 / 3
_CHARGE_WIDEST, _WIDEST, _WIDEST_ERRORS = 3.0, 40 / 3, 2.0


# Of a number, what the given prior variance is multiplied with; 0 leaves the initialization alone.
_NUMBER_WIDTHS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Adapted:
    """Adapted parameters and how they came about.

    Attributes:
        params: NumPy float64, named and shaped as the model's parameters in the initialization.
        method: what was used in the end; of "auto" the one chosen, which gives the same parameters when it is asked for
            by its name with `prior_variance` = 1 / strength.
        strength: 1 / prior variance of the weights, of `intercept` that of the intercept's logit; of `prior` 1 / share
            of the learned variances; None where there is no prior.
        folds_log_loss: of "auto" the mean log-loss of each candidate on labels that it was not shown, else empty.

    """

    params: Params
    method: str
    strength: float | None
    folds_log_loss: Mapping[str, float] = field(default_factory=dict)


def adapt_params(
    spec: ModelSpec,
    params: Params,
    x: Array,
    y: Array,
    *,
    method: str = "auto",
    prior_variance: float = DEFAULT_TAU2,
    prior: Array | None = None,
    steps: int = SGD_STEPS,
    learning_rate: float = SGD_LEARNING_RATE,
) -> Adapted:
    """Adapt an initialization to k labelled records.

    `auto` starts from the narrow prior that did best on lenders held out from learning, and leaves it where the labels
    speak for another: for the initialization as it is, a base rate of the bank's own, or weights that differ more.
    Of an mlp it judges the model as linearised at the initialization (its tangent kernel), and fits the model itself.

    Args:
        spec: the model.
        params: the initialization, named and shaped as `initialisation.param_shapes` says; not changed. Learned rates
            among them (`meta_sgd`) are the step sizes of `sgd` and else have no part.
        x: (k, width) encoded inputs; of a scorecard the last one is the encoder's constant intercept. k may be 0.
        y: (k,) outcomes 0 and 1; they may be all the same.
        method: one of `METHODS`.
        prior_variance: tau2 of each weight for `head` and `prox`, and of the narrow prior of `auto`.
        prior: (width,) tau2 of each input of a scorecard, from `LearnedPrior.variances`. `auto` leaves it aside:
            in cross-validation on the loans it was chosen too often, and cost AUC.
        steps: of `sgd`.
        learning_rate: of `sgd`.

    Raises:
        ValueError: the method is unknown, shapes or values do not fit, or `prior` is asked for and not given.

    """
    start = {name: np.asarray(value, np.float64) for name, value in model_params(params).items()}
    rows, outcome = np.asarray(x, np.float64), np.asarray(y, np.float64)
    _check(spec, start, rows, outcome)
    number = spec.loss == "squared"
    learned = None if prior is None else np.asarray(prior, np.float64)
    _check_settings(spec, method, prior_variance, learned, rows.shape[1])
    if method == "none" or not len(outcome):
        return Adapted(start, "none", None)
    if method == "sgd":
        if steps < 1 or not 0 < learning_rate < math.inf:
            raise ValueError("sgd needs at least one step, and a learning_rate that is positive and finite")
        rates = {name: np.asarray(params.get(RATE + name, learning_rate), np.float64) for name in start}
        return Adapted(_sgd(spec, start, rows, outcome, rates=rates, steps=steps), method, None)
    if method == "prox" and spec.kind == "mlp":
        return Adapted(_prox(spec, start, rows, outcome, prior_variance), method, 1.0 / prior_variance)
    head = _Head(spec, start, rows)
    if method == "auto":
        return (_auto_number if number else _auto)(spec, head, outcome, prior_variance)
    if method == "intercept":
        tau2, strength = head.variances(0.0, INTERCEPT_TAU2), 1.0 / INTERCEPT_TAU2
    elif method == "head":
        tau2, strength = head.variances(prior_variance, INTERCEPT_TAU2), 1.0 / prior_variance
    elif learned is not None and method == "prior":
        tau2, strength = PRIOR_SHARE * learned, 1.0 / PRIOR_SHARE
    else:
        tau2, strength = np.full(head.weights.shape, prior_variance), 1.0 / prior_variance
    fit = map_linear if number else map_logistic
    return Adapted(head.with_weights(fit(head.weights, head.inputs, outcome, tau2=tau2)), method, strength)


def predict(spec: ModelSpec, params: Params, x: Array) -> Vector:
    """Probabilities of the positive outcome; under `loss = "squared"` the number, in the label's standardised unit.

    Args:
        spec: the model.
        params: NumPy arrays, e.g. `Adapted.params`.
        x: (rows, width) encoded inputs.

    Returns:
        (rows,) float64.

    """
    head = _Head(spec, params, np.asarray(x, np.float64))
    outputs = head.inputs @ head.weights
    return np.asarray(outputs if spec.loss == "squared" else expit(outputs), np.float64)


class _Head:
    """The last layer as a linear model: `inputs: (rows, m)`, `weights: (m,)`, the intercept's at the end."""

    def __init__(self, spec: ModelSpec, params: Params, x: Vector) -> None:
        self.params, self.x, self._scorecard = params, x, spec.kind == "scorecard"
        if self._scorecard:
            self.inputs, self.weights = x, np.asarray(params["points.weight"], np.float64).reshape(-1)
            return
        for index in range(len(spec.hidden)):
            weight, bias = params[f"body.{index}.weight"], params[f"body.{index}.bias"]
            x = np.tanh(x @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64))
        self.inputs = np.hstack([x, np.ones((len(x), 1))])
        self.weights = np.append(np.ravel(params["head.weight"]), params["head.bias"]).astype(np.float64)

    def variances(self, weights: float, intercept: float) -> Vector:
        """Prior variances (m,), that of the intercept given for its logit."""
        constant = self.inputs[:, -1]
        if constant[0] == 0 or np.ptp(constant) > 0:
            raise ValueError("the last input must be the encoder's constant intercept, the same in every row and not 0")
        tau2 = np.full(self.weights.shape, weights)
        tau2[-1] = intercept / constant[0] ** 2
        return tau2

    def with_weights(self, weights: Vector) -> Params:
        """Return the model's parameters with other weights in the last layer."""
        if self._scorecard:
            return {"points.weight": weights[None]}
        return {**self.params, "head.weight": weights[None, :-1], "head.bias": weights[-1:]}


def _auto(spec: ModelSpec, head: _Head, y: Vector, variance: float) -> Adapted:
    candidates = _candidates(head, variance) if spec.kind == "scorecard" else _tangents(spec, head, variance)
    found = choose(candidates, y)
    method, strength = found.candidate.method, found.candidate.strength
    if spec.kind == "mlp" and method == "prox" and strength is not None:
        params = _prox(spec, head.params, head.x, y, 1.0 / strength)
    else:
        params = head.params if method == "none" else head.with_weights(found.weights)
    return Adapted(params, method, strength, found.losses)


def _auto_number(spec: ModelSpec, head: _Head, y: Vector, variance: float) -> Adapted:
    """Of a number: the prior variance of the last layer by exact leave-one-out, among a range around the one given."""
    tried = tuple(variance * factor for factor in _NUMBER_WIDTHS)
    tau2, losses = choose_width(head.weights, head.inputs, y, tried)
    if tau2 == 0.0:
        return Adapted(head.params, "none", None, losses)
    weights = map_linear(head.weights, head.inputs, y, tau2=tau2)
    return Adapted(head.with_weights(weights), "prox" if spec.kind == "scorecard" else "head", 1.0 / tau2, losses)


def _candidates(head: _Head, variance: float) -> list[Candidate]:
    """Ways to adapt a scorecard, the narrow prior first."""
    candidate = partial(Candidate, inputs=head.inputs, weights=head.weights)

    def free(label: str, tau2: float, charge: float, errors: float = 0.0) -> Candidate:
        variances = head.variances(tau2, INTERCEPT_TAU2)
        return candidate(label, "head", 1 / tau2, tau2=variances, charge=charge, errors=errors)

    return [
        candidate("prox", "prox", 1 / variance, tau2=np.full(head.weights.shape, variance)),
        _unmoved(head),
        free("head", variance, _CHARGE_INTERCEPT),
        free("head, wide", variance * _WIDE, _CHARGE_WIDE),
        free("head, widest", variance * _WIDEST, _CHARGE_WIDEST, _WIDEST_ERRORS),
    ]


def _tangents(spec: ModelSpec, head: _Head, variance: float) -> list[Candidate]:
    """Ways to adapt an mlp, judged on its tangent: logit(x) + gradient(x) times what the parameters move by.

    The logit at the initialization is one input more, whose weight is 1 and does not move.
    """
    gradients = _gradients(spec, head.params, head.x)
    inputs = np.column_stack([gradients, head.inputs @ head.weights])
    weights = np.append(np.zeros(gradients.shape[1]), 1.0)

    def prox(label: str, tau2: float, charge: float, errors: float = 0.0) -> Candidate:
        variances = np.append(np.full(gradients.shape[1], tau2), 0.0)
        return Candidate(label, "prox", 1 / tau2, inputs, weights, variances, charge, errors)

    rate = head.variances(0.0, INTERCEPT_TAU2)
    return [
        prox("prox", variance, 0.0),
        _unmoved(head),
        Candidate("intercept", "intercept", 1 / INTERCEPT_TAU2, head.inputs, head.weights, rate, _CHARGE_INTERCEPT),
        prox("prox, wide", variance * _WIDE, _CHARGE_WIDE),
        prox("prox, widest", variance * _WIDEST, _CHARGE_WIDEST, _WIDEST_ERRORS),
    ]


def _unmoved(head: _Head) -> Candidate:
    return Candidate("none", "none", None, head.inputs, head.weights, np.zeros_like(head.weights), _CHARGE_NONE)


def _gradients(spec: ModelSpec, params: Params, x: Vector) -> Vector:
    """Gradient of each record's logit in all parameters, (rows, parameters)."""
    model = build(spec, x.shape[1], "float64")

    def logit(values: Params, row: torch.Tensor) -> torch.Tensor:
        return forward(model, values, row[None])[0]

    found = vmap(grad(logit), in_dims=(None, 0))(to_tensors(params), torch.from_numpy(x))
    return np.hstack([found[name].reshape(len(x), -1).numpy() for name in params])


def _prox(spec: ModelSpec, params: Params, x: Vector, y: Vector, tau2: float) -> Params:
    model = build(spec, x.shape[1], "float64")
    inputs, outcome = torch.from_numpy(x), torch.from_numpy(y)
    loss = squared_losses if spec.loss == "squared" else record_losses
    return to_arrays(
        adapt(partial(forward, model), to_tensors(params), inputs, outcome, strength=1.0 / tau2, loss=loss)
    )


def _sgd(spec: ModelSpec, params: Params, x: Vector, y: Vector, *, rates: Mapping[str, Vector], steps: int) -> Params:
    model = build(spec, x.shape[1], "float64")
    inputs, outcome = torch.from_numpy(x), torch.from_numpy(y)
    values, rate = to_tensors(params), to_tensors(dict(rates))
    for _ in range(steps):
        free = {name: value.requires_grad_() for name, value in values.items()}
        losses = squared_losses if spec.loss == "squared" else record_losses
        loss = losses(forward(model, free, inputs), outcome).mean()
        gradients = torch.autograd.grad(loss, list(free.values()))
        values = {
            name: (value - rate[name] * gradient).detach()
            for (name, value), gradient in zip(free.items(), gradients, strict=True)
        }
    return to_arrays(values)


def _check(spec: ModelSpec, params: Params, x: Vector, y: Vector) -> None:
    if x.ndim != 2 or y.shape != (len(x),):  # noqa: PLR2004 - a table has two
        raise ValueError(f"shapes do not fit: x {x.shape} must be (k, width), and y {y.shape} (k,)")
    shapes, found = param_shapes(spec, x.shape[1]), {name: value.shape for name, value in params.items()}
    if found != shapes:
        raise ValueError(f"the initialization does not fit {x.shape[1]} inputs: expected {shapes}, found {found}")
    if not (np.isfinite(x).all() and all(np.isfinite(value).all() for value in params.values())):
        raise ValueError("x and the initialization must be finite")
    if spec.loss == "squared" and not np.isfinite(y).all():
        raise ValueError("y must be finite")
    if spec.loss != "squared" and not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("y may hold only 0 and 1")


def _check_settings(spec: ModelSpec, method: str, variance: float, prior: Vector | None, width: int) -> None:
    if method not in METHODS:
        raise ValueError(f"there is no method '{method}' of adaptation; choose one of: {', '.join(METHODS)}")
    if not 0 < variance < math.inf:
        raise ValueError("prior_variance must be positive and finite")
    if method == "prior" and (prior is None or spec.kind != "scorecard"):
        raise ValueError("method 'prior' is for a scorecard and needs the prior that its run has learned")
    if prior is not None and (prior.shape != (width,) or not (np.isfinite(prior) & (prior >= 0)).all()):
        raise ValueError(f"prior must hold {width} finite variances at or above 0, one for each input")

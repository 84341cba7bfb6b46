"""Server optimizers as `(init, apply)` pairs: state in, state out, every array of it in the checkpoint.

The pseudo-gradient is the round's mean meta-update, *added* (Reddi et al. 2021, "Adaptive Federated
Optimization", algorithm 2). All of it is post-processing of noised updates and costs no privacy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from metarisk_common.params import Params, add_scaled
from metarisk_common.plan import OuterLoop

OptimizerState = dict[str, np.ndarray]
"""Named arrays: `velocity/NAME` and the like."""


class Apply(Protocol):
    """One step: the next state and the next meta-parameters."""

    def __call__(
        self, state: OptimizerState, meta: Params, update: Params, rate: float, noise_variance: float = 0.0
    ) -> tuple[OptimizerState, Params]:
        """Step from `meta` by the round's `update`, a coordinate of which holds noise of this known variance."""


@dataclass(frozen=True)
class Optimizer:
    """`init(meta_params)` gives a state; `apply(state, meta_params, update, rate)` gives the next of both.

    A `noise_variance`, from `server.noise`, matters only to an optimizer that was built to subtract it.
    """

    init: Callable[[Params], OptimizerState]
    apply: Apply


def sgd() -> Optimizer:
    """Add `rate * update`; with rate 1 this is plain averaging."""

    def init(_: Params) -> OptimizerState:
        return {}

    def apply(
        state: OptimizerState, meta: Params, update: Params, rate: float, noise_variance: float = 0.0
    ) -> tuple[OptimizerState, Params]:
        del noise_variance
        return state, add_scaled(meta, rate, update)

    return Optimizer(init, apply)


def momentum(beta: float) -> Optimizer:
    """Heavy-ball momentum (Polyak 1964): `velocity = beta * velocity + update`; add `rate * velocity`."""

    def init(meta: Params) -> OptimizerState:
        return {f"velocity/{name}": np.zeros_like(value) for name, value in meta.items()}

    def apply(
        state: OptimizerState, meta: Params, update: Params, rate: float, noise_variance: float = 0.0
    ) -> tuple[OptimizerState, Params]:
        del noise_variance
        velocity = {name: beta * state[f"velocity/{name}"] + update[name] for name in meta}
        return {f"velocity/{name}": value for name, value in velocity.items()}, add_scaled(meta, rate, velocity)

    return Optimizer(init, apply)


def adam(beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, *, subtract_noise: bool = False) -> Optimizer:
    """FedAdam (Reddi et al. 2021, algorithm 2) with the bias correction of Kingma and Ba (2015, algorithm 1)."""

    def second(before: np.ndarray, square: np.ndarray) -> np.ndarray:
        return beta2 * before + (1 - beta2) * square

    return _adaptive(second, beta1, beta2, tau, subtract_noise=subtract_noise)


def yogi(beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, *, subtract_noise: bool = False) -> Optimizer:
    """FedYogi (Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", algorithm 2; Reddi et al. 2021).

    The second moment moves by the size of the new square and not of their difference, so one round with a large update
    cannot make it forget the others. It starts at 0, and both moments are bias-corrected as in `adam`.
    """

    def second(before: np.ndarray, square: np.ndarray) -> np.ndarray:
        moved: np.ndarray = before - (1 - beta2) * np.abs(square) * np.sign(before - square)
        return moved

    return _adaptive(second, beta1, beta2, tau, subtract_noise=subtract_noise)


def _adaptive(
    next_second: Callable[[np.ndarray, np.ndarray], np.ndarray],
    beta1: float,
    beta2: float,
    tau: float,
    *,
    subtract_noise: bool,
) -> Optimizer:
    """Step by the first moment over the root of the second, of which the known variance of the noise may be left out.

    Under DP a coordinate's mean square is the signal's plus the noise's, and the noise's, the same everywhere, levels
    all steps: DP-Adam becomes DP-SGD (Tang, Shpilevskiy and Lecuyer 2024, "DP-AdamBC", section 3). As there, the
    variance is subtracted; from each round's square, because a round's noise depends on who took part in it.

    The difference of two noisy figures may be nought or less, so there is a floor, as there (their gamma'). It is no
    tuning constant here: of pure noise of mean variance v the mean over t rounds' squares has a standard error of
    `v sqrt(2 (1 - beta2) (1 + beta2^t) / ((1 + beta2) (1 - beta2^t)))`, and what is below it cannot be told from 0.
    """

    def init(meta: Params) -> OptimizerState:
        zeros = {f"{part}/{name}": np.zeros_like(value) for part in ("first", "second") for name, value in meta.items()}
        noise = {"noise": np.zeros(())} if subtract_noise else {}
        return {**zeros, **noise, "steps": np.zeros((), np.int64)}

    def apply(
        state: OptimizerState, meta: Params, update: Params, rate: float, noise_variance: float = 0.0
    ) -> tuple[OptimizerState, Params]:
        steps = int(state["steps"]) + 1
        after: OptimizerState = {"steps": np.asarray(steps, np.int64)}
        known = floor = 0.0
        if subtract_noise:
            known = noise_variance
            mean_noise = beta2 * state["noise"] + (1 - beta2) * known
            after["noise"] = np.asarray(mean_noise)
            floor = _error_of_noise(float(mean_noise) / (1 - beta2**steps), beta2, steps)
        moved: Params = {}
        for name, value in meta.items():
            first = beta1 * state[f"first/{name}"] + (1 - beta1) * update[name]
            second = next_second(state[f"second/{name}"], update[name] ** 2 - known)
            after[f"first/{name}"], after[f"second/{name}"] = first, second
            variance = np.maximum(second / (1 - beta2**steps), floor)
            step = (first / (1 - beta1**steps)) / (np.sqrt(variance) + tau)
            moved[name] = value + rate * step
        return after, moved

    return Optimizer(init, apply)


def _error_of_noise(mean_variance: float, beta2: float, steps: int) -> float:
    """Standard error of `steps` squares of pure normal noise, weighted by `beta2`, each with twice its squared mean."""
    forgotten = beta2**steps
    return mean_variance * math.sqrt(2 * (1 - beta2) * (1 + forgotten) / ((1 + beta2) * (1 - forgotten)))


def optimizer_for(outer: OuterLoop) -> Optimizer:
    """Build the optimizer that a plan names."""
    if outer.optimizer == "sgd":
        return sgd()
    if outer.optimizer == "momentum":
        return momentum(outer.momentum)
    chosen = yogi if outer.optimizer == "yogi" else adam
    return chosen(beta1=outer.momentum, subtract_noise=outer.subtract_noise)


def rate_at(outer: OuterLoop, round_number: int) -> float:
    """Step size of a round, counted from 1, under the plan's schedule.

    Without warm-up the first round has the full rate. With it the schedule runs as it does without, and round r of
    the w warm-up rounds takes r / (w + 1) of what it says.
    """
    done = (round_number - 1) / outer.rounds
    rate = outer.learning_rate * min(1.0, round_number / (outer.warmup_rounds + 1))
    if outer.schedule == "linear":
        return rate * (1 - done)
    if outer.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate

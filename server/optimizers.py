"""Server optimizers as `(init, apply)` pairs: state in, state out, every array of it in the checkpoint.

The pseudo-gradient is the round's mean meta-update, *added* (Reddi et al. 2021, "Adaptive Federated
Optimization", algorithm 2). All of it is post-processing of noised updates and costs no privacy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metarisk_common.params import Params, add_scaled
from metarisk_common.plan import OuterLoop

OptimizerState = dict[str, np.ndarray]
"""Named arrays: `velocity/NAME` and the like."""


@dataclass(frozen=True)
class Optimizer:
    """`init(meta_params)` gives a state; `apply(state, meta_params, update, rate)` gives the next of both."""

    init: Callable[[Params], OptimizerState]
    apply: Callable[[OptimizerState, Params, Params, float], tuple[OptimizerState, Params]]


def sgd() -> Optimizer:
    """Add `rate * update`; with rate 1 this is plain averaging."""

    def init(_: Params) -> OptimizerState:
        return {}

    def apply(state: OptimizerState, meta: Params, update: Params, rate: float) -> tuple[OptimizerState, Params]:
        return state, add_scaled(meta, rate, update)

    return Optimizer(init, apply)


def momentum(beta: float) -> Optimizer:
    """Heavy-ball momentum (Polyak 1964): `velocity = beta * velocity + update`; add `rate * velocity`."""

    def init(meta: Params) -> OptimizerState:
        return {f"velocity/{name}": np.zeros_like(value) for name, value in meta.items()}

    def apply(state: OptimizerState, meta: Params, update: Params, rate: float) -> tuple[OptimizerState, Params]:
        velocity = {name: beta * state[f"velocity/{name}"] + update[name] for name in meta}
        return {f"velocity/{name}": value for name, value in velocity.items()}, add_scaled(meta, rate, velocity)

    return Optimizer(init, apply)


def adam(beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Optimizer:
    """FedAdam (Reddi et al. 2021, algorithm 2) with the bias correction of Kingma and Ba (2015, algorithm 1)."""

    def init(meta: Params) -> OptimizerState:
        zeros = {f"{part}/{name}": np.zeros_like(value) for part in ("first", "second") for name, value in meta.items()}
        return {**zeros, "steps": np.zeros((), np.int64)}

    def apply(state: OptimizerState, meta: Params, update: Params, rate: float) -> tuple[OptimizerState, Params]:
        steps = int(state["steps"]) + 1
        after: OptimizerState = {"steps": np.asarray(steps, np.int64)}
        moved: Params = {}
        for name, value in meta.items():
            first = beta1 * state[f"first/{name}"] + (1 - beta1) * update[name]
            second = beta2 * state[f"second/{name}"] + (1 - beta2) * update[name] ** 2
            after[f"first/{name}"], after[f"second/{name}"] = first, second
            step = (first / (1 - beta1**steps)) / (np.sqrt(second / (1 - beta2**steps)) + tau)
            moved[name] = value + rate * step
        return after, moved

    return Optimizer(init, apply)


def optimizer_for(outer: OuterLoop) -> Optimizer:
    """Build the optimizer that a plan names."""
    if outer.optimizer == "sgd":
        return sgd()
    if outer.optimizer == "momentum":
        return momentum(outer.momentum)
    return adam(beta1=outer.momentum)


def rate_at(outer: OuterLoop, round_number: int) -> float:
    """Step size of a round, counted from 1, under the plan's schedule; the first round has the full rate."""
    done = (round_number - 1) / outer.rounds
    if outer.schedule == "linear":
        return outer.learning_rate * (1 - done)
    if outer.schedule == "cosine":
        return outer.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return outer.learning_rate

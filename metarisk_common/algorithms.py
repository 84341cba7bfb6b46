"""Meta-learning algorithms as pure functions `(meta_params, tasks, grad_fn, inner) -> meta_update`.

A `meta_update` is *added* to the meta-parameters by the server. No function here knows whether its gradient
is private: differential privacy is just another `grad_fn`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .params import Params, add_scaled, mean, sub

GradFn = Callable[[Params, Any], Params]
"""`grad_fn(params, task)`: the (possibly privatised) mean gradient of the task's loss at `params`."""


class Inner(Protocol):
    """What an algorithm reads of the plan's inner loop."""

    @property
    def local_steps(self) -> int:
        """Number of gradient steps."""

    @property
    def learning_rate(self) -> float:
        """Size of a step."""


def reptile(meta_params: Params, tasks: Sequence[Any], grad_fn: GradFn, inner: Inner) -> Params:
    """Reptile (Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 2).

    Each task is adapted on its own, from the meta-parameters, by `local_steps` steps of SGD; the update is the
    mean over tasks of adapted minus meta. On quadratic tasks its outer loop converges to the weighted mean of
    the tasks' optima with weights `I - (I - aA)^s`.
    """
    updates = []
    for task in tasks:
        adapted = meta_params
        for _ in range(inner.local_steps):
            adapted = add_scaled(adapted, -inner.learning_rate, grad_fn(adapted, task))
        updates.append(sub(adapted, meta_params))
    return mean(updates)


def fedavg(meta_params: Params, tasks: Sequence[Any], grad_fn: GradFn, inner: Inner) -> Params:
    """Federated averaging (McMahan et al. 2017, algorithm 1): one model for all the institution's tasks together.

    Each step follows the mean gradient over the tasks. With one task it is Reptile; with one step, joint training.
    """
    adapted = meta_params
    for _ in range(inner.local_steps):
        gradient = mean([grad_fn(adapted, task) for task in tasks])
        adapted = add_scaled(adapted, -inner.learning_rate, gradient)
    return sub(adapted, meta_params)


ALGORITHMS: dict[str, Callable[[Params, Sequence[Any], GradFn, Inner], Params]] = {
    "reptile": reptile,
    "fedavg": fedavg,
}
"""By the name that a plan uses."""

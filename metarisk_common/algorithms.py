"""Meta-learning algorithms as pure functions `(meta_params, tasks, grad_fn, inner) -> meta_update`.

A `meta_update` is *added* to the meta-parameters by the server. No function here knows whether its gradient
is private: differential privacy is just another `grad_fn`. What each may cost is a matter of how often it asks for a
gradient: the first three ask `local_steps` times for each task; FOMAML and ANIL `local_steps` times for an episode's
support and once for its query. MAML and Meta-SGD differentiate through their steps, which no private gradient allows.

The MAML family (FOMAML, ANIL, MAML, Meta-SGD) answers with the negative meta-gradient itself, the mean over tasks of
the query loss' gradient: its outer step size is the server's learning rate, and nothing else.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Final, Protocol

from torch.func import vjp

from .initialisation import RATE, model_params
from .params import Params, add_scaled, mean, scale, sub
from .tasks import Episode

GradFn = Callable[[Params, Any], Params]
"""`grad_fn(params, task)`: the (possibly privatised) mean gradient of the task's loss at `params`."""

HEAD: Final = "head."
"""How the names of a model's last layer begin."""


class Inner(Protocol):
    """What an algorithm reads of the plan's inner loop."""

    @property
    def local_steps(self) -> int:
        """Number of gradient steps."""

    @property
    def learning_rate(self) -> float:
        """Size of a step."""

    @property
    def prox_strength(self) -> float:
        """Strength of the pull towards the meta-parameters; `prox` alone reads it."""


def reptile(meta_params: Params, tasks: Sequence[Any], grad_fn: GradFn, inner: Inner) -> Params:
    """Reptile (Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 2).

    Each task is adapted on its own, from the meta-parameters, by `local_steps` steps of SGD; the update is the
    mean over tasks of adapted minus meta. On quadratic tasks its outer loop converges to the weighted mean of
    the tasks' optima with weights `I - (I - aA)^s`.
    """
    return mean([sub(_adapted(meta_params, task, grad_fn, inner), meta_params) for task in tasks])


def fedavg(meta_params: Params, tasks: Sequence[Any], grad_fn: GradFn, inner: Inner) -> Params:
    """Federated averaging (McMahan et al. 2017, algorithm 1): one model for all the institution's tasks together.

    Each step follows the mean gradient over the tasks. With one task it is Reptile; with one step, joint training.
    """
    adapted = meta_params
    for _ in range(inner.local_steps):
        gradient = mean([grad_fn(adapted, task) for task in tasks])
        adapted = add_scaled(adapted, -inner.learning_rate, gradient)
    return sub(adapted, meta_params)


def prox(meta_params: Params, tasks: Sequence[Any], grad_fn: GradFn, inner: Inner) -> Params:
    """MR-MTL (Liu et al. 2022, "On Privacy and Personalization in Cross-Silo Federated Learning", algorithm 1).

    Mean-regularised multi-task learning: each task's model is pulled towards the shared one. The steps descend
    `loss(w) + prox_strength / 2 |w - meta|^2`; the update is the mean over tasks of adapted minus meta. A bank keeps
    no model between rounds, so each starts from the meta-parameters: that is the local step of FedProx (Li et al.
    2020, algorithm 2). The pull reads no record and costs no privacy. On quadratic tasks the weights are
    `(I - (I - aB)^s) B^-1 A` with `B = A + prox_strength I`.
    """

    def pulled(params: Params, task: Any) -> Params:  # noqa: ANN401 - a task is whatever `grad_fn` takes
        return add_scaled(grad_fn(params, task), inner.prox_strength, sub(params, meta_params))

    return reptile(meta_params, tasks, pulled, inner)


def fomaml(meta_params: Params, tasks: Sequence[Episode[Any]], grad_fn: GradFn, inner: Inner) -> Params:
    """First-order MAML (Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning", section 5.2).

    Each task is adapted by `local_steps` steps on its support; the update is the negative mean of the query losses'
    gradients *at the adapted parameters*, second derivatives left out. On quadratic tasks the weights are
    `A (I - aA)^s`.
    """
    return _negative_mean([grad_fn(_adapted(meta_params, task.support, grad_fn, inner), task.query) for task in tasks])


def anil(meta_params: Params, tasks: Sequence[Episode[Any]], grad_fn: GradFn, inner: Inner) -> Params:
    """ANIL, "almost no inner loop" (Raghu et al. 2020, "Rapid Learning or Feature Reuse?", section 4), first order.

    The inner steps on the support move the head alone, which are the parameters named "head."; the update is the
    negative mean of the query losses' gradients with respect to body and head, at the shared body and adapted head.

    Raises:
        ValueError: the model has no head apart from its body.

    """
    head = {name for name in meta_params if name.startswith(HEAD)}
    if not head or len(head) == len(meta_params):
        raise ValueError(f"anil needs a model with a body and a head, whose names begin with '{HEAD}'")
    return _negative_mean(
        [grad_fn(_adapted(meta_params, task.support, grad_fn, inner, moved=head), task.query) for task in tasks]
    )


def maml(meta_params: Params, tasks: Sequence[Episode[Any]], grad_fn: GradFn, inner: Inner) -> Params:
    """MAML (Finn, Abbeel and Levine 2017, algorithm 1 and equation 1), with second derivatives.

    The update is the negative mean of the gradients, with respect to the meta-parameters, of the query loss at the
    parameters adapted on the support: the query's gradient is pulled back through the inner steps. On quadratic tasks
    the weights are `(I - aA)^s A (I - aA)^s`.

    Parameters are Torch tensors, and `torch.func` must be able to differentiate `grad_fn` by them. One that clips or
    cuts the graph would silently give another algorithm, so a plan with privacy refuses this one.
    """
    return _negative_mean(
        [
            _pulled_back(
                partial(_adapted, task=task.support, grad_fn=grad_fn, inner=inner), meta_params, task.query, grad_fn
            )
            for task in tasks
        ]
    )


def meta_sgd(meta_params: Params, tasks: Sequence[Episode[Any]], grad_fn: GradFn, inner: Inner) -> Params:
    """Meta-SGD (Li et al. 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", equations 2 and 3).

    As MAML, with a learned step size for each coordinate: the meta-parameters hold an array "rate/NAME" for each
    parameter NAME, the inner steps are `w - rate * gradient`, and the update is the negative gradient of the query
    loss with respect to parameters and rates alike. The paper takes one step; here each of `local_steps` has the same
    rates. `inner.learning_rate` is only where the rates start.

    What MAML asks of `grad_fn` is asked here, too; it never sees the rates.
    """
    return _negative_mean(
        [
            _pulled_back(
                partial(_adapted_by_rates, task=task.support, grad_fn=grad_fn, inner=inner),
                meta_params,
                task.query,
                grad_fn,
            )
            for task in tasks
        ]
    )


ALGORITHMS: dict[str, Callable[[Params, Sequence[Any], GradFn, Inner], Params]] = {
    "reptile": reptile,
    "fedavg": fedavg,
    "prox": prox,
    "fomaml": fomaml,
    "anil": anil,
    "maml": maml,
    "meta_sgd": meta_sgd,
}
"""By the name that a plan uses. `InnerLoop.by_episode` says which take episodes, and which take plain tasks."""


def _adapted(
    start: Params,
    task: Any,  # noqa: ANN401 - a task is whatever `grad_fn` takes
    grad_fn: GradFn,
    inner: Inner,
    moved: Collection[str] | None = None,
) -> Params:
    """`local_steps` steps of gradient descent from `start`; of all parameters, or of those named in `moved`."""
    adapted = start
    for _ in range(inner.local_steps):
        gradient = grad_fn(adapted, task)
        step = add_scaled(adapted, -inner.learning_rate, gradient)
        adapted = step if moved is None else {name: step[name] if name in moved else adapted[name] for name in step}
    return adapted


def _adapted_by_rates(
    meta_params: Params,
    task: Any,  # noqa: ANN401 - as above
    grad_fn: GradFn,
    inner: Inner,
) -> Params:
    """`local_steps` steps, each coordinate with the rate that the meta-parameters hold for it."""
    adapted = model_params(meta_params)
    for _ in range(inner.local_steps):
        gradient = grad_fn(adapted, task)
        adapted = {name: value - meta_params[RATE + name] * gradient[name] for name, value in adapted.items()}
    return adapted


def _pulled_back(
    adapt: Callable[[Params], Params],
    meta_params: Params,
    query: Any,  # noqa: ANN401 - as above
    grad_fn: GradFn,
) -> Params:
    """The gradient of the query's loss at `adapt(meta_params)` with respect to `meta_params`, by the chain rule."""
    adapted, pull_back = vjp(adapt, meta_params)[:2]  # a third comes only with `has_aux`
    gradient = grad_fn(adapted, query)
    (pulled,) = pull_back({name: gradient[name] for name in adapted})
    found: Params = pulled
    return found


def _negative_mean(gradients: list[Params]) -> Params:
    return scale(mean(gradients), -1.0)

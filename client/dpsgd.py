"""Differentially private gradients of a task: clipped per unit, summed, noised, divided by a public constant.

What is released by one call is `(sum of the drawn units' clipped gradients + N(0, (z C)^2 I)) / B` with noise
multiplier z, clip norm C and expected batch size B. The unit is a record, or, where the task says which records
belong together (`Task.unit`), all records of one customer: a unit's gradient is then the sum of its records'
gradients, clipped as one, and its records are drawn together or not at all.

Sensitivity, under zero-out adjacency: the clipped gradient of a unit has Euclidean norm at most C over all parameters
together, and a unit that is zeroed out adds nothing, so the sum moves by at most C, and the mean by at most C / B,
because B is a public constant (sample rate times *declared* size) and not the number of records that were drawn.
The noise's standard deviation is z times that, every unit is in the sum independently with the sample rate, so a call
is one step of a `poisson_gaussian` PrivacyEvent (Abadi et al. 2016, "Deep Learning with Differential Privacy",
algorithm 1), for one record or for one customer with all of his. An empty batch is noised like any other, and a record
whose gradient is not finite counts as zero, so neither can be told from the outside.

Two engines, one answer: the closed form where the model is proved to be of linear layers and element-wise activations,
Opacus' hooks for any other. Both sample, clip and add noise by the same functions, in `mechanism`; which of them ran
changes the time it took and nothing that is released.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Literal, Protocol

import torch
from torch import Tensor

from metarisk_common.algorithms import GradFn
from metarisk_common.params import Params
from metarisk_common.plan import Mechanism

from . import mechanism as acts
from . import opacus_engine
from .closed_form import ClosedForm, GradsFn, divisors
from .layers import Stage, stages_of
from .mechanism import RecordLoss, Records, check_names, check_size, checked_losses
from .rng import SecureRandom

SummedGradient = Callable[[Params, Tensor, Tensor], Params]
"""`gradient(params, x, y)` of the summed loss of some records."""

Engine = Literal["auto", "closed-form", "opacus"]
"""`auto`: the closed form where it can be proved right, else Opacus."""


class PrivateEngine(Protocol):
    """How private gradients are computed is an engine's own matter; what they are, this module's docstring says."""

    def __call__(
        self,
        model: torch.nn.Module,
        loss: RecordLoss,
        *,
        mechanism: Mechanism,
        expected_batch_size: float,
        rng: SecureRandom,
    ) -> GradFn:
        """Build a gradient function for this model."""


def private_gradient(
    model: torch.nn.Module,
    loss: RecordLoss,
    *,
    mechanism: Mechanism,
    expected_batch_size: float,
    rng: SecureRandom,
    engine: Engine = "auto",
) -> GradFn:
    """Build the gradient function whose calls are steps of a privacy event.

    Parameters go in and gradients come out as dicts of tensors, named as in `model.named_parameters()`; the model
    itself is never changed. The model must treat rows independently (no batch normalisation). Without `max_grad_norm`
    there is neither clipping nor noise: ordinary SGD on sampled records, divided by the constant.

    Args:
        model: gives outputs (rows, ...) from inputs (rows, features); float32 or float64.
        loss: per-record losses.
        mechanism: public sample rate, clip norm and noise multiplier.
        expected_batch_size: public: sample rate times declared size. Never derived from the task's records.
        rng: where sampling and noise come from; one thread at a time.
        engine: how to compute it.

    Raises:
        ValueError: expected_batch_size is not a finite number above 0; the closed form was asked for and cannot take
            the model; or, from a call, the parameters' names are not the model's, or the loss does not give one value
            a record.

    """
    check_size(expected_batch_size)
    stages = _stages(model, engine)
    if stages is not None:
        return ClosedForm(stages, _names(model), loss, mechanism, [expected_batch_size], rng).of_task
    if mechanism.max_grad_norm is None:
        return _sampled_gradient(model, loss, mechanism.sample_rate, expected_batch_size, rng)
    return opacus_engine.private_gradient(
        model, loss, mechanism=mechanism, expected_batch_size=expected_batch_size, rng=rng
    )


def private_gradients(
    model: torch.nn.Module,
    loss: RecordLoss,
    *,
    mechanism: Mechanism,
    expected_batch_size: float | Sequence[float],
    rng: SecureRandom,
    engine: Engine = "auto",
) -> GradsFn:
    """Build the gradient function of several tasks, each at its own parameters; the closed form takes them in one go.

    `grads_fn(stacked_params, tasks)` takes and gives dicts of (tasks, ...) tensors; what it gives for a task is what
    `private_gradient` releases for it, with sampling and noise of its own from the one `rng`. So a record that is in
    one task only costs one step.

    Args:
        model: as in `private_gradient`.
        loss: as in `private_gradient`.
        mechanism: the same for all tasks.
        expected_batch_size: public; the same for all tasks, or one for each.
        rng: where all tasks' sampling and noise come from; one thread at a time.
        engine: as in `private_gradient`; Opacus takes one task after the other.

    Raises:
        ValueError: as in `private_gradient`; or, from a call, there are not as many sizes as tasks.

    """
    sizes = [expected_batch_size] if isinstance(expected_batch_size, float | int) else list(expected_batch_size)
    for size in sizes:
        check_size(size)
    stages = _stages(model, engine)
    if stages is not None:
        return ClosedForm(stages, _names(model), loss, mechanism, sizes, rng).of_tasks
    summed = private_gradient(model, loss, mechanism=mechanism, expected_batch_size=1.0, rng=rng, engine="opacus")

    def grads_fn(params: Params, tasks: Sequence[Records]) -> Params:
        found = [
            {name: value / divisor for name, value in summed(own, task).items()}
            for own, task, divisor in zip(
                _unstacked(params, len(tasks)), tasks, divisors(sizes, len(tasks)), strict=True
            )
        ]
        return {name: torch.stack([each[name] for each in found]) for name in params}

    return grads_fn


def plain_gradient(model: torch.nn.Module, loss: RecordLoss) -> GradFn:
    """Build the gradient function of the mean loss over all of a task's records: for baselines, not private.

    Args:
        model: gives outputs (rows, ...) from inputs (rows, features); copied, never changed.
        loss: per-record losses.

    Raises:
        ValueError: from a call, if the parameters' names are not the model's or the loss is not one value a record.

    """
    gradient = _summed_gradient(model, loss)

    def grad_fn(params: Params, task: Records) -> Params:
        return {name: total / len(task.x) for name, total in gradient(params, task.x, task.y).items()}

    return grad_fn


def differentiable_gradient(
    model: torch.nn.Module, loss: RecordLoss, *, sample_rate: float, expected_batch_size: float, rng: SecureRandom
) -> GradFn:
    """Build a gradient function that `torch.func` can differentiate by the parameters: for MAML, **not private**.

    It gives what `private_gradient` gives without `max_grad_norm`: the gradient on sampled records over the constant.

    Args:
        model: gives outputs (rows, ...) from inputs (rows, features); copied, never changed.
        loss: per-record losses, twice differentiable.
        sample_rate: public.
        expected_batch_size: public, as in `private_gradient`.
        rng: where sampling comes from.

    Raises:
        ValueError: as from `private_gradient`.

    """
    check_size(expected_batch_size)
    copy = deepcopy(model).train()
    names = _names(copy)

    def total(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return checked_losses(loss, torch.func.functional_call(copy, params, (x,)), y).sum()

    def gradient(params: Params, x: Tensor, y: Tensor) -> Params:
        check_names(params, names)
        found: Params = torch.func.grad(total)(params, x, y)
        return found

    return _sampled(gradient, sample_rate, expected_batch_size, rng)


def _sampled_gradient(
    model: torch.nn.Module, loss: RecordLoss, sample_rate: float, expected_batch_size: float, rng: SecureRandom
) -> GradFn:
    return _sampled(_summed_gradient(model, loss), sample_rate, expected_batch_size, rng)


def _sampled(gradient: SummedGradient, sample_rate: float, expected_batch_size: float, rng: SecureRandom) -> GradFn:
    def grad_fn(params: Params, task: Records) -> Params:
        batch = acts.poisson_batch(task, sample_rate, rng)
        return {name: value / expected_batch_size for name, value in gradient(params, batch.x, batch.y).items()}

    return grad_fn


def _summed_gradient(model: torch.nn.Module, loss: RecordLoss) -> SummedGradient:
    copy = deepcopy(model).train()
    names = _names(copy)

    def gradient(params: Params, x: Tensor, y: Tensor) -> Params:
        check_names(params, names)
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        outputs = torch.func.functional_call(copy, leaves, (x,))
        total = checked_losses(loss, outputs, y).sum()
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    return gradient


def _stages(model: torch.nn.Module, engine: Engine) -> Sequence[Stage] | None:
    if engine == "opacus":
        return None
    stages = stages_of(model)
    if stages is None and engine == "closed-form":
        raise ValueError(
            "the closed form takes linear layers and element-wise activations only, none shared or frozen; "
            'use engine "opacus" for this model'
        )
    return stages


def _names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _unstacked(params: Params, tasks: int) -> list[Params]:
    return [{name: value[index] for name, value in params.items()} for index in range(tasks)]

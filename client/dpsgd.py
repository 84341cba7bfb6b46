"""Differentially private gradients of one task: clipped per record, summed, noised, divided by a public constant.

What is released by one call is `(sum of clipped gradients of the sampled records + N(0, (z C)^2 I)) / B` with noise
multiplier z, clip norm C and expected batch size B. Sensitivity, under zero-out adjacency: the clipped gradient of a
record has Euclidean norm at most C over all parameters together, and a record that is zeroed out adds nothing, so the
sum moves by at most C, and the mean by at most C / B, because B is a public constant (sample rate times *declared*
size) and not the number of records that were drawn. The noise's standard deviation is z times that, every record is
in the sum independently with the sample rate, so a call is one step of a `poisson_gaussian` PrivacyEvent (Abadi et
al. 2016, "Deep Learning with Differential Privacy", algorithm 1). An empty batch is noised like any other, and a
record whose gradient is not finite counts as zero, so neither can be told from the outside.

An engine is a function with the signature of `private_gradient`; any two must give the same answer without noise.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from metarisk_common.algorithms import GradFn
from metarisk_common.params import Params
from metarisk_common.plan import Mechanism

from .rng import SecureRandom

RecordLoss = Callable[[Tensor, Tensor], Tensor]
"""`loss(outputs, y)`: one loss a record, (rows,), each from its own row alone."""


class Records(Protocol):
    """What an engine reads of a task. `x`: (rows, features) in the model's dtype. `y`: (rows,)."""

    @property
    def x(self) -> Tensor:
        """Model inputs."""

    @property
    def y(self) -> Tensor:
        """Labels."""


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
) -> GradFn:
    """Build the gradient function whose calls are steps of a privacy event; the engine is Opacus (per-record hooks).

    Parameters go in and gradients come out as dicts of tensors, named as in `model.named_parameters()`; the model
    itself is copied and never changed. The model must treat rows independently (no batch normalisation). Without
    `max_grad_norm` there is neither clipping nor noise: ordinary SGD on sampled records, divided by the constant.

    Args:
        model: gives outputs (rows, ...) from inputs (rows, features); float32 or float64.
        loss: per-record losses.
        mechanism: public sample rate, clip norm and noise multiplier.
        expected_batch_size: public: sample rate times declared size. Never derived from the task's records.
        rng: where sampling and noise come from; one thread at a time.

    Raises:
        ValueError: expected_batch_size is not a finite number above 0; or, from a call, the parameters' names are
            not the model's, or the loss does not give one value a record.

    """
    if not 0 < expected_batch_size < math.inf:
        raise ValueError("expected_batch_size must be a finite number above 0")
    if mechanism.max_grad_norm is None:
        return _sampled_gradient(model, loss, mechanism.sample_rate, expected_batch_size, rng)
    return _opacus_gradient(model, loss, mechanism, expected_batch_size, rng)


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


def _sampled_gradient(
    model: torch.nn.Module, loss: RecordLoss, sample_rate: float, expected_batch_size: float, rng: SecureRandom
) -> GradFn:
    gradient = _summed_gradient(model, loss)

    def grad_fn(params: Params, task: Records) -> Params:
        total = gradient(params, *_poisson_batch(task, sample_rate, rng))
        return {name: value / expected_batch_size for name, value in total.items()}

    return grad_fn


def _opacus_gradient(
    model: torch.nn.Module, loss: RecordLoss, mechanism: Mechanism, expected_batch_size: float, rng: SecureRandom
) -> GradFn:
    # Imported late: two seconds and 115 MB that whoever wants no Opacus does without.
    from opacus.grad_sample import GradSampleModule  # noqa: PLC0415

    copy = deepcopy(model).train()
    trainable = _trainable(copy)
    module = GradSampleModule(copy, loss_reduction="sum")
    optimizer = _secure_optimizer()(
        torch.optim.SGD(trainable.values(), lr=0.0),
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=expected_batch_size,
        rng=rng,
    )

    def grad_fn(params: Params, task: Records) -> Params:
        _check_names(params, trainable)
        x, y = _poisson_batch(task, mechanism.sample_rate, rng)
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(params[name])
        try:
            # Inputs that require gradients keep torch from warning that the hooks' inputs have none.
            losses = _record_losses(loss, module(x.detach().requires_grad_()), y)
            torch.autograd.backward(losses.sum())
            optimizer.pre_step()
            return {name: _take_gradient(parameter) for name, parameter in trainable.items()}
        finally:
            # Per-record gradients are not private: none stays, not even after an error.
            optimizer.zero_grad(set_to_none=True)

    return grad_fn


@cache
def _secure_optimizer() -> Any:  # noqa: ANN401 - Opacus has no types
    """Give Opacus' optimizer with our noise and with clipping that survives records whose gradient is not finite."""
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    class SecureOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
        def __init__(self, optimizer: torch.optim.Optimizer, *, rng: SecureRandom, **arguments: float) -> None:
            super().__init__(optimizer, **arguments)
            self._rng = rng

        def clip_and_accumulate(self) -> None:
            with torch.no_grad():
                samples = self.grad_samples
                bad = ~torch.stack([sample.flatten(1).sum(1) for sample in samples]).sum(0).isfinite()
                # Filling, not multiplying: NaN times 0 is NaN. Done to every batch, so its time tells nothing.
                for sample in samples:
                    sample.masked_fill_(bad.view(-1, *[1] * (sample.dim() - 1)), 0.0)
                super().clip_and_accumulate()

        def add_noise(self) -> None:
            std = self.noise_multiplier * self.max_grad_norm
            for parameter in self.params:
                total = parameter.summed_grad
                # Added in float64 and rounded once: the rounding hides the sum's own low bits from whoever would
                # read them out of the noise (Mironov 2012).
                noise = torch.from_numpy(self._rng.normal(tuple(total.shape), std)).to(total.device)
                parameter.grad = (total.double() + noise).to(total.dtype).view_as(parameter)

    return SecureOptimizer


def _summed_gradient(model: torch.nn.Module, loss: RecordLoss) -> Callable[[Params, Tensor, Tensor], Params]:
    copy = deepcopy(model).train()
    trainable = _trainable(copy)

    def gradient(params: Params, x: Tensor, y: Tensor) -> Params:
        _check_names(params, trainable)
        leaves = {name: params[name].detach().requires_grad_() for name in trainable}
        outputs = torch.func.functional_call(copy, leaves, (x,))
        total = _record_losses(loss, outputs, y).sum()
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    return gradient


def _poisson_batch(task: Records, sample_rate: float, rng: SecureRandom) -> tuple[Tensor, Tensor]:
    """Draw each record independently. x: (drawn, features), y: (drawn,), possibly none at all."""
    if sample_rate == 1:
        return task.x, task.y
    drawn = torch.from_numpy(rng.bernoulli(len(task.x), sample_rate)).to(task.x.device)
    return task.x[drawn], task.y[drawn]


def _record_losses(loss: RecordLoss, outputs: Tensor, y: Tensor) -> Tensor:
    losses = loss(outputs, y)
    if losses.shape != y.shape[:1]:
        raise ValueError("loss must give one value a record, not their sum or mean")
    return losses


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_names(params: Params, trainable: dict[str, torch.nn.Parameter]) -> None:
    if params.keys() != trainable.keys():
        raise ValueError(f"params must hold exactly the model's parameters: {', '.join(trainable)}")


def _take_gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("the engine gave no gradient")
    return parameter.grad.detach()

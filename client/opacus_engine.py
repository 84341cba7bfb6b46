"""Private gradients from Opacus' per-record hooks: for every model that the closed form cannot take, and its judge.

Opacus gives each record's gradient; sampling, clipping and noise are ours (`mechanism`). Of its optimizer, the
order of the acts and the division by the expected batch size remain.
"""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metarisk_common.algorithms import GradFn
from metarisk_common.params import Params
from metarisk_common.plan import Mechanism

from . import mechanism as acts
from .mechanism import Batch, RecordLoss, Records, check_names, checked_losses
from .rng import SecureRandom


def private_gradient(
    model: torch.nn.Module,
    loss: RecordLoss,
    *,
    mechanism: Mechanism,
    expected_batch_size: float,
    rng: SecureRandom,
) -> GradFn:
    """Build the gradient function that `dpsgd.private_gradient` describes; `mechanism` must have a clip norm.

    Released is what `mechanism` says. Per-record gradients of all parameters are in memory at once: (drawn, ...) each.
    """
    # Imported late: two seconds and 115 MB that whoever wants no Opacus does without.
    from opacus.grad_sample import GradSampleModule  # noqa: PLC0415

    copy = deepcopy(model).train()
    trainable = {name: parameter for name, parameter in copy.named_parameters() if parameter.requires_grad}
    module = GradSampleModule(copy, loss_reduction="sum")
    optimizer = _secure_optimizer()(
        torch.optim.SGD(trainable.values(), lr=0.0),
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=expected_batch_size,
        rng=rng,
    )

    def grad_fn(params: Params, task: Records) -> Params:
        check_names(params, trainable)
        batch = acts.poisson_batch(task, mechanism.sample_rate, rng)
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(params[name])
        try:
            # Inputs that require gradients keep torch from warning that the hooks' inputs have none.
            losses = checked_losses(loss, module(batch.x.detach().requires_grad_()), batch.y)
            torch.autograd.backward(losses.sum())
            optimizer.batch = batch
            # Clips, adds noise and divides by the public `expected_batch_size`.
            optimizer.pre_step()
            return {name: _take_gradient(parameter) for name, parameter in trainable.items()}
        finally:
            # Per-record gradients are not private: none stays, not even after an error.
            optimizer.batch = None
            optimizer.zero_grad(set_to_none=True)

    return grad_fn


@cache
def _secure_optimizer() -> Any:  # noqa: ANN401 - Opacus has no types
    """Give Opacus' optimizer with our clipping, by unit and safe from what is not finite, and with our noise."""
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    class SecureOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
        batch: Batch | None = None

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
                units = [_summed_by_unit(sample, self.batch) for sample in samples]
                norms = [torch.linalg.vector_norm(unit.flatten(1), dim=1, dtype=torch.float64) for unit in units]
                factors = acts.clip_factors(torch.stack(norms).square().sum(0), self.max_grad_norm)
                for parameter, unit in zip(self.params, units, strict=True):
                    finite = unit.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # A sum may overflow; its factor is 0.
                    parameter.summed_grad = torch.einsum("i,i...", factors.to(unit.dtype), finite)

        def add_noise(self) -> None:
            std = self.noise_multiplier * self.max_grad_norm
            for parameter in self.params:
                parameter.grad = acts.noised(parameter.summed_grad, std, self._rng).view_as(parameter)

    return SecureOptimizer


def _summed_by_unit(sample: Tensor, batch: Batch | None) -> Tensor:
    """Per-record gradients (drawn, ...) to per-unit gradients (units, ...)."""
    if batch is None or batch.unit is None:
        return sample
    return sample.new_zeros((batch.units, *sample.shape[1:])).index_add_(0, batch.unit, sample)


def _take_gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("the engine gave no gradient")
    return parameter.grad.detach()

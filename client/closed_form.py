"""Private gradients in closed form, for networks of linear layers and element-wise activations; many tasks at once.

At a linear layer a record's gradient is the outer product of delta, the loss' gradient at the layer's output, with the
layer's input a (and 1 for the bias), so its squared norm is |delta|^2 (|a|^2 + 1): one forward and one backward to the
outputs give every record's norm (Goodfellow 2015, "Efficient per-example gradient computations"), and one product
of rescaled deltas with inputs gives the sum of the clipped gradients. No per-record gradient is ever made. A unit of
several records sums their gradients, and the squared norm of that sum is the sum over the unit's pairs (i, j) of
(delta_i . delta_j)(a_i . a_j + 1): two Gram matrices a layer.

What is released, and its sensitivity, `mechanism` says; the tests hold this engine to Opacus' hooks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metarisk_common.params import Params
from metarisk_common.plan import Mechanism

from . import mechanism as acts
from .layers import Layer, Stage
from .mechanism import Batch, RecordLoss, Records, check_names, checked_losses
from .rng import SecureRandom

GradsFn = Callable[[Params, Sequence[Records]], Params]
"""`grads_fn(stacked_params, tasks)`: a gradient a task, (tasks, ...) each, at a task's own parameters, (tasks, ...)."""

# Larger than what rounding can hide of a unit's summed gradient behind its records' own, as a share of these, squared:
# float64 in the Gram matrices (the root of widths times 1e-16), float32 in the product of deltas and inputs.
_HIDDEN: Final = 1e-12
# Float32's squares vanish below 1e-38, as many as a row is wide: never less than that is assumed of a row's square.
_VANISHED: Final = 1e-34


@dataclass(frozen=True)
class _Units:
    """Where the rows of several tasks stand, spread over `count` units of at most `most` records.

    `of_row`, (tasks * rows,), is a row's unit and `count` for padding; `place`, likewise, is where `spread` puts it.
    """

    count: int
    most: int
    of_row: Tensor
    place: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(..., rows, width) to (units, most, width) in float64, zero where a unit has fewer records."""
        width = values.shape[-1]
        room = values.new_zeros((self.count * self.most + 1, width), dtype=torch.float64)
        # Padding, which is all zero, goes to the last place.
        room.index_copy_(0, self.place, values.reshape(-1, width).double())
        return room[:-1].view(self.count, self.most, width)


@dataclass(frozen=True)
class _Stack:
    """One task's batch, or several as one, with a leading dimension of tasks and, in some rows, padding.

    x: (..., rows, features), y: (..., rows), padding: (..., rows) bool.
    """

    x: Tensor
    y: Tensor
    padding: Tensor | None
    units: _Units | None


@dataclass(frozen=True)
class ClosedForm:
    """Private gradients of one model; without `max_grad_norm` there is neither clipping nor noise.

    Attributes:
        stages: the model, from `layers.stages_of`.
        names: of the model's parameters, in its order, which is the order of the noise.
        loss: per-record losses.
        mechanism: public sample rate, clip norm and noise multiplier.
        expected_batch_sizes: public; one for every task alike, or one for each.
        rng: for all tasks: their batches are drawn first, in order, then noise for one task after the other.

    """

    stages: Sequence[Stage]
    names: Sequence[str]
    loss: RecordLoss
    mechanism: Mechanism
    expected_batch_sizes: Sequence[float]
    rng: SecureRandom

    @cached_property
    def _layers(self) -> list[Layer]:
        return [stage for stage in self.stages if isinstance(stage, Layer)]

    @cached_property
    def _biases(self) -> Tensor:
        """(layers, 1), what a bias adds to the squared norm of its layer's input."""
        return torch.tensor([[float(layer.bias is not None)] for layer in self._layers], dtype=torch.float64)

    def of_task(self, params: Params, task: Records) -> Params:
        """Give a task's private gradient, as `dpsgd.private_gradient` describes."""
        check_names(params, self.names)
        total = self._total(params, _alone(self._batch(task)))
        return self._released(total, self.expected_batch_sizes[0], params)

    def of_tasks(self, params: Params, tasks: Sequence[Records]) -> Params:
        """Give private gradients, (tasks, ...) each, as `dpsgd.private_gradients` describes."""
        check_names(params, self.names)
        sizes = divisors(self.expected_batch_sizes, len(tasks))
        batches = [self._batch(task) for task in tasks]
        # Batches of like size together: padding at most doubles a batch.
        groups: dict[int, list[int]] = {}
        for index, batch in enumerate(batches):
            groups.setdefault(len(batch.x).bit_length(), []).append(index)
        if len(groups) == 1:
            total = self._total(params, _stacked(batches))
        else:
            totals = [
                self._total(
                    {name: value[group] for name, value in params.items()}, _stacked([batches[i] for i in group])
                )
                for group in groups.values()
            ]
            total = torch.cat(totals)[np.argsort(list(chain(*groups.values())))]
        return self._released(total, total.new_tensor(sizes).unsqueeze(-1), params)

    def _batch(self, task: Records) -> Batch:
        return acts.poisson_batch(task, self.mechanism.sample_rate, self.rng)

    def _total(self, params: Params, stack: _Stack) -> Tensor:
        """The sum of clipped gradients, all parameters joined: (..., parameters)."""
        inputs, deltas = _inputs_and_deltas(self.stages, params, stack, self.loss)
        if self.mechanism.max_grad_norm is not None:
            inputs, deltas = _clipped(inputs, deltas, self._biases, stack, self.mechanism.max_grad_norm)
        elif stack.padding is not None:
            deltas = [delta.masked_fill(stack.padding.unsqueeze(-1), 0.0) for delta in deltas]
        sums = {}
        for layer, value, delta in zip(self._layers, inputs, deltas, strict=True):
            sums[layer.weight] = torch.matmul(delta.mT, value)
            if layer.bias is not None:
                sums[layer.bias] = delta.sum(-2)
        return torch.cat([sums[name].flatten(stack.x.dim() - 2) for name in self.names], dim=-1)

    def _released(self, total: Tensor, expected_batch_size: float | Tensor, like: Params) -> Params:
        clip = self.mechanism.max_grad_norm
        released = total if clip is None else acts.noised(total, self.mechanism.noise_multiplier * clip, self.rng)
        # Only a public constant divides: never the number of records, or of units, that were drawn.
        mean = released / expected_batch_size
        shapes = [like[name].shape for name in self.names]
        pieces = mean.split_with_sizes([math.prod(shape[mean.dim() - 1 :]) for shape in shapes], dim=-1)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, shapes, strict=True)}


def divisors(expected_batch_sizes: Sequence[float], tasks: int) -> list[float]:
    """Give each task its expected batch size.

    Raises:
        ValueError: there is neither one for all nor one for each.

    """
    if len(expected_batch_sizes) not in {1, tasks}:
        raise ValueError(f"expected_batch_size must be one number or one for each of {tasks} tasks")
    return list(expected_batch_sizes) * (tasks if len(expected_batch_sizes) == 1 else 1)


def _alone(batch: Batch) -> _Stack:
    return _Stack(batch.x.detach(), batch.y, None, None if batch.unit is None else _units([batch], None))


def _stacked(batches: Sequence[Batch]) -> _Stack:
    """Pad batches with rows of zeros."""
    x = pad_sequence([batch.x.detach() for batch in batches], batch_first=True)
    y = pad_sequence([batch.y for batch in batches], batch_first=True)
    lengths = torch.tensor([len(batch.x) for batch in batches], device=x.device)
    padding = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(-1)
    by_record = all(batch.unit is None for batch in batches)
    return _Stack(x, y, padding, None if by_record else _units(batches, padding))


def _units(batches: Sequence[Batch], padding: Tensor | None) -> _Units:
    """Number the units of all batches through, and their records within each."""
    numbered, count = [], 0
    for batch in batches:
        own = torch.arange(len(batch.x), device=batch.x.device) if batch.unit is None else batch.unit
        numbered.append(own + count)
        count += batch.units
    unit = torch.cat(numbered)
    records = torch.bincount(unit, minlength=count)
    order = unit.argsort(stable=True)
    rank = torch.empty_like(unit)
    rank[order] = torch.arange(len(unit), device=unit.device) - (records.cumsum(0) - records)[unit[order]]
    most = int(records.max()) if count else 0
    place = unit * most + rank
    if padding is None:
        return _Units(count, most, unit, place)
    real = ~padding.flatten()
    ends = torch.tensor([[count], [count * most]], device=unit.device).repeat(1, len(real))
    ends[:, real] = torch.stack([unit, place])
    return _Units(count, most, *ends)


def _inputs_and_deltas(
    stages: Sequence[Stage], params: Params, stack: _Stack, loss: RecordLoss
) -> tuple[list[Tensor], list[Tensor]]:
    """Run forward, and backward to the layers' outputs only: every layer's input and delta, (..., rows, width)."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    value, last = stack.x, stack.x.dim() - 2
    affine = torch.baddbmm if last else torch.addmm
    with torch.enable_grad():
        for stage in stages:
            if not isinstance(stage, Layer):
                value = stage(value)
                continue
            inputs.append(value.detach())
            weight = params[stage.weight].detach().mT
            if stage.bias is None:
                value = torch.matmul(value, weight)
            else:
                value = affine(params[stage.bias].detach().unsqueeze(-2), value, weight)
            if not outputs:
                value.requires_grad_()
            outputs.append(value)
        losses = checked_losses(loss, value.flatten(0, last), stack.y.flatten(0, last))
        return inputs, list(torch.autograd.grad(losses, outputs, torch.ones_like(losses)))


def _clipped(
    inputs: list[Tensor], deltas: list[Tensor], biases: Tensor, stack: _Stack, max_grad_norm: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Rescale deltas so that a unit's gradient, over all layers together, has a norm of at most `max_grad_norm`.

    Returns inputs, finite, and deltas, zero in padding and in records whose gradient is not finite.
    """
    norms = torch.stack([torch.linalg.vector_norm(value, dim=-1).flatten() for value in [*deltas, *inputs]])
    of_deltas, of_inputs = norms.double().square_().clamp_(min=_VANISHED).chunk(2)
    squared = (of_deltas * (of_inputs + biases.to(norms.device))).sum(0)
    inputs = [value.nan_to_num(0.0, 0.0, 0.0) for value in inputs]
    if stack.units is None:
        factors = acts.clip_factors(squared, max_grad_norm)
    else:
        finite = squared.isfinite()
        inputs, deltas = _weighted(inputs, finite), _weighted(deltas, finite)
        records = torch.where(finite, squared, 0.0)
        factors = acts.clip_factors(_of_units(stack.units, inputs, deltas, biases, records), max_grad_norm)
        factors = torch.cat([factors, factors.new_zeros(1)])[stack.units.of_row]
    if stack.padding is not None:
        factors = factors * ~stack.padding.flatten()
    return inputs, _weighted(deltas, factors.to(norms.dtype))


def _weighted(values: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Multiply rows, (..., rows, width), by finite weights, one a row; what is not finite becomes zero.

    Done to every batch, so its time tells nothing.
    """
    return [(value * weights.view(*value.shape[:-1], 1)).nan_to_num_(0.0, 0.0, 0.0) for value in values]


def _of_units(units: _Units, inputs: list[Tensor], deltas: list[Tensor], biases: Tensor, records: Tensor) -> Tensor:
    """Give the squared norm of each unit's summed gradient, (units,) float64; `records` has those of its records'."""
    # Where a unit's gradients cancel, rounding hides some of their sum: never less than that is assumed of it.
    squared = _HIDDEN * units.spread(records.sqrt().unsqueeze(-1)).sum((1, 2)).square()
    for value, delta, bias in zip(inputs, deltas, biases.flatten().tolist(), strict=True):
        of_inputs, of_deltas = units.spread(value), units.spread(delta)
        gram = torch.bmm(of_deltas, of_deltas.mT) * (torch.bmm(of_inputs, of_inputs.mT) + bias)
        squared += gram.sum((1, 2))
    return squared

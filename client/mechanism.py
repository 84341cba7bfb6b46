"""What makes a gradient private, for every engine alike: Poisson sampling, clipping, Gaussian noise.

A step releases `(sum over drawn units of the clipped gradient + N(0, (z C)^2 I)) / B`. A unit is a record, or all
records of one customer (`Task.unit`). Three acts carry the proof, and each engine calls them here by name: a unit
enters the sum by its own coin (`poisson_batch`), with Euclidean norm at most C (`clip_factors`), and the sum gets
noise whose scale depends on nothing private (`noised`). The division by the public B stays in the engines' plain sight.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from metarisk_common.params import Params

from .rng import SecureRandom

RecordLoss = Callable[[Tensor, Tensor], Tensor]
"""`loss(outputs, y)`: one loss a record, (rows,), each from its own row alone."""

_SLACK: Final = 1e-6
_SMALLEST: Final = 1e-37


class Records(Protocol):
    """What an engine reads of a task."""

    @property
    def x(self) -> Tensor:
        """Model inputs, (rows, features) in the model's dtype."""

    @property
    def y(self) -> Tensor:
        """Labels, (rows,)."""

    @property
    def unit(self) -> Any | None:  # noqa: ANN401 - NumPy array or tensor
        """(rows,) int64 from 0 without gaps, the same for records of one privacy unit; None: each its own."""


@dataclass(frozen=True)
class Batch:
    """The records that one step sees.

    Attributes:
        x: (drawn, features).
        y: (drawn,).
        unit: (drawn,) int64 from 0 without gaps, on the device of `x`; None where every record is a unit.
        units: how many units were drawn.

    """

    x: Tensor
    y: Tensor
    unit: Tensor | None
    units: int


def poisson_batch(task: Records, sample_rate: float, rng: SecureRandom) -> Batch:
    """Draw every unit of a task independently with the sample rate, and with it all its records; perhaps none at all.

    A unit's presence in the batch is a coin of its own, so it tells nothing about the others, and a unit that is
    zeroed out changes nobody else's coin: this is what "Poisson" means in a `poisson_gaussian` event.
    """
    unit = None if task.unit is None else torch.as_tensor(task.unit, dtype=torch.int64, device=task.x.device)
    units = len(task.x) if unit is None else int(unit.max()) + 1 if len(unit) else 0
    if sample_rate == 1:
        return Batch(task.x, task.y, unit, units)
    drawn = torch.from_numpy(rng.bernoulli(units, sample_rate)).to(task.x.device)
    rows = (drawn if unit is None else drawn[unit]).nonzero().squeeze(-1)
    kept = None if unit is None else (drawn.cumsum(0) - 1)[unit[rows]]
    return Batch(task.x[rows], task.y[rows], kept, len(rows) if unit is None else int(drawn.sum()))


def clip_factors(squared_norms: Tensor, max_grad_norm: float) -> Tensor:
    """Give the factor of each unit's gradient that brings its Euclidean norm to at most `max_grad_norm`.

    Sensitivity: a unit's gradient times its factor has a norm of at most C over all parameters together, so zeroing
    out a unit moves the sum by at most C. A gradient that is not finite, or whose norm passes 1e37 C (its factor
    would be subnormal in float32, where rounding can double it), has the factor 0: it counts as zero.

    The factor is `min(1, C / (norm + 1e-6))`, as in Opacus. The 1e-6 keeps the clipped norm below C by more than
    float64 rounds (for norms up to 1e9; beyond, by one rounding, 1e-16), covers squares that vanish, and makes the
    figures those of unmodified Opacus, which the tests hold them to. Float32 rounds a clipped gradient's entries by
    6e-8 of themselves: to epsilon, that is nothing.

    Args:
        squared_norms: (units,), NaN and infinity allowed; float64 even where the gradients are float32.
        max_grad_norm: C.

    Returns:
        (units,) factors within [0, 1], never NaN.

    """
    factors = (max_grad_norm / (squared_norms.sqrt() + _SLACK)).clamp_(max=1.0).nan_to_num_(nan=0.0)
    return torch.threshold_(factors, _SMALLEST, 0.0)


def noised(total: Tensor, std: float, rng: SecureRandom) -> Tensor:
    """Add independent normals of standard deviation `std` to every entry of a sum of clipped gradients.

    With `std = z C` and a sensitivity of C this is the Gaussian mechanism with noise multiplier z. The noise comes from
    the CSPRNG on the CPU whatever the device, in one stream: tensors noised one after another, or joined and noised
    at once, get the same values.
    """
    # Added in float64 and rounded once: the rounding hides the sum's own low bits from whoever would read them out
    # of the noise (Mironov 2012).
    noise = torch.from_numpy(rng.normal(tuple(total.shape), std)).to(total.device)
    return (total + noise).to(total.dtype)


def checked_losses(loss: RecordLoss, outputs: Tensor, y: Tensor) -> Tensor:
    """Give the losses, (rows,): a loss over the whole batch would tie records together, and no clipping would hold.

    Raises:
        ValueError: the loss does not give one value a record.

    """
    losses = loss(outputs, y)
    if losses.shape != y.shape[:1]:
        raise ValueError("loss must give one value a record, not their sum or mean")
    return losses


def check_names(params: Params, names: Iterable[str]) -> None:
    """Refuse parameters that are not the model's.

    Raises:
        ValueError: some are missing or foreign.

    """
    expected = list(names)
    if params.keys() != set(expected):
        raise ValueError(f"params must hold exactly the model's parameters: {', '.join(expected)}")


def check_size(expected_batch_size: float) -> None:
    """Refuse a divisor that is no public size.

    Raises:
        ValueError: it is not a finite number above 0.

    """
    if not 0 < expected_batch_size < math.inf:
        raise ValueError("expected_batch_size must be a finite number above 0")

"""The models: `scorecard`, additive on binned inputs, and `mlp`. Parameters are plain named arrays outside.

Both end in one logit a record. The constant intercept input that the encoder appends serves as the
scorecard's bias, so that every parameter's gradient is covered by the one bound on an input row's norm.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from .initialisation import model_params
from .params import Params
from .plan import ModelSpec

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Scorecard(nn.Module):
    """One linear layer, no bias: `logit = sum_j weight_j x_j`, each term an exact reason."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        """Build the layer for `width` inputs."""
        super().__init__()
        self.points = nn.Linear(width, 1, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x: (rows, width)` to logits `(rows,)`."""
        out: Tensor = self.points(x)
        return out.squeeze(-1)


class MLP(nn.Module):
    """Linear layers with tanh between; the last one is the head, those before are the body."""

    def __init__(self, width: int, hidden: tuple[int, ...], dtype: torch.dtype) -> None:
        """Build the layers for `width` inputs."""
        super().__init__()
        sizes = (width, *hidden)
        self.body = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x: (rows, width)` to logits `(rows,)`."""
        for layer in self.body:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out.squeeze(-1)


def build(spec: ModelSpec, width: int, dtype: str = "float32") -> nn.Module:
    """Build the Torch module for a specification; its weights are whatever Torch starts with."""
    if spec.kind == "scorecard":
        return Scorecard(width, DTYPES[dtype])
    return MLP(width, spec.hidden, DTYPES[dtype])


def head_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the parameters of the last layer."""
    return ("points.weight",) if spec.kind == "scorecard" else ("head.weight", "head.bias")


def forward(model: nn.Module, params: Params, x: Tensor) -> Tensor:
    """Logits `(rows,)` of `x: (rows, width)` at `params`, which the module itself need not hold.

    Rates that `params` hold besides, as learned under `meta_sgd`, have no say in a score.
    """
    out: Tensor = functional_call(model, model_params(params), (x,))
    return out


def record_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Log-loss of each record, `(rows,)`; `y` is 0 or 1 in the logits' dtype."""
    return functional.binary_cross_entropy_with_logits(logits, y, reduction="none")


def squared_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the squared error of each record, `(rows,)`; `y` in the label's standardised unit."""
    return 0.5 * (outputs - y).square()


def record_loss(spec: ModelSpec) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of each record, `(outputs, y) -> (rows,)`, that a specification asks for."""
    if spec.loss == "squared":
        return squared_losses
    if spec.positive_weight == 1:
        return record_losses
    return partial(weighted_losses, spec.positive_weight)


def weighted_losses(weight: float, logits: Tensor, y: Tensor) -> Tensor:
    """Log-loss of each record, `(rows,)`, with positives counted `weight` times.

    Multiplying alone would teach the model a portfolio with as many times more positives. Its logits are those of the
    true one plus log(weight) (King and Zeng 2001, "Logistic Regression in Rare Events Data", eq. 7), so that much is
    added here and the model's own logits stay true. Gradients are clipped after it, so no record's bound is moved.
    """
    return record_losses(logits + math.log(weight), y) * (1.0 + (weight - 1.0) * y)


def to_tensors(params: Params) -> Params:
    """NumPy arrays to Torch tensors, by copy: nothing that trains may write into a message."""
    return {name: torch.from_numpy(np.array(value)) for name, value in params.items()}


def to_arrays(params: Params) -> Params:
    """Torch tensors to NumPy arrays."""
    return {name: value.detach().cpu().numpy() for name, value in params.items()}

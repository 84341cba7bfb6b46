"""Where training starts: public, the same for every party, and known without Torch, which the server does not need."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

import numpy as np

from .params import Array, Params
from .plan import ModelSpec, Plan

RATE: Final = "rate/"
"""How the name of a learned step size begins, which `meta_sgd` keeps beside each parameter of the model."""


def param_shapes(spec: ModelSpec, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters for `width` inputs, in the module's order."""
    if spec.kind == "scorecard":
        return {"points.weight": (1, width)}
    sizes = (width, *spec.hidden)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        shapes[f"body.{index}.weight"] = (fan_out, fan_in)
        shapes[f"body.{index}.bias"] = (fan_out,)
    return {**shapes, "head.weight": (1, sizes[-1]), "head.bias": (1,)}


def meta_shapes(plan: Plan, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a plan learns: the model's parameters and, under `meta_sgd`, a rate for each."""
    shapes = param_shapes(plan.model, width)
    rates = {RATE + name: shape for name, shape in shapes.items()}
    return {**shapes, **rates} if plan.inner.algorithm == "meta_sgd" else shapes


def model_params(meta_params: Mapping[str, Array]) -> Params:
    """Leave out learned rates: what remains are the parameters of the model, which is all that scores a record."""
    return {name: value for name, value in meta_params.items() if not name.startswith(RATE)}


def initial_params(plan: Plan, width: int) -> Params:
    """Build the first meta-parameters.

    A scorecard starts at zero but for the intercept, which gives the public base rate. An mlp's hidden layers
    start Glorot-uniform (Glorot and Bengio 2010, eq. 16) from the plan's public seed; its head starts at zero
    but for the bias, which gives the base rate. Learned rates start at the plan's learning rate.

    Returns:
        NumPy arrays in the plan's dtype, named and shaped as `meta_shapes` says.

    """
    logit = _start(plan.model)
    generator = np.random.default_rng(plan.model.init_seed)
    params: Params = {}
    for name, shape in meta_shapes(plan, width).items():
        array = np.zeros(shape, plan.dtype)
        if name == "points.weight":
            array[0, -1] = logit / plan.data.encoding.intercept
        elif name.startswith(RATE):
            array[...] = plan.inner.learning_rate
        elif name == "head.bias":
            array[...] = logit
        elif name.startswith("body.") and name.endswith(".weight"):
            bound = math.sqrt(6.0 / sum(shape))
            array[...] = generator.uniform(-bound, bound, shape)
        params[name] = array
    return params


def _start(spec: ModelSpec) -> float:
    """Where the output starts: at the public base rate's logit, or at the centre of a label that is a number."""
    return 0.0 if spec.loss == "squared" else math.log(spec.base_rate / (1 - spec.base_rate))

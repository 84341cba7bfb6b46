"""Where training starts: public, the same for every party, and known without Torch, which the server does not need."""

import math
from itertools import pairwise

import numpy as np

from .params import Params
from .plan import ModelSpec, Plan


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


def initial_params(plan: Plan, width: int) -> Params:
    """Build the first meta-parameters.

    A scorecard starts at zero but for the intercept, which gives the public base rate. An mlp's hidden layers
    start Glorot-uniform (Glorot and Bengio 2010, eq. 16) from the plan's public seed; its head starts at zero
    but for the bias, which gives the base rate.

    Returns:
        NumPy arrays in the plan's dtype, named and shaped as `param_shapes` says.

    """
    logit = math.log(plan.model.base_rate / (1 - plan.model.base_rate))
    generator = np.random.default_rng(plan.model.init_seed)
    params: Params = {}
    for name, shape in param_shapes(plan.model, width).items():
        array = np.zeros(shape, plan.dtype)
        if name == "points.weight":
            array[0, -1] = logit / plan.data.encoding.intercept
        elif name == "head.bias":
            array[...] = logit
        elif name.startswith("body.") and name.endswith(".weight"):
            bound = math.sqrt(6.0 / sum(shape))
            array[...] = generator.uniform(-bound, bound, shape)
        params[name] = array
    return params

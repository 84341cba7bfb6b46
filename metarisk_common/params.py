"""The algebra of parameters: named arrays, added and scaled. Operators only, so NumPy and Torch both work.

After the idea of `variables.py` in OpenAI's supervised-reptile: a handful of tiny functions that every
algorithm is written in.
"""

import math
from collections.abc import Mapping
from typing import Any

Array = Any
"""A NumPy array or a Torch tensor: anything with `+`, `-`, `*` and `sum`."""

Params = dict[str, Array]
"""Parameters by name, in the model's order."""


def add(a: Mapping[str, Array], b: Mapping[str, Array]) -> Params:
    """`a + b`, name by name."""
    return {name: value + b[name] for name, value in a.items()}


def sub(a: Mapping[str, Array], b: Mapping[str, Array]) -> Params:
    """`a - b`, name by name."""
    return {name: value - b[name] for name, value in a.items()}


def scale(a: Mapping[str, Array], factor: float) -> Params:
    """`factor * a`, name by name."""
    return {name: value * factor for name, value in a.items()}


def add_scaled(a: Mapping[str, Array], factor: float, b: Mapping[str, Array]) -> Params:
    """`a + factor * b`, name by name: one step of gradient descent is `add_scaled(p, -rate, g)`."""
    return {name: value + b[name] * factor for name, value in a.items()}


def mean(items: list[Params]) -> Params:
    """The plain mean of at least one set of parameters."""
    total = items[0]
    for item in items[1:]:
        total = add(total, item)
    return scale(total, 1.0 / len(items))


def l2_norm(a: Mapping[str, Array]) -> float:
    """The Euclidean norm of all values together."""
    return math.sqrt(sum(float((value * value).sum()) for value in a.values()))

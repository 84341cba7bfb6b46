"""V1 by real messages: the rounds of the server's own strategy end where mathematics says that an algorithm must."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.rounds import run_rounds

INNER_RATE, STRENGTH = 0.1, 0.7


def weight(algorithm: str, a: np.ndarray, steps: int) -> np.ndarray:
    """W of the fixed point `(sum W_i)^-1 sum W_i c_i`."""
    one = np.eye(len(a))
    through = np.linalg.matrix_power(one - INNER_RATE * a, steps)
    pulled = a + STRENGTH * one
    within = np.linalg.matrix_power(one - INNER_RATE * pulled, steps)
    weights = {
        "prox": (one - within) @ np.linalg.solve(pulled, a),
        "fomaml": a @ through,
        "maml": through @ a @ through,
    }
    return np.asarray(weights[algorithm])


@pytest.mark.parametrize(("dtype", "digits"), [("float64", 10), ("float32", 5)])
@pytest.mark.parametrize("algorithm", ["prox", "fomaml", "maml"])
def test_rounds_end_where_they_must(tmp_path: Path, federation: Any, algorithm: str, dtype: str, digits: int) -> None:
    tasks, steps = federation().tasks, 3
    weights = [weight(algorithm, task.a, steps) for task in tasks]
    curvature = np.linalg.eigvals(sum(weights) / len(tasks)).real
    # Heavy-ball momentum at its best rate for the outer loop's curvature (Polyak 1964), and rounds enough.
    low, high = np.sqrt(curvature.min()), np.sqrt(curvature.max())
    beta = float(((high - low) / (high + low)) ** 2)
    outer = {
        "optimizer": "momentum",
        "momentum": beta,
        "learning_rate": float((2 / (high + low)) ** 2),
        "rounds": int(np.ceil((digits + 2) * np.log(10) / -np.log(np.sqrt(beta)))) + 10,
    }
    inner = {"algorithm": algorithm, "local_steps": steps, "prox_strength": STRENGTH * (algorithm == "prox")}
    fed = federation(inner=inner, outer=outer, dtype=dtype)
    end = run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path).meta_params["theta"]
    expected = np.linalg.solve(sum(weights), sum(w @ task.c for w, task in zip(weights, tasks, strict=True)))
    assert np.abs(end - expected).max() < 10.0**-digits

"""Sinusoids, the experiment with published figures: tasks that differ so much that their mean teaches nothing.

A task is `amplitude sin(x + phase)` on [-5, 5]. All of them together average to zero, so joint training must fail, and
an initialization must be learned *to adapt from*. Learned here by the repository's own algorithms, which get a gradient
as they do everywhere else; the network is written out by hand, forward and backward, so that a minute is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from metarisk_common.algorithms import fedavg, maml, reptile
from metarisk_common.params import Params, add_scaled
from metarisk_common.plan import InnerLoop
from metarisk_common.tasks import Episode
from server.optimizers import adam

Matrix = npt.NDArray[np.float32]
Records = tuple[Any, Any]
"""`x: (..., rows, 1)` and `y: (..., rows, 1)`, NumPy arrays or Torch tensors."""
OnStep = Callable[[int, int], None]
"""Told (tasks or iterations done, in all)."""

GRID_POINTS: Final = 50
SUPPORT: Final = 10
TEST_TASKS: Final = 600
REPTILE_TASKS: Final = 30_000
MAML_ITERATIONS: Final = 70_000
MAML_BATCH: Final = 25
_REPORT_EVERY: Final = 500


@dataclass(frozen=True)
class Protocol:
    """What a published experiment fixes: the tasks' phases, the network, and the test's step size."""

    phase: float
    hidden: int
    activation: Literal["tanh", "relu"]
    learning_rate: float


REPTILE: Final = Protocol(phase=2 * np.pi, hidden=64, activation="tanh", learning_rate=0.02)
"""Nichol, Achiam and Schulman 2018, section 5.1 and their published code."""
MAML: Final = Protocol(phase=np.pi, hidden=40, activation="relu", learning_rate=0.01)
"""Finn, Abbeel and Levine 2017, section 5.1."""


@dataclass(frozen=True)
class Error:
    """Mean squared error over the grid after a number of adaptation steps: mean over tasks, and half its 95% CI."""

    mean: float
    half: float


def grid() -> Matrix:
    """`(50, 1)`, evenly over [-5, 5]."""
    return np.linspace(-5, 5, GRID_POINTS, dtype=np.float32)[:, None]


def outputs(params: Params, x: Any, activation: str) -> Any:  # noqa: ANN401 - NumPy or Torch alike
    """Give the network's outputs `(..., rows, 1)`; every leading dimension has parameters of its own."""
    return _layers(params, x, activation)[-1]


def gradient_of(activation: str) -> Callable[[Params, Records], Params]:
    """Build the gradient of the mean squared error over the records: the backward pass of `outputs`, by hand."""

    def gradient(params: Params, records: Records) -> Params:
        x, y = records
        first, second, out = _layers(params, x, activation)
        at_out = (out - y) * (2.0 / y.shape[-2])
        at_second = (at_out @ params["head.weight"].mT) * _slope(second, activation)
        at_first = (at_second @ params["body.1.weight"].mT) * _slope(first, activation)
        found: Params = {}
        for name, inputs, delta in (
            ("body.0", x, at_first),
            ("body.1", first, at_second),
            ("head", second, at_out),
        ):
            found[f"{name}.weight"] = inputs.mT @ delta
            found[f"{name}.bias"] = delta.sum(-2)
        return found

    return gradient


def train_reptile(
    *, seed: int, tasks: int = REPTILE_TASKS, outer_step: float = 0.1, told: OnStep | None = None
) -> Params:
    """Learn by Reptile: one task after the other, five minibatches of 10, the outer step falling linearly to 0."""
    inner = InnerLoop(algorithm="reptile", local_steps=5, learning_rate=REPTILE.learning_rate)
    gradient = gradient_of(REPTILE.activation)

    def from_stream(params: Params, stream: Iterator[Records]) -> Params:
        return gradient(params, next(stream))

    random = np.random.default_rng(seed)
    return _sequentially(
        random,
        tasks,
        outer_step,
        lambda params, y: reptile(params, [_minibatches(y, random)], from_stream, inner),
        told,
    )


def train_jointly(*, seed: int, tasks: int = REPTILE_TASKS, told: OnStep | None = None) -> Params:
    """Train on the same tasks jointly, the negative control: one full-batch step a task, taken whole (outer step 1).

    Nothing is adapted within a task, so that this is stochastic gradient descent on the tasks' mean loss.
    """
    inner = InnerLoop(algorithm="fedavg", local_steps=1, learning_rate=REPTILE.learning_rate)
    gradient, x = gradient_of(REPTILE.activation), grid()
    return _sequentially(
        np.random.default_rng(seed), tasks, 1.0, lambda params, y: fedavg(params, [(x, y)], gradient, inner), told
    )


def train_maml(*, seed: int, iterations: int = MAML_ITERATIONS, told: OnStep | None = None) -> Params:
    """Learn by MAML with second derivatives: one step on 10 points, judged on 10 more, 25 tasks each, Adam."""
    inner = InnerLoop(algorithm="maml", local_steps=1, learning_rate=MAML.learning_rate)
    random, gradient = np.random.default_rng(seed), gradient_of(MAML.activation)
    meta = start(random, MAML)
    optimizer = adam(beta1=0.9, beta2=0.999, tau=1e-8)
    state = optimizer.init(meta)
    for done in range(1, iterations + 1):
        x = random.uniform(-5, 5, (MAML_BATCH, 2 * SUPPORT, 1)).astype(np.float32)
        amplitude, phase = _draw(random, MAML, (MAML_BATCH, 1, 1))
        y = amplitude * np.sin(x + phase)
        halves = [
            (torch.from_numpy(x[:, rows]), torch.from_numpy(y[:, rows]))
            for rows in (slice(SUPPORT), slice(SUPPORT, None))
        ]
        # All tasks step together, each at parameters of its own: one stacked "task" to the algorithm.
        each = {name: torch.from_numpy(value).expand(MAML_BATCH, *value.shape) for name, value in meta.items()}
        update = maml(each, [Episode(*halves)], gradient, inner)
        mean = {name: value.mean(0).numpy() for name, value in update.items()}
        state, moved = optimizer.apply(state, meta, mean, 1e-3)
        meta = {name: value.astype(np.float32) for name, value in moved.items()}
        if told is not None and done % _REPORT_EVERY == 0:
            told(done, iterations)
    return meta


def errors(
    params: Params, protocol: Protocol, steps: Sequence[int], *, seed: int, tasks: int = TEST_TASKS
) -> dict[int, Error]:
    """Adapt to 10 points of the grid by plain gradient descent and judge on all 50, on tasks drawn anew.

    The amplitudes are spread evenly over their range, for nothing else makes the mean of 600 tasks differ as much from
    one draw of them to another.
    """
    random, x, gradient = np.random.default_rng([seed, tasks]), grid(), gradient_of(protocol.activation)
    rate = -protocol.learning_rate
    found: dict[int, list[float]] = {step: [] for step in steps}
    for amplitude in np.linspace(0.1, 5.0, 2 * tasks + 1)[1::2]:
        _, phase = _draw(random, protocol, ())
        y = np.asarray(amplitude * np.sin(x + phase), np.float32)
        rows = random.choice(GRID_POINTS, SUPPORT, replace=False)
        adapted = params
        for step in range(max(steps) + 1):
            if step in found:
                found[step].append(float(np.square(outputs(adapted, x, protocol.activation) - y).mean()))
            adapted = add_scaled(adapted, rate, gradient(adapted, (x[rows], y[rows])))
    return {step: Error(float(np.mean(each)), 1.96 * float(np.std(each)) / tasks**0.5) for step, each in found.items()}


def start(random: np.random.Generator, protocol: Protocol) -> Params:
    """Draw the network's first weights as the protocol's authors did: Torch's default, or a narrow normal and zeros."""
    sizes = (1, protocol.hidden, protocol.hidden, 1)
    params: Params = {}
    for name, (inputs, units) in zip(("body.0", "body.1", "head"), pairwise(sizes), strict=True):
        if protocol.activation == "tanh":
            bound = inputs**-0.5
            weight, bias = random.uniform(-bound, bound, (inputs, units)), random.uniform(-bound, bound, units)
        else:
            weight, bias = 0.01 * random.standard_normal((inputs, units)).clip(-2, 2), np.zeros(units)
        params[f"{name}.weight"], params[f"{name}.bias"] = weight.astype(np.float32), bias.astype(np.float32)
    return params


def _sequentially(
    random: np.random.Generator,
    tasks: int,
    outer_step: float,
    update: Callable[[Params, Matrix], Params],
    told: OnStep | None,
) -> Params:
    """Play the outer loop of Reptile's authors: `meta += outer_step (1 - done) update`, one task at a time."""
    meta, x = start(random, REPTILE), grid()
    for index in range(tasks):
        amplitude, phase = _draw(random, REPTILE, ())
        y = np.asarray(amplitude * np.sin(x + phase), np.float32)
        meta = add_scaled(meta, outer_step * (1 - index / tasks), update(meta, y))
        if told is not None and (index + 1) % _REPORT_EVERY == 0:
            told(index + 1, tasks)
    return meta


def _minibatches(y: Matrix, random: np.random.Generator) -> Iterator[Records]:
    """One pass over the task's grid, in five minibatches without a point in common."""
    x = grid()
    return ((x[rows], y[rows]) for rows in random.permutation(GRID_POINTS).reshape(-1, SUPPORT))


def _draw(random: np.random.Generator, protocol: Protocol, shape: tuple[int, ...]) -> tuple[Matrix, Matrix]:
    amplitude, phase = random.uniform(0.1, 5.0, shape), random.uniform(0, protocol.phase, shape)
    return np.asarray(amplitude, np.float32), np.asarray(phase, np.float32)


def _layers(params: Params, x: Any, activation: str) -> tuple[Any, Any, Any]:  # noqa: ANN401 - as in `outputs`
    first = _active(x @ params["body.0.weight"] + params["body.0.bias"][..., None, :], activation)
    second = _active(first @ params["body.1.weight"] + params["body.1.bias"][..., None, :], activation)
    return first, second, second @ params["head.weight"] + params["head.bias"][..., None, :]


def _active(value: Any, activation: str) -> Any:  # noqa: ANN401 - as in `outputs`
    if activation == "relu":
        return value * (value > 0)
    return np.tanh(value) if isinstance(value, np.ndarray) else value.tanh()


def _slope(active: Any, activation: str) -> Any:  # noqa: ANN401 - as in `outputs`
    return active > 0 if activation == "relu" else 1 - active * active

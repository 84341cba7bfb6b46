"""The server's optimizers against Torch's and against the formulas, and what a checkpoint must hold of them."""

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from metarisk_common.params import Params
from metarisk_common.plan import OuterLoop
from server.optimizers import Optimizer, OptimizerState, adam, momentum, optimizer_for, rate_at, sgd

ROUNDS = 6
EACH = pytest.mark.parametrize("optimizer", [sgd(), momentum(0.9), adam()], ids=["sgd", "momentum", "adam"])


def start() -> Params:
    return {"a": np.array([[1.0, -2.0], [0.5, 3.0]]), "b": np.array([0.25])}


def updates() -> list[Params]:
    random = np.random.default_rng(4)
    return [{name: random.normal(size=value.shape) for name, value in start().items()} for _ in range(ROUNDS)]


def play(optimizer: Optimizer, rate: float = 0.3) -> tuple[OptimizerState, Params]:
    meta = start()
    state = optimizer.init(meta)
    for update in updates():
        state, meta = optimizer.apply(state, meta, update, rate)
    return state, meta


def play_torch(optimizer: torch.optim.Optimizer, leaves: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    for update in updates():
        for name, leaf in leaves.items():
            leaf.grad = -torch.as_tensor(update[name])  # A meta-update is added, a gradient is subtracted.
        optimizer.step()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def close(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], rtol=1e-13, atol=1e-13) for name in a)


def torch_leaves() -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in start().items()}


def test_sgd_adds_the_updates() -> None:
    expected = {name: value + 0.3 * sum(update[name] for update in updates()) for name, value in start().items()}
    assert close(play(sgd())[1], expected)


def test_sgd_with_rate_1_is_averaging() -> None:
    meta = {"a": np.array([1.0, 2.0])}
    assert sgd().apply({}, meta, {"a": np.array([0.5, -1.0])}, 1.0)[1]["a"].tolist() == [1.5, 1.0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_momentum_is_torchs(beta: float) -> None:
    leaves = torch_leaves()
    assert close(play(momentum(beta))[1], play_torch(torch.optim.SGD(leaves.values(), lr=0.3, momentum=beta), leaves))


def test_momentum_by_hand() -> None:
    state, meta = momentum(0.5).init({"a": np.zeros(1)}), {"a": np.zeros(1)}
    places = []
    for _ in range(3):
        state, meta = momentum(0.5).apply(state, meta, {"a": np.ones(1)}, 2.0)
        places.append(float(meta["a"][0]))
    assert places == [2.0, 5.0, 8.5]  # velocities 1, 1.5, 1.75
    assert state["velocity/a"].tolist() == [1.75]


def test_adam_is_torchs() -> None:
    """Torch takes beta2 and the constant under the root of the corrected second moment, as we do."""
    leaves = torch_leaves()
    theirs = torch.optim.Adam(leaves.values(), lr=0.3, betas=(0.8, 0.99), eps=1e-3)
    assert close(play(adam(beta1=0.8))[1], play_torch(theirs, leaves))


def test_adams_first_step_is_the_rate_in_the_updates_direction() -> None:
    update = {"a": np.array([5.0, -1e-1, 100.0])}
    meta = {"a": np.zeros(3)}
    after = adam(tau=1e-12).apply(adam().init(meta), meta, update, 0.3)[1]
    assert after["a"] == pytest.approx([0.3, -0.3, 0.3], rel=1e-9)


@EACH
def test_the_state_survives_a_checkpoint_to_the_bit(optimizer: Optimizer) -> None:
    state, meta = play(optimizer)
    stored = load(save(state)) if state else {}
    assert stored.keys() == state.keys()
    for name, value in state.items():
        assert isinstance(value, np.ndarray)
        assert stored[name].shape == value.shape
        assert stored[name].dtype == value.dtype
    going_on = [optimizer.apply(kept, meta, updates()[0], 0.3) for kept in (state, stored)]
    assert all(np.array_equal(going_on[0][1][name], going_on[1][1][name]) for name in meta)


@EACH
def test_nothing_is_changed_in_place(optimizer: Optimizer) -> None:
    """A state that was handed out must stay what the checkpoint has of it."""
    meta = start()
    state = optimizer.init(meta)
    before = {name: value.copy() for name, value in state.items()}
    after, _ = optimizer.apply(state, meta, updates()[0], 0.3)
    optimizer.apply(after, meta, updates()[1], 0.3)
    assert all(np.array_equal(meta[name], value) for name, value in start().items())
    assert all(np.array_equal(state[name], value) for name, value in before.items())


def outer(**values: object) -> OuterLoop:
    return OuterLoop.model_validate(values)


@pytest.mark.parametrize(("name", "expected"), [("sgd", sgd()), ("momentum", momentum(0.7)), ("adam", adam(beta1=0.7))])
def test_a_plan_names_its_optimizer(name: str, expected: Optimizer) -> None:
    found = play(optimizer_for(outer(optimizer=name, momentum=0.7)))
    assert close(found[1], play(expected)[1])
    assert found[0].keys() == play(expected)[0].keys()


def test_schedules() -> None:
    constant, linear, cosine = (
        [rate_at(outer(rounds=4, learning_rate=2.0, schedule=name), number) for number in (1, 2, 3, 4)]
        for name in ("constant", "linear", "cosine")
    )
    assert constant == [2.0, 2.0, 2.0, 2.0]
    assert linear == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert cosine == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_round_of_a_schedule_takes_a_step(schedule: str) -> None:
    rates = [rate_at(outer(rounds=100, schedule=schedule), number) for number in range(1, 101)]
    assert rates[0] == 1.0
    assert min(rates) > 0
    assert rates == sorted(rates, reverse=True)

"""The server's optimizers against Torch's and against the formulas, and what a checkpoint must hold of them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from metarisk_common.params import Params
from metarisk_common.plan import OuterLoop
from server.optimizers import (
    Optimizer,
    OptimizerState,
    _error_of_noise,
    adam,
    momentum,
    optimizer_for,
    rate_at,
    sgd,
    yogi,
)

ROUNDS = 6
ALL = {
    "sgd": sgd(),
    "momentum": momentum(0.9),
    "adam": adam(),
    "yogi": yogi(),
    "adam without noise": adam(subtract_noise=True),
    "yogi without noise": yogi(subtract_noise=True),
}
EACH = pytest.mark.parametrize("optimizer", ALL.values(), ids=ALL.keys())


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


def test_yogi_by_hand() -> None:
    """Zaheer et al. 2018: the second moment moves by (1 - beta2) g^2, up or down, whatever the difference is."""
    optimizer = yogi(beta1=0.5, beta2=0.75, tau=0.1)
    state, meta = optimizer.init({"a": np.zeros(1)}), {"a": np.zeros(1)}
    seconds, places = [], []
    for update in (4.0, 1.0, 2.0):
        state, meta = optimizer.apply(state, meta, {"a": np.full(1, update)}, 1.0)
        seconds.append(float(state["second/a"][0]))
        places.append(float(meta["a"][0]))
    assert seconds == [4.0, 3.75, 4.75]  # + 16 / 4, then - 1 / 4 as 4 > 1, then + 4 / 4 as 3.75 < 4
    first = 2.0 / 0.5 / (math.sqrt(4.0 / 0.25) + 0.1)
    second = (1.0 + 0.5) / 0.75 / (math.sqrt(3.75 / (1 - 0.75**2)) + 0.1)
    third = (0.75 + 1.0) / 0.875 / (math.sqrt(4.75 / (1 - 0.75**3)) + 0.1)
    assert places == pytest.approx([first, first + second, first + second + third])


def test_yogi_does_not_forget_a_large_update_as_adam_does() -> None:
    def after(optimizer: Optimizer) -> float:
        state, meta = optimizer.init({"a": np.zeros(1)}), {"a": np.zeros(1)}
        for update in (100.0, *[0.1] * 300):
            state, meta = optimizer.apply(state, meta, {"a": np.full(1, update)}, 1.0)
        return float(state["second/a"][0])

    assert after(yogi()) == pytest.approx(100 - 300 * 1e-4)
    assert after(adam()) < 6


NOISY = pytest.mark.parametrize("build", [adam, yogi])


@NOISY
def test_the_first_step_less_noise_by_hand(build: Callable[..., Optimizer]) -> None:
    """Known noise of variance 2: the square 9 becomes 7; a square of 3 becomes 1 and so the floor, sqrt(2) times 2."""
    optimizer = build(tau=0.5, subtract_noise=True)
    meta = {"a": np.zeros(2)}
    update = {"a": np.array([3.0, math.sqrt(3)])}
    moved = optimizer.apply(optimizer.init(meta), meta, update, 0.3, 2.0)[1]["a"]
    floor = math.sqrt(2) * 2
    expected = [0.3 * 3 / (math.sqrt(7) + 0.5), 0.3 * math.sqrt(3) / (math.sqrt(floor) + 0.5)]
    assert moved == pytest.approx(expected, rel=1e-12)


@NOISY
def test_without_noise_nothing_is_subtracted(build: Callable[..., Optimizer]) -> None:
    plain, subtracting = play(build()), play(build(subtract_noise=True))
    assert all(np.array_equal(plain[1][name], subtracting[1][name]) for name in start())
    meta = start()
    told = build().apply(build().init(meta), meta, updates()[0], 0.3, 2.0)[1]
    assert all(np.array_equal(told[name], build().apply(build().init(meta), meta, updates()[0], 0.3)[1][name])
               for name in meta)  # fmt: skip


def noisy_second(build: Callable[..., Optimizer], *, rounds: int, signal: float, told: float | None) -> np.ndarray:
    """Second moments, corrected for their start, of 4000 coordinates with this signal and noise of variance 1 or 4."""
    random = np.random.default_rng(8)
    optimizer = build(subtract_noise=told is not None)
    meta = {"a": np.zeros(4000)}
    state = optimizer.init(meta)
    for number in range(rounds):
        variance = (1.0, 4.0)[number % 2]  # as in rounds in which few banks take part
        update = {"a": signal + math.sqrt(variance) * random.normal(size=4000)}
        state, meta = optimizer.apply(state, meta, update, 0.1, variance * (told or 0.0))
    return np.asarray(state["second/a"] / (1 - 0.99**rounds))


def test_the_second_moment_of_adam_is_the_signals_square_and_not_the_noises() -> None:
    for rounds in (6, 400):
        known = noisy_second(adam, rounds=rounds, signal=1.5, told=1.0)
        assert known.mean() == pytest.approx(2.25, abs=0.1)
        assert noisy_second(adam, rounds=rounds, signal=1.5, told=None).mean() == pytest.approx(4.75, abs=0.15)


def test_noise_of_two_thirds_or_three_halves_of_the_known_variance_would_be_noticed() -> None:
    for told in (2 / 3, 3 / 2):
        assert abs(noisy_second(adam, rounds=400, signal=1.5, told=told).mean() - 2.25) > 0.5


def test_yogis_second_moment_of_pure_noise_falls_to_nought() -> None:
    """Its sign weighs each square, so it rests at the median of the squares by their size, and not at their mean."""
    left = noisy_second(yogi, rounds=1500, signal=0.0, told=1.0)
    assert np.median(left) < 0.5
    assert np.median(noisy_second(yogi, rounds=1500, signal=0.0, told=None)) > 4


@pytest.mark.parametrize("rounds", [1, 5, 300])
def test_the_floor_is_the_standard_error_of_pure_noise(rounds: int) -> None:
    second = np.zeros(20_000)
    random = np.random.default_rng(9)
    for _ in range(rounds):
        second = 0.99 * second + 0.01 * 3.0 * random.normal(size=20_000) ** 2
    found = (second / (1 - 0.99**rounds)).std()
    assert _error_of_noise(3.0, 0.99, rounds) == pytest.approx(found, rel=0.03)


@NOISY
def test_a_coordinate_of_pure_noise_takes_no_large_steps(build: Callable[..., Optimizer]) -> None:
    """Where the corrected second moment is nought or less, the floor stands; tau alone would let steps grow 40 fold."""
    random = np.random.default_rng(10)
    optimizer = build(subtract_noise=True)
    meta = {"a": np.zeros(2000)}
    state, largest = optimizer.init(meta), 0.0
    for _ in range(200):
        state, after = optimizer.apply(state, meta, {"a": random.normal(size=2000)}, 1.0, 1.0)
        largest, meta = max(largest, float(np.abs(after["a"] - meta["a"]).max())), after
    assert 1 < largest < 5


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sgd", sgd()), ("momentum", momentum(0.7)), ("adam", adam(beta1=0.7)), ("yogi", yogi(beta1=0.7))],
)
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
def test_warm_up_rises_evenly_to_the_schedules_rate(schedule: str) -> None:
    def rates(warmup: int) -> list[float]:
        chosen = outer(rounds=8, schedule=schedule, warmup_rounds=warmup, learning_rate=2.0)
        return [rate_at(chosen, number) for number in range(1, 9)]

    factors = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates(3) == pytest.approx([rate * factor for rate, factor in zip(rates(0), factors, strict=True)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_round_of_a_schedule_takes_a_step(schedule: str) -> None:
    rates = [rate_at(outer(rounds=100, schedule=schedule), number) for number in range(1, 101)]
    assert rates[0] == 1.0
    assert min(rates) > 0
    assert rates == sorted(rates, reverse=True)

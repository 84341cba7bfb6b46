"""Support and query: a unit's side is its own matter, for good, and each side pays for what it takes part in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client import mechanism as acts
from client.dataset import Dataset, from_frame
from client.episodes import episode_of, on_query_side
from client.mechanism import Batch
from client.rng import SecureRandom
from client.training import meta_update, tasks_for
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params, l2_norm, scale, sub
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task

SIZE = 220


def task_of(rows: int, seed: int = 0, *, dtype: str = "float32", unit: np.ndarray | None = None) -> Task:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 6)).astype(np.float32).astype(dtype)
    y = random.integers(0, 2, rows).astype(dtype)
    return Task("A", "", torch.from_numpy(x), torch.from_numpy(y), None if unit is None else torch.from_numpy(unit))


def kept(task: Task, rows: np.ndarray) -> Task:
    unit = None if task.unit is None else torch.from_numpy(np.unique(task.unit[rows], return_inverse=True)[1])
    return Task(task.institution, task.segment, task.x[rows], task.y[rows], unit)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(0, 99), st.data())
def test_what_becomes_of_others_moves_no_record_to_the_other_side(rows: int, seed: int, data: st.DataObject) -> None:
    task = task_of(rows, seed)
    side = on_query_side(task)
    # Any of them left out, in any order, some twice: neither position nor count has a say.
    chosen = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=60)))
    np.testing.assert_array_equal(on_query_side(kept(task, chosen)), side[chosen])
    # And so it is where the others' values change.
    last = torch.arange(rows) == rows - 1
    changed = replace(task, x=torch.where(last.unsqueeze(-1), task.x, 7.0), y=torch.where(last, task.y, 0.0))
    assert on_query_side(changed)[-1] == side[-1]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 6), st.integers(0, 99))
def test_a_unit_is_whole_on_one_side_whatever_becomes_of_others(units: list[int], left_out: int, seed: int) -> None:
    unit = np.unique(units, return_inverse=True)[1].astype(np.int64)
    task = task_of(len(units), seed, unit=unit)
    side = on_query_side(task)
    assert all(len(set(side[unit == number])) == 1 for number in unit)
    rows = np.flatnonzero(unit != left_out)
    np.testing.assert_array_equal(on_query_side(kept(task, rows)), side[rows])
    episode = episode_of(task)
    for part, members in ((episode.support, unit[~side]), (episode.query, unit[side])):
        assert part.unit is not None
        found = part.unit.tolist()
        assert sorted(set(found)) == list(range(len(set(members))))
        assert [np.flatnonzero(np.array(found) == number).tolist() for number in found] == [
            np.flatnonzero(members == number).tolist() for number in members
        ]


def test_every_record_is_on_one_side_with_its_own_label() -> None:
    task = task_of(200)
    episode = episode_of(task)
    rows = [(x.tobytes(), float(y)) for part in (episode.support, episode.query) for x, y in zip(
        part.x.numpy(), part.y.numpy(), strict=True)]  # fmt: skip
    assert sorted(rows) == sorted((x.tobytes(), float(y)) for x, y in zip(task.x.numpy(), task.y.numpy(), strict=True))
    for part in (episode_of(task_of(0)).support, episode_of(task_of(0)).query):
        assert part.x.shape == (0, 6)


def test_the_rule_is_as_ever_and_the_same_in_double_precision() -> None:
    """A known answer: were the rule another after an update, a run's later rounds would see other sides."""
    bits = "".join(str(int(side)) for side in on_query_side(task_of(64)))
    assert f"{int(bits, 2):016x}" == "4850a278ae038ab5"
    np.testing.assert_array_equal(on_query_side(task_of(64)), on_query_side(task_of(64, dtype="float64")))
    task = task_of(8)
    signed = replace(task, x=task.x * 0.0)  # some zeros have a sign
    np.testing.assert_array_equal(on_query_side(signed), on_query_side(replace(task, x=torch.zeros_like(task.x))))


def test_half_of_the_records_are_on_either_side_whatever_they_hold(
    make_loans: Callable[..., pl.DataFrame], plan: Plan
) -> None:
    """Encoded rows have few values in common places; no input and no outcome may go with a side."""
    dataset = from_frame(make_loans(lenders=20), plan.data, "A", "loans")
    (task,) = tasks_for(plan, dataset)
    side = on_query_side(task)
    spread = 0.5 / np.sqrt(len(side))
    assert abs(side.mean() - 0.5) < 4 * spread
    for values in [*dataset.x[:, :-1].T, dataset.y]:
        assert abs(np.corrcoef(values, side)[0, 1]) < 8 * spread


def test_a_record_that_is_left_out_of_the_table_moves_no_other(
    make_loans: Callable[..., pl.DataFrame], plan: Plan
) -> None:
    frame = make_loans(lenders=1)
    whole = on_query_side(tasks_for(plan, from_frame(frame, plan.data, "A", "loans"))[0])
    for row in (0, 17, frame.height - 1):
        without = from_frame(frame.with_row_index("n").filter(pl.col("n") != row).drop("n"), plan.data, "A", "loans")
        np.testing.assert_array_equal(on_query_side(tasks_for(plan, without)[0]), np.delete(whole, row))


# What a turn of FOMAML or ANIL releases.


def by_episode(plan: Plan, algorithm: str, **mechanism: Any) -> Plan:
    model = {"kind": "mlp", "hidden": (4,)} if algorithm == "anil" else {}
    changes = {
        "inner": plan.inner.model_copy(update={"algorithm": algorithm, "local_steps": 3, "learning_rate": 0.5}),
        "mechanism": plan.mechanism.model_copy(update=mechanism),
        "model": plan.model.model_copy(update=model),
        "dtype": "float64",
    }
    return plan.model_copy(update=changes)


def turn(plan: Plan, tasks: list[Task], seed: int = 0) -> Params:
    width = Encoder(plan.data).width
    start = initial_params(plan, width)
    return meta_update(start, plan, tasks, declared_size=SIZE, width=width, rng=SecureRandom.seeded(seed))


@pytest.fixture
def dataset(make_loans: Callable[..., pl.DataFrame], plan: Plan) -> Dataset:
    return from_frame(make_loans(lenders=1), plan.data, "Lender A", "loans.csv")


@pytest.mark.parametrize("task", ["institution", "segment"])
@pytest.mark.parametrize("algorithm", ["fomaml", "anil"])
def test_a_record_pays_for_the_support_or_for_the_query_and_never_for_both(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, dataset: Dataset, algorithm: str, task: str
) -> None:
    chosen = by_episode(plan, algorithm)
    chosen = chosen.model_copy(update={"inner": chosen.inner.model_copy(update={"task": task})})
    tasks = tasks_for(chosen, dataset)
    taken: dict[bytes, int] = {}
    stds: list[float] = []
    real_batch, real_noise = acts.poisson_batch, acts.noised

    def watched_batch(records: Task, sample_rate: float, rng: SecureRandom) -> Batch:
        batch = real_batch(records, sample_rate, rng)
        for x, y in zip(batch.x.numpy(), batch.y.numpy(), strict=True):
            key = x.tobytes() + y.tobytes()
            taken[key] = taken.get(key, 0) + 1
        return batch

    def watched_noise(total: torch.Tensor, std: float, rng: SecureRandom) -> torch.Tensor:
        stds.append(std)
        return real_noise(total, std, rng)

    monkeypatch.setattr(acts, "poisson_batch", watched_batch)
    monkeypatch.setattr(acts, "noised", watched_noise)
    turn(chosen, tasks)
    steps = chosen.inner.local_steps
    for one in tasks:
        for x, y, judges in zip(one.x.numpy(), one.y.numpy(), on_query_side(one), strict=True):
            assert taken[x.tobytes() + y.tobytes()] == (1 if judges else steps)
    assert chosen.train_event().steps == steps >= max(taken.values())
    # Noise on every step of the support and on the query, each with the whole standard deviation.
    assert stds == [chosen.mechanism.noise_multiplier * 0.7] * (steps + 1)


@pytest.mark.parametrize("algorithm", ["fomaml", "anil"])
def test_a_record_that_is_zeroed_out_moves_a_released_sum_by_at_most_the_clip_norm(
    plan: Plan, dataset: Dataset, algorithm: str
) -> None:
    """Canaries on the query's side, with gradients far beyond the clip norm; nothing else may move at all."""
    clip = 0.01
    chosen = by_episode(plan, algorithm, noise_multiplier=0.0, max_grad_norm=clip)
    (task,) = tasks_for(chosen, dataset)
    batch = chosen.mechanism.sample_rate * SIZE / 2
    whole, moves = turn(chosen, [task]), []
    for row in np.flatnonzero(on_query_side(task))[:25]:
        without = kept(task, np.delete(np.arange(len(task.y)), row))
        moves.append(batch * l2_norm(sub(whole, turn(chosen, [without]))))
    assert max(moves) <= clip * (1 + 1e-9)
    assert min(moves) > 0.9 * clip  # All are clipped, so the bound is reached, and each is counted once.
    # The first step of the support is such a sum, too, which the adapted parameters show.
    one = chosen.model_copy(
        update={"inner": chosen.inner.model_copy(update={"algorithm": "reptile", "local_steps": 1, "learning_rate": 1})}
    )
    support = episode_of(task).support
    without = kept(support, np.arange(1, len(support.y)))
    moved = 2 * batch * l2_norm(sub(turn(one, [support]), turn(one, [without])))
    assert 0.9 * clip < moved <= clip * (1 + 1e-9)


@pytest.mark.parametrize("algorithm", ["fomaml", "anil"])
@pytest.mark.parametrize("task", ["institution", "segment"])
def test_a_bank_without_records_answers_with_the_querys_noise_alone(
    plan: Plan, dataset: Dataset, algorithm: str, task: str
) -> None:
    assert dataset.segment is not None
    empty = Dataset("Lender A", dataset.x[:0], dataset.y[:0], dataset.segment[:0], dataset.counts)
    chosen = by_episode(plan, algorithm, noise_multiplier=5.0)
    chosen = chosen.model_copy(update={"inner": chosen.inner.model_copy(update={"task": task})})
    tasks = tasks_for(chosen, empty)
    turns = [turn(chosen, tasks, seed) for seed in range(60)]
    drawn = np.concatenate([value.reshape(-1) for update in turns for value in update.values()])
    # The mean over tasks of noise on the share of the declared size that a side of a task has: public, all of it.
    std = 5.0 * 0.7 / (SIZE / len(tasks) / 2) / np.sqrt(len(tasks))
    assert drawn.std() == pytest.approx(std, rel=0.1)


def test_only_what_is_public_divides(plan: Plan, dataset: Dataset) -> None:
    """Without steps to speak of, the update is the query's sum over half the declared size, however many those are."""
    chosen = by_episode(plan, "fomaml", noise_multiplier=0.0, max_grad_norm=None)
    chosen = chosen.model_copy(update={"inner": chosen.inner.model_copy(update={"learning_rate": 1e-12})})
    (task,) = tasks_for(chosen, dataset)
    query = episode_of(task).query
    twice = Task("A", "", torch.cat([task.x, query.x]), torch.cat([task.y, query.y]))
    once, double = turn(chosen, [task]), turn(chosen, [twice])
    np.testing.assert_allclose(double["points.weight"], scale(once, 2.0)["points.weight"], rtol=1e-9)
    weights = initial_params(chosen, task.x.shape[1])["points.weight"].reshape(-1)
    residual = 1 / (1 + np.exp(-(query.x.numpy() @ weights))) - query.y.numpy()
    expected = -query.x.numpy().T @ residual / (SIZE / 2)
    np.testing.assert_allclose(once["points.weight"].reshape(-1), expected, rtol=1e-9, atol=1e-12)


def test_units_are_clipped_and_drawn_whole_on_their_side(plan: Plan) -> None:
    """Of a customer with twenty records the query's sum moves by the clip norm, not by twenty times as much."""
    clip = 0.01
    chosen = by_episode(plan, "fomaml", noise_multiplier=0.0, max_grad_norm=clip)
    width = Encoder(chosen.data).width
    random = np.random.default_rng(3)
    x = random.normal(size=(200, width)) / np.sqrt(width)
    y, unit = np.ones(200), np.arange(200) // 20
    task = Task("A", "", torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(unit))
    side = on_query_side(task)
    whole = turn(chosen, [task])
    assert 0 < side.sum() < len(side)
    for number in np.unique(unit[side]):
        without = kept(task, np.flatnonzero(unit != number))
        moved = SIZE / 2 * l2_norm(sub(whole, turn(chosen, [without])))
        assert 0.9 * clip < moved <= clip * (1 + 1e-9)

"""V4 for every algorithm: a turn without privacy is what its paper says, written out with autograd's own graph."""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from client.dataset import Dataset, from_frame
from client.dpsgd import differentiable_gradient, plain_gradient, private_gradient
from client.episodes import episode_of
from client.rng import SecureRandom
from client.training import meta_update, tasks_for
from metarisk_common.features import Encoder
from metarisk_common.initialisation import RATE, initial_params, meta_shapes, model_params, param_shapes
from metarisk_common.models import build, forward, head_names, record_losses, to_arrays, to_tensors
from metarisk_common.params import Params, mean, scale
from metarisk_common.plan import Mechanism, ModelSpec, Plan
from metarisk_common.tasks import Task

SIZE, STEPS, RATE_INSIDE, STRENGTH = 220, 3, 0.8, 0.4
MLP = ModelSpec(kind="mlp", hidden=(5, 3))
PLAIN = {"noise_multiplier": 0.0, "max_grad_norm": None}
UNCLIPPED = {"noise_multiplier": 0.0, "max_grad_norm": 1e6}
FIRST_ORDER, SECOND_ORDER = ["prox", "fomaml", "anil"], ["maml", "meta_sgd"]


@pytest.fixture
def dataset(make_loans: Callable[..., pl.DataFrame], plan: Plan) -> Dataset:
    return from_frame(make_loans(lenders=1), plan.data, "Lender A", "loans.csv")


def plan_of(plan: Plan, algorithm: str, model: ModelSpec = MLP, *, task: str = "segment", **mechanism: Any) -> Plan:
    loop = {"local_steps": STEPS, "learning_rate": RATE_INSIDE, "algorithm": algorithm, "task": task}
    changes = {
        "inner": plan.inner.model_copy(update=loop | {"prox_strength": STRENGTH if algorithm == "prox" else 0.0}),
        "mechanism": plan.mechanism.model_copy(update=PLAIN | mechanism),
        "model": model,
        "dtype": "float64",
    }
    return Plan.model_validate_json(plan.model_copy(update=changes).to_json())


def start_of(plan: Plan) -> Params:
    """Weights, and rates, that are all over the place: at the usual start half of the gradients would vanish."""
    random = np.random.default_rng(4)
    shapes = meta_shapes(plan, Encoder(plan.data).width)
    return {name: 0.4 * random.normal(size=shape) + name.startswith(RATE) for name, shape in shapes.items()}


def turn(plan: Plan, tasks: list[Task], start: Params, seed: int = 0) -> Params:
    width = Encoder(plan.data).width
    return meta_update(start, plan, tasks, declared_size=SIZE, width=width, rng=SecureRandom.seeded(seed))


class ByHand:
    """What the papers say, on one side after the other, in autograd's graph; nothing of the package's algorithms."""

    def __init__(self, plan: Plan, tasks: list[Task]) -> None:
        self.plan, self.tasks = plan, tasks
        self.model = build(plan.model, Encoder(plan.data).width, plan.dtype)
        self.batch = SIZE / len(tasks) / (2 if plan.inner.by_episode else 1)

    def loss(self, params: Params, task: Task) -> torch.Tensor:
        return record_losses(forward(self.model, params, task.x), task.y).sum() / self.batch

    def adapted(self, start: Params, task: Task, rates: Params | None = None) -> Params:
        params = start
        for _ in range(STEPS):
            loss = self.loss(params, task)
            if self.plan.inner.algorithm == "prox":
                pull = sum((value - start[name]).square().sum() for name, value in params.items())
                loss = loss + STRENGTH / 2 * pull
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            step = {
                name: value - (RATE_INSIDE if rates is None else rates[name]) * gradient
                for (name, value), gradient in zip(params.items(), gradients, strict=True)
            }
            if self.plan.inner.algorithm == "anil":
                step = {name: step[name] if name in head_names(self.plan.model) else params[name] for name in step}
            params = step
        return params

    def meta_loss(self, meta: Params) -> torch.Tensor:
        """The mean over tasks of the query's loss after adaptation, a function of the meta-parameters."""
        rates = {name.removeprefix(RATE): value for name, value in meta.items() if name.startswith(RATE)}
        losses = []
        for task in self.tasks:
            episode = episode_of(task)
            losses.append(self.loss(self.adapted(model_params(meta), episode.support, rates or None), episode.query))
        return torch.stack(losses).mean()

    def update(self, start: Params) -> Params:
        meta = {name: value.requires_grad_() for name, value in to_tensors(start).items()}
        if self.plan.inner.second_order:
            found = torch.autograd.grad(self.meta_loss(meta), list(meta.values()))
            return {name: -value.numpy() for name, value in zip(meta, found, strict=True)}
        if not self.plan.inner.by_episode:
            updates = [self.adapted(meta, task) for task in self.tasks]
            return to_arrays({name: mean(updates)[name] - meta[name] for name in meta})
        gradients = []
        for task in self.tasks:
            episode = episode_of(task)
            end = {name: value.detach().requires_grad_() for name, value in self.adapted(meta, episode.support).items()}
            loss = self.loss(end, episode.query)
            gradients.append(dict(zip(end, torch.autograd.grad(loss, list(end.values())), strict=True)))
        return to_arrays(scale(mean(gradients), -1.0))


def close(found: Params, expected: Params, tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=tolerance, rtol=0, err_msg=name)
        assert np.abs(value).max() > 100 * tolerance, name


@pytest.mark.parametrize("task", ["institution", "segment"])
@pytest.mark.parametrize("mechanism", [PLAIN, UNCLIPPED], ids=["plain", "private"])
@pytest.mark.parametrize("algorithm", FIRST_ORDER)
def test_without_noise_and_clipping_a_turn_is_what_the_paper_says(
    plan: Plan, dataset: Dataset, algorithm: str, mechanism: dict[str, Any], task: str
) -> None:
    chosen = plan_of(plan, algorithm, task=task, **mechanism)
    start, tasks = start_of(chosen), tasks_for(chosen, dataset)
    close(turn(chosen, tasks, start), ByHand(chosen, tasks).update(start), 1e-6)


@pytest.mark.parametrize("task", ["institution", "segment"])
@pytest.mark.parametrize("model", [MLP, ModelSpec()], ids=["mlp", "scorecard"])
@pytest.mark.parametrize("algorithm", SECOND_ORDER)
def test_second_order_is_the_gradient_through_the_unrolled_loop(
    plan: Plan, dataset: Dataset, algorithm: str, model: ModelSpec, task: str
) -> None:
    chosen = plan_of(plan, algorithm, model, task=task)
    start, tasks = start_of(chosen), tasks_for(chosen, dataset)
    found = turn(chosen, tasks, start)
    close(found, ByHand(chosen, tasks).update(start), 1e-12)
    # The second derivatives are a share of it that no test may overlook.
    first = turn(plan_of(plan, "fomaml", model, task=task), tasks, model_params(start))
    if algorithm == "maml":
        assert max(np.abs(found[name] - first[name]).max() for name in first) > 1e-3


@pytest.mark.parametrize("algorithm", SECOND_ORDER)
def test_second_order_is_what_finite_differences_say(plan: Plan, dataset: Dataset, algorithm: str) -> None:
    chosen = plan_of(plan, algorithm)
    start, tasks = start_of(chosen), tasks_for(chosen, dataset)
    update, hand = turn(chosen, tasks, start), ByHand(chosen, tasks)
    random = np.random.default_rng(8)
    for _ in range(4):
        toward = {name: random.normal(size=value.shape) for name, value in start.items()}
        ends = []
        for side in (1e-5, -1e-5):
            at = to_tensors({name: value + side * toward[name] for name, value in start.items()})
            at = {name: value.requires_grad_() for name, value in at.items()}
            ends.append(hand.meta_loss(at).item())
        slope = (ends[0] - ends[1]) / 2e-5
        along = sum(float((update[name] * toward[name]).sum()) for name in start)
        assert along == pytest.approx(-slope, rel=1e-6, abs=1e-8)


def test_of_no_steps_to_speak_of_every_episode_algorithm_is_the_querys_gradient(plan: Plan, dataset: Dataset) -> None:
    chosen = [plan_of(plan, name) for name in ("fomaml", "anil", "maml")]
    chosen = [
        each.model_copy(update={"inner": each.inner.model_copy(update={"learning_rate": 1e-14})}) for each in chosen
    ]
    tasks, start = tasks_for(chosen[0], dataset), start_of(chosen[0])
    found = [turn(each, tasks, start) for each in chosen]
    close(found[1], found[0], 1e-12)
    close(found[2], found[0], 1e-12)


def test_prox_of_a_weak_pull_is_reptile_and_a_strong_one_stays(plan: Plan, dataset: Dataset) -> None:
    reptile, weak = plan_of(plan, "reptile"), plan_of(plan, "prox")
    start, tasks = start_of(weak), tasks_for(weak, dataset)
    pulled = [
        turn(weak.model_copy(update={"inner": weak.inner.model_copy(update={"prox_strength": s})}), tasks, start)
        for s in (1e-12, 1.0)
    ]
    free = turn(reptile, tasks, start)
    close(pulled[0], free, 1e-9)
    assert all(np.abs(pulled[1][name]).max() < np.abs(free[name]).max() for name in free)


@pytest.mark.parametrize("algorithm", FIRST_ORDER)
@pytest.mark.parametrize("model", [MLP, ModelSpec()], ids=["mlp", "scorecard"])
def test_noise_comes_from_the_stream_alone(plan: Plan, dataset: Dataset, algorithm: str, model: ModelSpec) -> None:
    if algorithm == "anil" and model.kind == "scorecard":
        return
    chosen = plan_of(plan, algorithm, model, noise_multiplier=2.0, max_grad_norm=0.5, sample_rate=0.5)
    start, tasks = start_of(chosen), tasks_for(chosen, dataset)
    first, again, other = (turn(chosen, tasks, start, seed) for seed in (1, 1, 2))
    for name, value in first.items():
        assert np.array_equal(value, again[name])
        assert not np.array_equal(value, other[name])


def test_a_differentiable_gradient_is_the_plain_one_and_samples_as_the_private_one(
    plan: Plan, dataset: Dataset
) -> None:
    chosen = plan_of(plan, "maml", task="institution")
    (task,) = tasks_for(chosen, dataset)
    params, width = to_tensors(start_of(chosen)), Encoder(chosen.data).width
    model = build(MLP, width, "float64")
    by_rate = []
    for rate in (1.0, 0.4):
        public: dict[str, Any] = {"expected_batch_size": 50.0, "rng": SecureRandom.seeded(5)}
        found = differentiable_gradient(model, record_losses, sample_rate=rate, **public)(params, task)
        public["rng"] = SecureRandom.seeded(5)
        mechanism = Mechanism(noise_multiplier=0.0, max_grad_norm=None, sample_rate=rate)
        expected = private_gradient(model, record_losses, mechanism=mechanism, **public)(params, task)
        close(to_arrays(found), to_arrays(expected), 1e-12)
        by_rate.append(found)
    plain = plain_gradient(model, record_losses)(params, task)
    close(to_arrays(by_rate[0]), to_arrays(scale(plain, len(task.y) / 50.0)), 1e-12)
    with pytest.raises(ValueError, match="exactly the model's parameters"):
        differentiable_gradient(model, record_losses, sample_rate=1.0, **public)({"w": params["head.bias"]}, task)


def test_learned_rates_start_at_the_plans_and_have_no_say_in_a_score(plan: Plan, dataset: Dataset) -> None:
    chosen = plan_of(plan, "meta_sgd")
    width = Encoder(chosen.data).width
    start, shapes = initial_params(chosen, width), param_shapes(MLP, width)
    assert {name: value.shape for name, value in start.items()} == meta_shapes(chosen, width)
    assert set(start) == {*shapes, *(RATE + name for name in shapes)}
    for name in shapes:
        assert np.all(start[RATE + name] == RATE_INSIDE)
    assert {name: value.tobytes() for name, value in model_params(start).items()} == {
        name: value.tobytes() for name, value in initial_params(plan_of(plan, "maml"), width).items()
    }
    model, x = build(MLP, width, "float64"), torch.from_numpy(dataset.x.astype(np.float64))
    with_rates, without = (forward(model, to_tensors(params), x) for params in (start, model_params(start)))
    assert torch.equal(with_rates, without)

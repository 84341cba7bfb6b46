"""The sinusoids in short: what is learned to adapt adapts, and joint training, which must fail, fails."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from metarisk_common.params import Params
from simulations import sinusoids
from simulations.cli import app
from simulations.sinusoids import MAML, REPTILE, errors, gradient_of, outputs, start
from simulations.verify_cli import (
    CONTROL_KNOWN,
    MAML_KNOWN,
    MAML_QUICK_KNOWN,
    REPTILE_KNOWN,
    Figure,
    Known,
    judged,
    pooled,
)


def test_reptile_learns_to_adapt_and_joint_training_on_the_same_tasks_does_not() -> None:
    learned = sinusoids.train_reptile(seed=1, tasks=1500, outer_step=1.0)
    control = sinusoids.train_jointly(seed=1, tasks=1500)
    after, failed = (errors(params, REPTILE, (0, 10), seed=1, tasks=60) for params in (learned, control))
    # Neither knows a task before it has seen points of it: what is learned shows in what ten points are worth.
    assert after[0].mean > 3
    assert failed[0].mean > 3
    assert after[10].mean + after[10].half < 1
    assert failed[10].mean - failed[10].half > 3


def test_maml_learns_to_adapt_in_one_step() -> None:
    learned = sinusoids.train_maml(seed=1, iterations=150)
    first = start(np.random.default_rng(1), MAML)
    after, before = (errors(params, MAML, (0, 1), seed=1, tasks=60) for params in (learned, first))
    assert after[1].mean < after[0].mean
    assert before[1].mean > before[0].mean - 0.01
    assert after[0].mean < before[0].mean


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_gradient_by_hand_is_autograds(activation: str) -> None:
    random = np.random.default_rng(3)
    params = {name: random.normal(size=(4, *value.shape)) for name, value in start(random, REPTILE).items()}
    x, y = random.normal(size=(2, 4, 7, 1))
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    # The mean over records, summed over the four networks, which share nothing.
    wanted = 4 * (outputs(leaves, torch.tensor(x), activation) - torch.tensor(y)).square().mean()
    for each, value in zip(
        torch.autograd.grad(wanted, list(leaves.values())),
        gradient_of(activation)(params, (x, y)).values(),
        strict=True,
    ):
        np.testing.assert_allclose(each.numpy(), value, atol=1e-10)


def test_a_task_is_one_pass_over_its_grid() -> None:
    seen: list[np.ndarray] = []
    y = np.arange(50, dtype=np.float32)[:, None]
    for batch_x, batch_y in sinusoids._minibatches(y, np.random.default_rng(0)):
        np.testing.assert_allclose(batch_x, -5 + batch_y * 10 / 49, atol=1e-5)
        seen.extend(batch_y[:, 0])
    assert sorted(seen) == list(range(50))


def test_a_figure_that_disagrees_fails_on_either_side() -> None:
    known = Known("Reptile", 5, 0.12, 0.15, "0.136")
    assert judged(known, 0.136, 0.01).passed
    assert judged(known, 0.155, 0.006).passed
    assert not judged(known, 0.17, 0.01).passed
    assert not judged(known, 0.05, 0.01).passed
    below = Known("MAML", 10, 0, 1.7, "pretrained: 1.7", below=True)
    assert judged(below, 0.3, 0.1).passed
    assert not judged(below, 1.68, 0.1).passed


def of_trainings(known: Known, *errors: float, half: float = 0.01) -> Figure:
    (figure,) = pooled([[judged(known, error, half)] for error in errors])
    return figure


def test_trainings_are_judged_by_their_mean_and_their_own_spread() -> None:
    known = REPTILE_KNOWN[2]
    found = of_trainings(known, 0.10, 0.12, 0.21, 0.18, 0.24)
    assert found.passed
    assert (found.measured, found.half) == pytest.approx((0.17, 2.7764 * np.sqrt(0.0035 / 5)), rel=1e-3)
    assert found.trainings == (0.10, 0.12, 0.21, 0.18, 0.24)
    assert not of_trainings(known, 0.20, 0.22, 0.21, 0.20, 0.21).passed
    assert not of_trainings(known, 0.05, 0.06, 0.05, 0.06, 0.05).passed
    # As near as one training's tasks let it be said.
    assert of_trainings(known, 0.16, 0.16, 0.16, half=0.02).passed


def test_one_training_in_which_the_control_learns_or_maml_does_not_is_enough_to_fail() -> None:
    assert of_trainings(CONTROL_KNOWN[0], 4.3, 4.2, 4.4, half=0.3).passed
    assert of_trainings(CONTROL_KNOWN[0], 4.3, 4.2, 4.4, 3.9, half=0.3).passed
    assert not of_trainings(CONTROL_KNOWN[0], 4.3, 4.2, 4.4, 3.2, 0.2, half=0.3).passed
    assert not of_trainings(CONTROL_KNOWN[0], 4.6, 4.5, 4.4, 3.2, half=0.3).passed
    assert of_trainings(MAML_QUICK_KNOWN[1], 0.3, 0.2, 0.4).passed
    assert not of_trainings(MAML_QUICK_KNOWN[1], 0.3, 0.2, 0.4, 1.7).passed


@pytest.mark.parametrize("learns", [False, True])
def test_a_set_up_in_which_the_control_learns_is_wrong(*, monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    known = {item.steps: (item.low + item.high) / 2 for item in REPTILE_KNOWN}
    of_maml = {item.steps: (item.low + item.high) / 2 for item in MAML_KNOWN}
    trained: dict[str, Params] = {name: {"name": np.array(name)} for name in ("reptile", "joint", "maml")}
    monkeypatch.setattr(sinusoids, "train_reptile", lambda **_: trained["reptile"])
    monkeypatch.setattr(sinusoids, "train_jointly", lambda **_: trained["joint"])
    monkeypatch.setattr(sinusoids, "train_maml", lambda **_: trained["maml"])

    def found(params: Params, _: object, steps: list[int], **__: object) -> dict[int, sinusoids.Error]:
        control = {CONTROL_KNOWN[0].steps: 0.2 if learns else 4.3}
        values = {"reptile": known, "joint": control, "maml": of_maml}[str(params["name"])]
        return {step: sinusoids.Error(values[step], 0.01) for step in steps}

    monkeypatch.setattr(sinusoids, "errors", found)
    assert CliRunner().invoke(app, ["verify", "--trainings", "1"]).exit_code == (1 if learns else 0)
    result = CliRunner().invoke(app, ["verify", "--json"])
    assert result.exit_code == (1 if learns else 0)
    figures = json.loads(result.stdout)["figures"]
    assert [item["what"] for item in figures if not item["passed"]] == ([CONTROL_KNOWN[0].what] if learns else [])
    shown = CliRunner().invoke(app, ["verify", "--thorough"])
    assert shown.exit_code == result.exit_code
    assert shown.stdout.count("FAIL") == int(learns)

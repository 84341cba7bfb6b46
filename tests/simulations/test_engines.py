"""Every engine plays the same rounds: one set of numbers, whoever carries the messages."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.app import close_banks
from client.dataset import load_dataset, read_table
from client.ledger import Ledger
from client.training import tasks_for
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from server.checkpoint import load_checkpoint
from simulations import experiment, runfolder, vector
from simulations.runfolder import RunFolder
from simulations.scenarios import load_scenario

MakeScenario = Callable[..., Path]


@pytest.mark.parametrize("task", ["institution", "segment"])
@pytest.mark.parametrize("epsilon", [None, math.inf])
def test_the_vector_engine_is_the_federation_to_the_last_bit(
    make_scenario: MakeScenario, tmp_path: Path, task: str, epsilon: float | None
) -> None:
    replace = {'algorithm = "reptile"': f'algorithm = "reptile"\ntask = "{task}"', "rounds = 12": "rounds = 3"}
    run = prepared(make_scenario(tmp_path, replace=replace), tmp_path / "run", epsilon=epsilon)
    federation = experiment.train(run, workers=0)
    same(federation, played_by_vector(run))
    assert moved(run, federation)


@pytest.mark.parametrize(
    "chosen",
    [
        'aggregator = "median"\nweighting = "equal"',
        'aggregator = "trimmed_mean"\ntrim = 0.4\nweighting = "equal"',
        'aggregator = "norm_bounded_mean"\nmax_update_norm = 0.01',
    ],
)
def test_every_engine_has_the_plans_aggregator(make_scenario: MakeScenario, tmp_path: Path, chosen: str) -> None:
    path = make_scenario(tmp_path, replace={"rounds = 12": f"rounds = 2\n{chosen}"})
    # Without noise, which comes from a seed and the plan's hash, only the aggregator tells the two plans apart.
    run = prepared(path, tmp_path / "run", epsilon=math.inf)
    federation = experiment.train(run, workers=0)
    close_banks()
    same(federation, played_by_vector(run))
    other = {"aggregator": "mean", "trim": 0.1, "max_update_norm": None}
    mean = played_by_vector(run, run.plan.model_copy(update={"outer": run.plan.outer.model_copy(update=other)}))
    assert max(np.abs(value - mean[name]).max() for name, value in federation.items()) > 1e-3


def test_with_one_step_a_round_is_one_step_of_joint_training(make_scenario: MakeScenario, tmp_path: Path) -> None:
    replace = {
        "local_steps = 2": "local_steps = 1",
        "rounds = 12": 'rounds = 1\noptimizer = "sgd"\nschedule = "constant"',
        "momentum = 0.5": "",
    }
    run = prepared(make_scenario(tmp_path, replace=replace), tmp_path / "run", epsilon=math.inf)
    learned = experiment.train(run, workers=0)["points.weight"].reshape(-1)
    data = [load_dataset(folder / "data.parquet", run.plan.data, name) for name, folder in run.bank_folders.items()]
    x, y = np.concatenate([one.x for one in data]).astype(np.float64), np.concatenate([one.y for one in data])
    start = initial_params(run.plan, x.shape[1])["points.weight"].astype(np.float64).reshape(-1)
    step = run.plan.inner.learning_rate * x.T @ (1 / (1 + np.exp(-(x @ start))) - y) / len(y)
    np.testing.assert_allclose(learned, start - step, atol=1e-6, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra 'ray'")
# Ray's daemons end on their own a moment after it was told to shut down.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_flowers_own_engine_is_the_federation_to_the_last_bit(
    make_scenario: MakeScenario, tmp_path: Path, finished_run: Path
) -> None:
    import ray  # noqa: PLC0415 - heavy, and an extra

    scenario = make_scenario(tmp_path)
    run = prepared(scenario, tmp_path / "run", engine="ray")
    try:
        learned = experiment.train(run, workers=2)
    finally:
        ray.shutdown()
    expected = runfolder.open_run(finished_run)
    same(learned, experiment.meta_params(expected))
    assert run.spent() == expected.spent()
    for folder in run.bank_folders.values():
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            ledger.verify()
            kinds = [entry.kind for entry in ledger.entries()]
        assert kinds == ["create", "approve", *["reserve", "release"] * 12]
    assert [record["round"] for record in run.journal()] == list(range(1, 13))
    assert all(record["admitted"] == sorted(run.sizes) for record in run.journal())


def prepared(scenario: Path, out: Path, *, epsilon: float | None = None, engine: str = "inprocess") -> RunFolder:
    frame = read_table(scenario.parent / "loans.csv")
    return runfolder.prepare(out, load_scenario(scenario), frame, where="loans.csv", epsilon=epsilon, engine=engine)


def played_by_vector(run: RunFolder, plan: Plan | None = None) -> Params:
    banks = {
        name: tasks_for(run.plan, load_dataset(folder / "data.parquet", run.plan.data, name))
        for name, folder in run.bank_folders.items()
    }
    return vector.train(plan or run.plan, banks, run.sizes, width=Encoder(run.plan.data).width, seed=run.info["seed"])


def same(one: Params, other: Params) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        assert (value.dtype, value.tobytes()) == (other[name].dtype, other[name].tobytes())


def moved(run: RunFolder, learned: Params) -> bool:
    close_banks()
    start = initial_params(run.plan, Encoder(run.plan.data).width)
    found = load_checkpoint(run.path / "checkpoint")
    assert found is not None
    same(found[0].meta_params, learned)
    return any(np.abs(value - start[name]).max() > 0.01 for name, value in learned.items())

"""V4: every algorithm that a scenario may name gives the same meta-parameters, whichever engine plays its rounds."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.app import close_banks
from client.dataset import load_dataset, read_table
from client.training import tasks_for
from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from simulations import experiment, runfolder, vector
from simulations.runfolder import RunFolder
from simulations.scenarios import load_scenario

MakeScenario = Callable[..., Path]

MLP = 'kind = "mlp"\nhidden = [4]'
PRIVATE = [
    ("prox", "scorecard", "prox_strength = 0.3"),
    ("fomaml", "scorecard", 'task = "segment"'),
    ("anil", "mlp", 'task = "segment"'),
]
NOT_PRIVATE = [("maml", "mlp", ""), ("meta_sgd", "scorecard", 'task = "segment"')]


def prepared(
    make_scenario: MakeScenario, folder: Path, algorithm: str, model: str, more: str, *, epsilon: float | None = None
) -> RunFolder:
    replace = {
        'algorithm = "reptile"': f'algorithm = "{algorithm}"\n{more}',
        "rounds = 12": "rounds = 3",
        'kind = "scorecard"': MLP if model == "mlp" else 'kind = "scorecard"',
    }
    path = make_scenario(folder, replace=replace)
    frame = read_table(path.parent / "loans.csv")
    out = folder / "run"
    return runfolder.prepare(out, load_scenario(path), frame, where="loans.csv", epsilon=epsilon, engine="inprocess")


def played_by_vector(run: RunFolder) -> Params:
    banks = {
        name: tasks_for(run.plan, load_dataset(folder / "data.parquet", run.plan.data, name))
        for name, folder in run.bank_folders.items()
    }
    return vector.train(run.plan, banks, run.sizes, width=Encoder(run.plan.data).width, seed=run.info["seed"])


@pytest.mark.parametrize(
    ("algorithm", "model", "more", "epsilon"),
    [*((*each, None) for each in PRIVATE), *((*each, math.inf) for each in [*PRIVATE[1:], *NOT_PRIVATE])],
)
def test_the_vector_engine_is_the_federation_to_the_last_bit(
    make_scenario: MakeScenario, tmp_path: Path, algorithm: str, model: str, more: str, epsilon: float | None
) -> None:
    run = prepared(make_scenario, tmp_path, algorithm, model, more, epsilon=epsilon)
    assert run.plan.inner.algorithm == algorithm
    federation, by_vector = experiment.train(run, workers=0), played_by_vector(run)
    close_banks()
    assert set(federation) == set(by_vector)  # a checkpoint keeps no order
    for name, value in federation.items():
        assert (value.dtype, value.tobytes()) == (by_vector[name].dtype, by_vector[name].tobytes())
    start = initial_params(run.plan, Encoder(run.plan.data).width)
    assert all(np.abs(value - start[name]).max() > 1e-4 for name, value in federation.items())
    # Every bank has paid for whole rounds of the plan, and every one of its reports was admitted.
    assert all(record["admitted"] == sorted(run.sizes) for record in run.journal())
    assert run.plan.total_steps == 3 * run.plan.inner.local_steps


@pytest.mark.parametrize(("algorithm", "model", "more"), NOT_PRIVATE)
def test_second_order_under_privacy_is_refused_before_anything_starts(
    make_scenario: MakeScenario, tmp_path: Path, algorithm: str, model: str, more: str
) -> None:
    with pytest.raises(ConfigError, match="cannot be private"):
        prepared(make_scenario, tmp_path, algorithm, model, more)
    assert not (tmp_path / "run").exists()

"""Worlds whose tasks differ strongly: drawn as they say, and there meta-learning beats joint training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from client.dataset import from_frame, read_table
from metarisk_common.errors import ConfigError
from metarisk_common.evaluation import EvaluationSet
from metarisk_common.plan import InnerLoop, ModelSpec
from simulations import contest, sectors, worlds
from simulations.cli import app
from simulations.contest import Entrant, Row
from simulations.scenarios import Scenario, data_path, load_scenario
from simulations.worlds import World


def interactions(frame: pl.DataFrame) -> np.ndarray:
    """Mean outcome where the interaction is up, less where it is down."""
    sign = np.sign(frame["utilisation"].to_numpy() - 0.5) * np.sign(frame["history"].to_numpy() - 0.5)
    y = frame["defaulted"].to_numpy()
    return np.asarray(y[sign > 0].mean() - y[sign < 0].mean())


def test_the_interaction_flips_from_lender_to_lender_and_the_rest_is_shared() -> None:
    frame = worlds.draw(World(lenders=20, records=1500))
    of_lenders = np.array([interactions(own) for own in frame.partition_by("lender")])
    assert np.all(np.abs(of_lenders) > 0.3)
    assert 4 <= np.count_nonzero(of_lenders > 0) <= 16
    for own in frame.partition_by("lender"):
        debt, defaulted = own["debt_ratio"].to_numpy(), own["defaulted"].to_numpy()
        assert np.corrcoef(debt, defaulted)[0, 1] > 0


def test_what_is_shared_and_what_is_own_can_be_tuned() -> None:
    alike = worlds.draw(World(lenders=20, records=1500, own=0.0))
    assert max(abs(float(interactions(own))) for own in alike.partition_by("lender")) < 0.15
    foreign = worlds.draw(World(lenders=20, records=1500, shared=0.0))
    assert abs(np.corrcoef(foreign["debt_ratio"].to_numpy(), foreign["defaulted"].to_numpy())[0, 1]) < 0.02


def test_the_sign_may_be_the_segments() -> None:
    frame = worlds.draw(World(lenders=20, records=1500, flips="segment"))
    signs = {tuple(np.sign([interactions(part) for part in own.sort("product").partition_by("product")]).tolist())
             for own in frame.partition_by("lender")}  # fmt: skip
    assert signs == {(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)}


@pytest.mark.parametrize("flips", ["institution", "segment"])
def test_a_world_is_a_scenario(tmp_path: Path, flips: str) -> None:
    arguments = ["world", "sign-flip", "--lenders", "20", "--records", "60", "--flips", flips, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.output
    path = tmp_path / "world.toml"
    scenario = load_scenario(path)
    assert scenario.training.task == flips
    assert scenario.plan().mechanism.noise_multiplier > 0
    seen, unseen = worlds.trained_and_unseen(scenario, read_table(data_path(scenario, path)))
    assert (len(seen), len(unseen), len(seen[0].y)) == (4, 16, 60)
    assert not {each.institution for each in seen} & {each.institution for each in unseen}


def test_the_worlds_table_is_its_seeds(tmp_path: Path) -> None:
    small = World(lenders=20, records=50)
    worlds.write(small, "sign-flip", tmp_path)
    drawn = pl.read_parquet(tmp_path / "world.parquet")
    assert drawn.equals(worlds.draw(small))
    assert not drawn.equals(worlds.draw(replace(small, seed=4)))


def test_reptile_beats_joint_training_plus_the_same_adaptation_where_the_sign_flips() -> None:
    base = load_scenario(worlds.scenario_path("sign-flip"))

    def entry(algorithm: str, steps: int, rate: float, rounds: int, **server: float) -> Scenario:
        inner = InnerLoop.model_validate({"algorithm": algorithm, "local_steps": steps, "learning_rate": rate})
        outer = base.server.model_copy(update={"rounds": rounds, **server})
        return base.model_copy(update={"training": inner, "server": outer})

    entries = {
        worlds.RIVAL: entry("fedavg", 1, 1.0, 30, learning_rate=4.0),
        "reptile": entry("reptile", 20, 5.0, 12, learning_rate=1.0, momentum=0.5),
    }
    world = World(lenders=24, records=300, seed=5)
    rows = worlds.hold(world, epsilon=float("inf"), entries=entries, draws=1, ks=(0, 50))
    after = {row.prior_variance: row for row in rows if row.method == "reptile" and row.k == 50}
    assert set(after) == set(worlds.VARIANCES)
    for row in after.values():
        assert row.same is not None
        assert row.best is not None
        # The interval over unseen lenders, and against the strongest of what the rival has.
        assert row.same[1] > 0.1
        assert row.best[1] > 0.1
        assert row in contest.wins(rows)
    # Without labels nobody can know the sign.
    assert not [row for row in contest.wins(rows) if row.k == 0]


def test_the_rivals_best_is_the_strongest_that_it_has_at_that_k() -> None:
    random = np.random.default_rng(0)
    x = np.column_stack([random.normal(size=(400, 2)), np.full(400, 0.25)]).astype(np.float32)
    y = (random.uniform(size=400) < 1 / (1 + np.exp(-3 * x[:, 0]))).astype(np.float64)
    sets = [
        EvaluationSet(name, x[rows], x[rows], y[rows]) for name, rows in (("a", slice(200)), ("b", slice(200, 400)))
    ]

    def entrant(name: str, weight: float, variance: float, adaptation: str = "none") -> Entrant:
        params = {"points.weight": np.array([[weight, 1 - weight, 0.0]])}
        return Entrant(name, ModelSpec(), params, variance, adaptation)

    methods = [
        entrant("joint", 0.0, 0.3, "prox"), entrant("joint", 0.0, 30.0, "prox"),
        entrant("other", 1.0, 0.3), entrant("other", 1.0, 30.0),
    ]  # fmt: skip
    rows = {(row.method, row.prior_variance, row.k): row for row in
            contest.judge(methods, "joint", sets, (0, 50), draws=2, seed=1)}  # fmt: skip
    joint = {key: row.auc for key, row in rows.items() if key[0] == "joint"}
    row = rows["other", 0.3, 50]
    assert row.same is not None
    assert row.best is not None
    assert row.same[0] == pytest.approx(row.auc - joint["joint", 0.3, 50])
    assert row.best[0] == pytest.approx(row.auc - max(joint.values()))
    assert max(joint.values()) == joint["joint", 30.0, 50] > joint["joint", 0.3, 50]
    assert rows["joint", 0.3, 50].same is None


def test_a_verdict_names_who_wins_and_who_loses() -> None:
    rows = [
        Row("joint", 3.0, 20, 0.6, None, None),
        Row("reptile", 3.0, 20, 0.7, (0.1, 0.05, 0.15), (0.1, 0.05, 0.15)),
        Row("anil", 3.0, 20, 0.65, (0.05, 0.01, 0.1), (0.02, -0.01, 0.05)),
        Row("fomaml", 3.0, 20, 0.5, (-0.1, -0.15, -0.05), (-0.1, -0.15, -0.05)),
    ]
    said = contest.verdict(rows, "joint")
    assert "its best included: reptile, tau2 3, k = 20. Below 0: fomaml, tau2 3, k = 20." in said
    assert "anil" not in said


def test_every_sector_of_an_unseen_lender_with_room_is_a_task() -> None:
    base = sectors.variants()[worlds.RIVAL]
    path = worlds.scenario_path("sign-flip").parent / "sba.toml"
    frame = read_table(data_path(base, path))
    dataset = from_frame(frame.filter(pl.col("bank") == frame["bank"][0]), base.columns, "one", "one")
    tasks = sectors.tasks_of(dataset, 50)
    assert dataset.segment is not None
    for task in tasks:
        sector = task.institution.removeprefix("one / ")
        assert sector in sectors.SECTORS
        assert len(task.y) == np.count_nonzero(dataset.segment == sector) >= 50
    assert tasks
    assert sectors.tasks_of(dataset, len(dataset.y) + 1) == []


def test_the_loans_contest_is_one_of_equal_steps() -> None:
    steps = {name: each.server.rounds * each.training.local_steps for name, each in sectors.variants().items()}
    assert set(steps.values()) == {100}


def test_the_command_prints_the_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row("joint", 3.0, 20, 0.6, None, None),
        Row("reptile", 3.0, 20, 0.7, (0.1, 0.05, 0.15), (0.1, 0.05, 0.15)),
    ]
    monkeypatch.setattr(worlds, "hold", lambda *_, **__: rows)
    shown = CliRunner().invoke(app, ["differences", "sign-flip"])
    assert shown.exit_code == 0
    assert "+0.100 [+0.050, +0.150] *" in shown.output
    assert "SYNTHETIC" in shown.output
    assert "NOT PRIVATE" in shown.output
    found = json.loads(CliRunner().invoke(app, ["differences", "sign-flip", "--epsilon", "inf", "--json"]).stdout)
    assert found["epsilon"] is None
    (table,) = found["tables"].values()
    assert table[1]["best"] == [0.1, 0.05, 0.15]


@pytest.mark.parametrize(
    "arguments",
    [
        ["world", "flat"],
        ["world", "sign-flip", "--flips", "nobody"],
        ["differences", "cards"],
        ["differences", "sign-flip", "--epsilon", "0"],
        ["mixed", "--model", "tree"],
    ],
)
def test_a_mistake_is_told(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)

"""Cross-domain: a domain moves what it has and nothing else, and the table tells what the other one brings."""

import json
import math

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from client.dataset import read_table
from metarisk_common.features import Encoder
from metarisk_common.schema import Schema
from simulations import contest, mixed
from simulations.cli import app
from simulations.mixed import RIVAL, SOURCE, TARGET, Domain, Setup
from simulations.scenarios import Scenario, built_in, data_path, load_scenario


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario(built_in("credit"))


@pytest.fixture(scope="module")
def table(scenario: Scenario) -> pl.DataFrame:
    """The first 400 loans of 32 lenders."""
    loans = read_table(data_path(scenario, built_in("credit")))
    lenders = sorted(loans["bank"].unique())[:32]
    return loans.filter(pl.col("bank").is_in(lenders)).group_by("bank", maintain_order=True).head(400)


def inputs_of(schema: Schema, columns: tuple[str, ...]) -> np.ndarray:
    return np.isin(Encoder(schema).groups, columns)


@pytest.mark.parametrize("domain", [SOURCE, TARGET])
def test_a_domain_has_zeros_where_it_lacks_a_column(scenario: Scenario, table: pl.DataFrame, domain: Domain) -> None:
    own = table.filter(pl.col("bank") == table["bank"][0])
    dataset = mixed.of_domain(own, scenario.columns, domain, "one")
    lacking = inputs_of(scenario.columns, domain.lacks)
    assert len(dataset.y) == own.filter(pl.col("business_age") == domain.value).height > 0
    assert lacking.any()
    assert not dataset.x[:, lacking].any()
    assert dataset.x[:, ~lacking].any(axis=0).mean() > 0.9
    # What a row loses only makes it shorter: the bound that clipping and sensitivity rest on still holds.
    assert np.linalg.norm(dataset.x, axis=1).max() <= 1 + 1e-6


def test_no_lender_stands_in_two_parts(scenario: Scenario, table: pl.DataFrame) -> None:
    found = mixed.domains(scenario, table, target_lenders=5, most=300, room=100)
    names = [{each.institution for each in part} for part in (found.source, found.target, found.unseen)]
    assert len(names[1]) == 5
    assert all(names)
    assert sum(len(each) for each in names) == len(set.union(*names))
    assert max(len(each.y) for each in [*found.source, *found.target]) <= 300
    assert min(len(each.y) for each in found.unseen) >= 100


def test_a_domain_moves_only_what_it_has(scenario: Scenario, table: pl.DataFrame) -> None:
    setup = Setup("scorecard", math.inf, target_lenders=3, most=200, rounds=4)
    learned, found = mixed.initializations(setup, table, room=100)
    weights = {name: np.ravel(params["points.weight"]) for name, (_, params) in learned.items()}
    of_target, of_source = (inputs_of(scenario.columns, domain.lacks) for domain in (SOURCE, TARGET))
    assert not weights["source alone"][of_target].any()
    assert not weights[RIVAL][of_source].any()
    assert weights[RIVAL][of_target].any()
    assert weights["both"][of_source].any()
    methods = contest.entrants(learned, mixed.VARIANCES)
    rows = contest.judge(methods, RIVAL, contest.judging_sets(found.unseen), (0,), draws=1, seed=1)
    auc = {row.method: row.auc for row in rows}
    assert auc["both"] > 0.55
    assert {row.method: row.same is None for row in rows} == {RIVAL: True, "source alone": False, "both": False}


def test_a_shared_body_is_learned_by_anil(table: pl.DataFrame) -> None:
    setup = Setup("mlp", 3.0, target_lenders=3, most=60, rounds=1)
    learned, found = mixed.initializations(setup, table, room=100)
    plan, params = learned["both"]
    assert (plan.inner.algorithm, plan.model.kind) == ("anil", "mlp")
    assert plan.mechanism.noise_multiplier > 0
    assert params["body.0.weight"].shape == (16, found.unseen[0].x.shape[1])
    assert all(one == plan for one, _ in learned.values())


def test_the_command_prints_both_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setup] = []

    def hold(setup: Setup) -> list[contest.Row]:
        asked.append(setup)
        return [
            contest.Row(RIVAL, 0.3, 0, 0.6, None, None),
            contest.Row("both", 0.3, 0, 0.55, (-0.05, -0.06, -0.04), (-0.05, -0.06, -0.04)),
        ]

    monkeypatch.setattr(mixed, "hold", hold)
    shown = CliRunner().invoke(app, ["mixed", "--epsilon", "3", "--target-lenders", "7"])
    assert shown.exit_code == 0
    assert [(each.model, each.target_lenders) for each in asked] == [("scorecard", 7), ("mlp", 7)]
    # A negative result is shown like any other.
    assert "-0.050 [-0.060, -0.040] -" in shown.output
    assert "Below 0: both" in shown.output
    found = json.loads(CliRunner().invoke(app, ["mixed", "--model", "mlp", "--json"]).stdout)
    assert len(found["tables"]) == 1

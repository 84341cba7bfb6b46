"""Forecasts are what the ledger will do: held to the accountant, and to a ledger that is charged until it refuses."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.forecast import Forecast, PlanForecast, for_plan, forecast, table, to_json
from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.errors import BudgetExhaustedError
from metarisk_common.plan import Plan, ScoreHistograms
from metarisk_common.privacy import PrivacyEvent, epsilon

DELTA = 1e-5
SPENT = [PrivacyEvent("poisson_gaussian", 50.0, 1.0, 100), PrivacyEvent("gaussian_histograms", 20.0, 1.0, 1)]


def changed(plan: Plan, **parts: dict[str, Any]) -> Plan:
    return plan.model_copy(
        update={name: getattr(plan, name).model_copy(update=values) for name, values in parts.items()}
    )


@pytest.fixture
def small(plan: Plan) -> Plan:
    """12 rounds of 2 full-batch steps with noise 12: epsilon 1.74 in all."""
    assert (plan.outer.rounds, plan.inner.local_steps) == (12, 2)
    return changed(plan, mechanism={"noise_multiplier": 12.0, "sample_rate": 1.0})


@pytest.fixture(scope="module")
def found() -> Forecast:
    return forecast(
        epsilon=3.0, delta=DELTA, spent=SPENT, sample_rates=[0.1, 1.0], noise_multipliers=[0.05, 8.0], local_steps=5
    )


def shown(found: Forecast) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table(found))
    return console.export_text()


def test_every_rate_with_every_noise(found: Forecast) -> None:
    pairs = [(row.noise_multiplier, row.sample_rate) for row in found.rows]
    assert pairs == [(0.05, 0.1), (0.05, 1.0), (8.0, 0.1), (8.0, 1.0)]
    assert found.spent == epsilon(SPENT, DELTA) > 0.5


def test_so_many_rounds_fit_and_one_more_does_not(found: Forecast) -> None:
    for row in found.rows:
        rounds = [PrivacyEvent("poisson_gaussian", row.noise_multiplier, row.sample_rate, 5)] * (row.rounds + 1)
        assert row.spent == epsilon([*SPENT, *rounds[1:]], DELTA) <= 3.0
        assert epsilon([*SPENT, *rounds], DELTA) > 3.0
    # Known steps are 32 at rate 1 without anything spent before.
    assert [row.rounds for row in found.rows[:2]] == [0, 0]
    assert found.rows[2].rounds > 500 > found.rows[3].rounds > 0


def test_the_table_says_rounds_in_rows_of_noise_and_columns_of_rates(found: Forecast) -> None:
    text = shown(found)
    lines = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in text.splitlines()]
    assert ["noise", "rate 0.1", "rate 1"] in lines
    assert ["0.05", "0", "0"] in lines
    assert ["8", f"{found.rows[2].rounds:,}", str(found.rows[3].rounds)] in lines
    words = " ".join(text.split())
    assert words.startswith("Rounds that fit into epsilon 3 at delta 1e-05")
    assert "Rounds of 5 private steps each" in words
    assert words.endswith("0: not even one fits.")


def test_a_search_that_ended_at_its_limit_says_so() -> None:
    endless = forecast(
        epsilon=8.0, delta=DELTA, spent=[], sample_rates=[1.0], noise_multipliers=[1e6], local_steps=1000
    )
    assert (endless.rows[0].rounds, endless.most_rounds) == (1000, 1000)
    assert "1,000 or more" in shown(endless)


def test_no_noise_is_no_round_and_nothing_spent_is_no_row_spent() -> None:
    bare = forecast(epsilon=1.0, delta=DELTA, spent=[], sample_rates=[0.5], noise_multipliers=[0.0], local_steps=1)
    assert [(row.rounds, row.spent) for row in bare.rows] == [(0, 0.0)]
    assert "1 private step each" in " ".join(shown(bare).split())


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("epsilon", {"epsilon": 0.0}),
        ("delta", {"delta": 1.0}),
        ("sample_rate", {"sample_rates": [0.0]}),
        ("noise_multiplier", {"noise_multipliers": [-1.0]}),
        ("local_steps", {"local_steps": 0}),
    ],
)
def test_a_forecast_names_what_is_out_of_range(argument: str, values: dict[str, Any]) -> None:
    options = {"epsilon": 1.0, "delta": DELTA, "sample_rates": [1.0], "noise_multipliers": [1.0], "local_steps": 1}
    with pytest.raises(ValueError, match=f"^{argument} must"):
        forecast(spent=[], **{**options, **values})


def test_a_plan_that_fits(small: Plan) -> None:
    found = for_plan(small, epsilon=2.0, delta=DELTA, spent=[])
    assert (found.fits, found.rounds_affordable, found.rounds_asked, found.spent) == (True, 12, 12, 0.0)
    assert [number for number, _ in found.spent_after] == [3, 6, 9, 12]
    for number, spent in found.spent_after:
        assert spent == epsilon([PrivacyEvent("poisson_gaussian", 12.0, 1.0, 2 * number)], DELTA)


@pytest.mark.parametrize("budget", [0.1, 0.4, 1.0, 1.2, 1.6])
@pytest.mark.parametrize("every", [None, 0, 2])
def test_a_plan_that_does_not_fit_ends_where_the_accountant_says(small: Plan, budget: float, every: int | None) -> None:
    metrics = None if every is None else ScoreHistograms(noise_multiplier=5.0, every=every)
    plan = small.model_copy(update={"metrics": metrics})
    found = for_plan(plan, epsilon=budget, delta=DELTA, spent=SPENT[1:])
    assert not found.fits
    spent, rounds = list(SPENT[1:]), 0
    for number in range(1, 13):
        spent += [plan.train_event(), *([plan.evaluate_event()] if plan.evaluates_after(number) else [])]
        rounds = number if epsilon(spent, DELTA) <= budget else rounds
    assert found.rounds_affordable == rounds
    assert found.spent_after[-1] == (12, epsilon([*SPENT[1:], *plan.events()], DELTA))


def test_the_ledger_accepts_just_what_was_forecast(small: Plan, tmp_path: Path) -> None:
    found = for_plan(small, epsilon=1.2, delta=DELTA, spent=[])
    assert 0 < found.rounds_affordable < 12
    with Ledger.open(tmp_path / "ledger.sqlite", source="loans", budget=Budget(epsilon=1.2, delta=DELTA)) as ledger:
        ledger.approve(small.hash())
        for number in range(1, found.rounds_affordable + 1):
            ledger.reserve(OrderKey("run", number, small.hash(), "digest"), small.train_event())
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(OrderKey("run", 12, small.hash(), "digest"), small.train_event())


@pytest.mark.parametrize(("rounds", "numbers"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (10, [3, 5, 8, 10])])
def test_quarters_of_few_rounds(small: Plan, rounds: int, numbers: list[int]) -> None:
    plan = changed(small, outer={"rounds": rounds})
    assert [number for number, _ in for_plan(plan, epsilon=9.0, delta=DELTA, spent=[]).spent_after] == numbers


def test_a_plan_without_noise_affords_nothing(small: Plan) -> None:
    found = for_plan(changed(small, mechanism={"noise_multiplier": 0.0}), epsilon=9.0, delta=DELTA, spent=[])
    assert (found.fits, found.rounds_affordable) == (False, 0)
    assert to_json(found)["spent_after"][0] == {"round": 3, "epsilon": None}


def test_json_holds_every_figure(found: Forecast, small: Plan) -> None:
    values = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert values["rows"][3] == {
        "sample_rate": 1.0,
        "noise_multiplier": 8.0,
        "rounds": found.rows[3].rounds,
        "spent": found.rows[3].spent,
    }
    assert (values["epsilon"], values["delta"], values["local_steps"]) == (3.0, DELTA, 5)
    planned: PlanForecast = for_plan(small, epsilon=2.0, delta=DELTA, spent=[])
    values = json.loads(json.dumps(to_json(planned), allow_nan=False))
    assert values["fits"] is True
    assert values["spent_after"][3] == {"round": 12, "epsilon": planned.spent_after[3][1]}

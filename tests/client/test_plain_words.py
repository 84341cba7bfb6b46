"""A plan in plain words: every number is the plan's or the accountant's, and what should worry is said."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.chain import Budget
from client.plain_words import Terms, cost_of, describe, epsilon_text, remaining_text, unit_text
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent, epsilon

BUDGET = Budget(3.0, 1e-5)


@pytest.fixture
def make(plan: Plan) -> Any:
    """A plan like the synthetic one, with changes to its sections."""

    def build(**changes: Any) -> Plan:
        values = plan.model_dump()
        values["mechanism"] |= {"noise_multiplier": 10.0, "delta": 1e-5}
        for section, value in changes.items():
            values[section] = values[section] | value if isinstance(values.get(section), dict) else value
        return Plan.model_validate(values)

    return build


def told(plan: Plan, *, budget: Budget = BUDGET, spent: Any = (), terms: Terms | None = None, **known: Any) -> Any:
    """(text of each fact by heading, warnings)."""
    terms = terms or Terms()
    cost = cost_of(plan, budget=budget, cap=terms.cap, spent=spent, under_plan=known.pop("under_plan", ()))
    words = describe(plan, cost, size=17, terms=terms, **known)
    return {fact.heading: fact.text for fact in words.facts}, words.warnings


def test_the_facts_are_those_of_the_plan(make: Any) -> None:
    plan = make()
    facts, warnings = told(plan)
    assert plan.hash() in facts["Plan"]
    assert "outcome = bad" in facts["What is learned"]
    assert facts["From which columns"].startswith("3 inputs: income; age; purpose.")
    assert facts["Who is protected"].startswith("Each record by itself.")
    assert "cut off at 0.7 (the clip norm)" in facts["Who is protected"]
    assert facts["How often"] == "12 rounds of 2 steps each, 24 in all; in each every record takes part."
    halves = told(make(inner={"algorithm": "fomaml"}))[0]["How often"]
    assert halves.startswith(f"{facts['How often']} They see about half of the records; the others judge their result")
    assert "of each record by what it holds alone and for good, so none is used for both" in halves
    assert "10 times that limit" in facts["Noise"]
    assert "one update of 17 numbers" in facts["What leaves the bank"]
    assert "histograms" not in facts["What leaves the bank"]
    cost = epsilon([PrivacyEvent("poisson_gaussian", 10.0, 1.0, 24)], 1e-5)
    assert f"spends epsilon {epsilon_text(cost)} by itself, at delta 1e-5" in facts["What it costs"]
    assert (
        f"from 0.0000 to {epsilon_text(cost)} of 3; remaining: {3 - float(epsilon_text(cost)):.4f}"
        in facts["What it costs"]
    )
    assert warnings == ("One run uses more than half of what remains of the bank's budget.",)
    assert told(plan, budget=Budget(8.0, 1e-5))[1] == ()


def test_titles_customers_sampling_and_histograms_are_told(make: Any) -> None:
    data = make().data.model_dump()
    columns = [
        {**data["columns"][0], "title": "Yearly income", "source": "inc", "name": "income"},
        *data["columns"][1:],
    ]
    plan = make(
        data={"privacy_unit": "customer_id", "max_records_per_unit": 3, "columns": columns},
        mechanism={"sample_rate": 0.25},
        metrics={"bins": 20, "noise_multiplier": 15.0, "every": 5},
        model={"kind": "mlp", "hidden": (64, 32)},
    )
    facts, _ = told(plan)
    assert "Yearly income (inc)" in facts["From which columns"]
    assert "Each customer_id as a whole; at most 3 records are used of any one" in facts["Who is protected"]
    assert "each customer_id takes part by chance, with 25%" in facts["How often"]
    assert "Score histograms are asked for 3 times." in facts["How often"]
    assert "15 times what one customer_id can change" in facts["Noise"]
    assert "two histograms of 20 noised counts" in facts["What leaves the bank"]
    assert "hidden layers of 64 and 32" in facts["What is learned"]
    assert unit_text(plan.data) == "customer_id (with all its records, of which at most 3 are used)"


def test_what_histograms_cost_is_counted(make: Any) -> None:
    plan = make(metrics={"bins": 20, "noise_multiplier": 15.0, "every": 5})
    cost = cost_of(plan, budget=BUDGET, cap=None, spent=(), under_plan=())
    assert cost.plan == pytest.approx(epsilon(plan.events(), 1e-5))
    assert cost.plan > cost_of(make(), budget=BUDGET, cap=None, spent=(), under_plan=()).plan


@given(
    noise=st.floats(1.0, 30.0), rounds=st.integers(1, 40), before=st.integers(0, 30), cap=st.none() | st.floats(0.2, 4)
)
def test_the_rounds_that_fit_are_those_that_the_ledger_will_take(
    plan: Plan, noise: float, rounds: int, before: int, cap: float | None
) -> None:
    values = plan.model_dump()
    values["mechanism"]["noise_multiplier"] = noise
    values["outer"]["rounds"] = rounds
    changed = Plan.model_validate(values)
    spent = [PrivacyEvent("poisson_gaussian", 12.0, 1.0, 2)] * before
    cost = cost_of(changed, budget=BUDGET, cap=cap, spent=spent, under_plan=spent[: before // 2])

    def accepted(count: int) -> str:
        events = [changed.train_event()] * count
        if epsilon([*spent, *events], 1e-5) > 3:
            return "budget"
        over = cap is not None and epsilon([*spent[: before // 2], *events], 1e-5) > cap
        return "cap" if over else ""

    expected = next((count - 1 for count in range(1, rounds + 1) if accepted(count)), rounds)
    assert cost.rounds_within == expected
    assert cost.stopped_by == ("" if expected == rounds else accepted(expected + 1))


def test_a_plan_without_noise_is_warned_of_first(make: Any) -> None:
    plan = make(mechanism={"noise_multiplier": 0.0, "max_grad_norm": None})
    facts, warnings = told(plan, budget=Budget(math.inf, 1e-5))
    assert warnings[0].startswith("Nothing is protected")
    assert facts["Noise"] == "None: what leaves the bank is exact."
    assert "is not limited" in facts["Who is protected"]
    assert "no bound" in facts["What it costs"]


def test_a_run_that_does_not_fit_is_warned_of(make: Any) -> None:
    plan = make()
    spent = [PrivacyEvent("poisson_gaussian", 4.0, 1.0, 6)]
    rounds = cost_of(plan, budget=BUDGET, cap=None, spent=spent, under_plan=()).rounds_within
    assert 0 < rounds < 12
    facts, warnings = told(plan, spent=spent)
    assert warnings == (f"A whole run passes the budget: the ledger will refuse after {rounds} rounds of 12.",)
    assert "remaining: 0.0000" in facts["What it costs"]
    assert told(plan, terms=Terms(cap=0.1))[1] == (
        "The cap leaves no room for a single round: the ledger will refuse every order.",
    )


def test_terms_are_told_and_a_change_of_them_is_warned_of(make: Any) -> None:
    plan = make()
    old, new = Terms(2.5, "2027-06-30"), Terms(9.0)
    facts, warnings = told(plan, terms=old, standing=old)
    assert (
        "may spend epsilon 2.5 together, within the bank's budget. It ends with 2027-06-30 (UTC)."
        in facts["Limits of this approval"]
    )
    assert not any("replaces" in warning for warning in warnings)
    facts, warnings = told(plan, terms=new, standing=old)
    assert "It has no end." in facts["Limits of this approval"]
    assert any("The cap of 9 is above the bank's budget of 3" in warning for warning in warnings)
    assert any("this replaces the terms" in warning and "2.5" in warning for warning in warnings)


@given(st.floats(0, 100), st.floats(0.01, 100))
def test_what_is_written_never_claims_more_protection_than_there_is(spent: float, budget: float) -> None:
    shown = float(epsilon_text(spent))
    assert spent - 1e-11 <= shown < spent + 1.1e-4
    remaining = float(remaining_text(budget, spent))
    assert remaining <= max(0.0, budget - spent) + 0.51e-4


def test_what_has_no_bound_is_written_so() -> None:
    assert epsilon_text(math.inf) == "no bound"
    assert remaining_text(math.inf, 1.0) == "no limit"
    assert remaining_text(3.0, math.inf) == "0.0000"

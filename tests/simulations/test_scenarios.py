"""A scenario: defaults, the split by name alone, and the noise that spends the budget."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.dataset import read_table
from metarisk_common.config import validate
from metarisk_common.errors import ConfigError
from metarisk_common.plan import Plan
from metarisk_common.privacy import epsilon
from metarisk_common.table import split_by_institution
from simulations.scenarios import BUILT_IN, Scenario, Split, built_in, data_path, load_scenario, split

COLUMN = {"kind": "numeric", "name": "age", "lower": 18, "upper": 90}
LEAST = {
    "name": "least",
    "data": {"file": "x.csv"},
    "schema": {"institution": "bank", "label": {"name": "bad"}, "columns": [COLUMN]},
}
NAMES = tuple(f"Bank {number}" for number in range(12))


def scenario(**values: object) -> Scenario:
    return validate({**LEAST, **values}, Scenario, where="test")


def spent(plan: Plan) -> float:
    return epsilon(plan.events(), plan.mechanism.delta)


def test_a_name_a_file_and_a_schema_are_enough() -> None:
    plan = scenario().plan()
    assert (plan.model.kind, plan.inner.algorithm, plan.outer.rounds) == ("scorecard", "reptile", 20)
    assert plan.name == "least"
    assert scenario().seed is None, "without a seed the noise is real"
    assert 0 < plan.mechanism.noise_multiplier < math.inf


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_noise_spends_the_budget_and_no_more(target: float, rate: float) -> None:
    found = scenario(privacy={"epsilon": target, "sample_rate": rate})
    assert 0.999 * target <= spent(found.plan()) <= target
    assert spent(found.plan(epsilon=1.5)) == pytest.approx(1.5, rel=1e-3)


def test_an_infinite_budget_switches_noise_and_clipping_off() -> None:
    for plan in (scenario().plan(epsilon=math.inf), scenario(privacy={"epsilon": math.inf}).plan()):
        assert (plan.mechanism.noise_multiplier, plan.mechanism.max_grad_norm) == (0.0, None)


def test_joint_training_takes_as_many_steps_at_the_same_epsilon() -> None:
    own = scenario(privacy={"epsilon": 2.0}, server={"rounds": 7}, training={"local_steps": 3})
    joint = own.joint().plan()
    assert (joint.inner.algorithm, joint.inner.local_steps, joint.outer.rounds) == ("fedavg", 1, 21)
    assert spent(joint) == spent(own.plan()) <= 2.0


@pytest.mark.parametrize(
    "server",
    [
        {"aggregator": "median", "weighting": "equal"},
        {"aggregator": "trimmed_mean", "weighting": "equal", "trim": 0.2},
        {"aggregator": "norm_bounded_mean", "max_update_norm": 2.5},
    ],
)
def test_a_scenario_chooses_the_aggregator(server: dict[str, object]) -> None:
    own = scenario(server={"rounds": 2, **server})
    assert server.items() <= own.plan().outer.model_dump().items()
    assert own.joint().plan().outer.aggregator == server["aggregator"]
    assert Scenario.model_validate_json(own.model_dump_json(by_alias=True)) == own
    assert own.plan().hash() != scenario(server={"rounds": 2}).plan().hash()


@given(st.permutations(NAMES), st.integers(1, 11))
def test_names_alone_decide_who_takes_part(order: list[str], unseen: int) -> None:
    found = split(scenario(splits={"unseen": unseen}), order)
    assert found == split(scenario(splits={"unseen": unseen}), NAMES)
    assert len(found.unseen) == unseen
    assert sorted([*found.seen, *found.unseen]) == sorted(NAMES)
    # More unseen ones are the same ones and others.
    assert set(split(scenario(splits={"unseen": 1}), order).unseen) <= set(found.unseen)


def test_another_experiment_chooses_others_and_a_quarter_is_unseen_by_default() -> None:
    first, second = split(scenario(), NAMES), split(scenario(name="second"), NAMES)
    assert len(first.unseen) == len(second.unseen) == 3
    assert first != second


def test_institutions_named_as_unseen_are_unseen() -> None:
    assert split(scenario(splits={"unseen": ["Bank 3", "Bank 3", "Bank 1"]}), NAMES[:4]) == Split(
        ("Bank 0", "Bank 2"), ("Bank 1", "Bank 3")
    )


@pytest.mark.parametrize(
    ("unseen", "names", "message"),
    [
        (["Bank 9", "X", "Y"], NAMES, "no institution 'X' in the table .and 1 more"),
        ([], NAMES, "at least one each"),
        (12, NAMES, "at least one each"),
        (None, NAMES[:1], "has 1 institution"),
        (None, (), "has 0 institution"),
    ],
)
def test_a_split_with_nobody_on_one_side_is_refused(unseen: object, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(scenario(splits={} if unseen is None else {"unseen": unseen}), names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon"),
        ({"privacy": {"epsilon": math.nan}}, "privacy.epsilon"),
        ({"privacy": {"epsilom": 1}}, "unknown key 'privacy.epsilom'; did you mean 'epsilon'"),
        ({"evaluation": {"k": [1]}}, "evaluation.k"),
        ({"evaluation": {"k": []}}, "evaluation.k"),
        ({"evaluation": {"prior_variance": math.inf}}, "evaluation.prior_variance"),
        ({"training": {"task": "segment"}}, "schema.segment"),
        ({"name": "Two Words"}, "name"),
        ({"splits": {"unseen": 0}}, "splits.unseen"),
        ({"server": {"aggregator": "median"}}, "key 'server': .* needs weighting = \"equal\""),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scenario(**values)


def test_numbers_of_labels_are_put_in_order() -> None:
    assert scenario(evaluation={"k": [20, 0, 20, 5]}).evaluation.k == (0, 5, 20)


def test_what_is_written_of_a_scenario_reads_as_the_same(make_scenario: Callable[..., Path], tmp_path: Path) -> None:
    path = make_scenario(tmp_path, replace={"epsilon = 4.0": "epsilon = inf"})
    found = load_scenario(path)
    assert math.isinf(found.privacy.epsilon)
    assert Scenario.model_validate_json(found.model_dump_json(by_alias=True)) == found
    assert data_path(found, path) == tmp_path / "loans.csv"


def test_the_built_in_scenario_learns_from_59_lenders_and_leaves_20_out() -> None:
    path = built_in("credit")
    found = load_scenario(path)
    table = data_path(found, path)
    names = list(split_by_institution(read_table(table), found.columns, str(table)))
    parts = split(found, names)
    assert (len(parts.seen), len(parts.unseen)) == (59, 20)
    assert 0.999 * 3 <= spent(found.plan()) <= 3


def test_a_scenario_that_is_not_built_in_is_told_which_are() -> None:
    with pytest.raises(ConfigError, match=r"'nothing'.*credit"):
        built_in("nothing")
    assert all(built_in(name).is_file() for name in BUILT_IN)

"""Cross-domain: whether lenders of one business learn from those of another through the columns that both have.

Two domains are made of the embedded loans by a public column, each with lenders of its own: `existing` businesses, the
source, and `new` ones, the target, of whose lenders there are few. Each domain lacks columns that the other has. One
union schema encodes both with public constants; inputs of a column that a domain lacks are zero, which is where the
encoding centres them, so they neither move the other's weights nor get moved. What is shared is what they have in
common: the additive model's common inputs, or the body of an mlp learned by ANIL.

Either answer is a result: target alone, source alone and both together stand in one table, judged on the same draws of
the target's unseen lenders.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import polars as pl

from client.dataset import Dataset, from_frame
from metarisk_common.features import Encoder
from metarisk_common.params import Params
from metarisk_common.plan import InnerLoop, ModelSpec, Plan
from metarisk_common.schema import Schema
from metarisk_common.table import split_by_institution

from . import contest
from .scenarios import Scenario, built_in, load_scenario, split
from .tables import read_scenario_table

COLUMN: Final = "business_age"
RIVAL: Final = "target alone"
KS: Final = (0, 20, 50)
VARIANCES: Final = (0.3,)


@dataclass(frozen=True)
class Domain:
    """One side: its value of the public column, and columns that it lacks."""

    value: str
    lacks: tuple[str, ...]


SOURCE: Final = Domain("existing", lacks=("revolving_credit", "low_doc"))
TARGET: Final = Domain("new", lacks=("jobs_created", "jobs_retained"))


@dataclass(frozen=True)
class Mixed:
    """Data sets of the two domains in the union encoding: who trains in each, and the target's unseen lenders."""

    source: list[Dataset]
    target: list[Dataset]
    unseen: list[Dataset]


def of_domain(frame: pl.DataFrame, schema: Schema, domain: Domain, lender: str) -> Dataset:
    """Encode a lender's loans of one domain, zero where a column is one that the domain lacks."""
    dataset = from_frame(frame.filter(pl.col(COLUMN) == domain.value), schema, lender, lender)
    lacking = np.isin(Encoder(schema).groups, domain.lacks)
    return replace(dataset, x=np.where(lacking, np.float32(0), dataset.x))


def domains(scenario: Scenario, frame: pl.DataFrame, *, target_lenders: int, most: int, room: int) -> Mixed:
    """Give each training lender to one domain, by the order of their hashed names: the first few to the target.

    Args:
        scenario: whose lenders are split into those that take part and those that do not.
        frame: the whole table.
        target_lenders: how many of those that take part belong to the target; all the others to the source.
        most: records used of one lender, its first ones.
        room: records of the target that an unseen lender must have to be judged.

    """
    tables = split_by_institution(frame, scenario.columns, scenario.name)
    parts = split(scenario, tuple(tables))
    # Among those that take part, the same rule chooses who stands for the target.
    again = split(
        scenario.model_copy(update={"splits": scenario.splits.model_copy(update={"unseen": target_lenders})}),
        parts.seen,
    )
    source = [of_domain(tables[name].head(most), scenario.columns, SOURCE, name) for name in again.seen]
    target = [of_domain(tables[name].head(most), scenario.columns, TARGET, name) for name in again.unseen]
    judged = [of_domain(tables[name], scenario.columns, TARGET, name) for name in parts.unseen]
    enough = [each for each in judged if contest.can_be_judged(each, room)]
    return Mixed([each for each in source if len(each.y)], [each for each in target if len(each.y)], enough)


@dataclass(frozen=True)
class Setup:
    """What a contest between domains fixes.

    Attributes:
        model: `scorecard`, learned by Reptile, or `mlp`, whose body is shared and learned by ANIL.
        epsilon: budget of every lender; `inf` for none.
        target_lenders: lenders of the target that take part.
        most: records used of each lender.
        seed: of the noise and of the draws.
        rounds: in place of the model's own.

    """

    model: str
    epsilon: float
    target_lenders: int = 10
    most: int = 2000
    seed: int = 1
    rounds: int | None = None


def initializations(setup: Setup, table: pl.DataFrame, *, room: int) -> tuple[dict[str, tuple[Plan, Params]], Mixed]:
    """Train one plan on the target alone, on the source alone and on both: every lender spends the same.

    Args:
        setup: what is trained.
        table: the embedded loans, or some of them.
        room: records of the target that an unseen lender must have to be judged.

    """
    scenario = _with_model(load_scenario(built_in("credit")), setup.model)
    if setup.rounds is not None:
        scenario = scenario.model_copy(update={"server": scenario.server.model_copy(update={"rounds": setup.rounds})})
    found = domains(scenario, table, target_lenders=setup.target_lenders, most=setup.most, room=room)
    plan = scenario.plan(epsilon=setup.epsilon)
    learned_from = {RIVAL: found.target, "source alone": found.source, "both": [*found.target, *found.source]}
    learned = {name: (plan, contest.learn(plan, datasets, seed=setup.seed)) for name, datasets in learned_from.items()}
    return learned, found


def hold(setup: Setup, *, draws: int = 10, ks: tuple[int, ...] = KS) -> list[contest.Row]:
    """Judge what was learned in each domain, and in both, on the target's unseen lenders; rows against the target's."""
    path = built_in("credit")
    table = read_scenario_table(load_scenario(path), path)
    learned, found = initializations(setup, table, room=max(ks) + 100)
    methods = contest.entrants(learned, VARIANCES)
    return contest.judge(methods, RIVAL, contest.judging_sets(found.unseen), ks, draws=draws, seed=setup.seed)


def _with_model(scenario: Scenario, model: str) -> Scenario:
    without = {"metrics": None}
    if model == "scorecard":
        return scenario.model_copy(update=without)
    spec = ModelSpec(kind="mlp", hidden=(16,), base_rate=scenario.model.base_rate)
    inner = InnerLoop(algorithm="anil", local_steps=2, learning_rate=2.0)
    server = scenario.server.model_copy(update={"rounds": 50, "learning_rate": 2.0, "momentum": 0.9})
    return scenario.model_copy(update={**without, "model": spec, "training": inner, "server": server})

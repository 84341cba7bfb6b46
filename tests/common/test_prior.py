"""The learned prior, against institutions whose differences are known because they were drawn."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit

from client.dataset import load_dataset, read_table
from client.training import tasks_for
from metarisk_common.features import MISSING_SHARE, Encoder
from metarisk_common.moments import public_inputs
from metarisk_common.plan import Plan
from metarisk_common.prior import LearnedPrior, Released, _most_likely, estimate_prior, gradient_noise_variance
from metarisk_common.schema import Schema
from metarisk_common.tasks import Task
from server import prior_sums
from simulations import experiment, runfolder, vector
from simulations.scenarios import load_scenario

COLUMNS: list[dict[str, Any]] = [
    {"kind": "numeric", "name": "amount", "lower": 1, "upper": 1000, "scale": "log",
     "bins": [5, 30, 100], "shares": [0.2, 0.3, 0.3, 0.2]},
    {"kind": "numeric", "name": "age", "lower": 18, "upper": 90},
    {"kind": "categorical", "name": "sector", "categories": ["a", "b", "c"], "shares": [0.5, 0.2, 0.2]},
    {"kind": "numeric", "name": "years", "lower": 0, "upper": 50, "scale": "log1p"},
]  # fmt: skip
TRUTH = {"amount": 1.0, "age": 0.0, "sector": 4.0, "years": 0.0, "intercept": 1.0}
SIGNAL = [group for group, value in TRUTH.items() if value]
BANKS, RECORDS, ROUNDS = 80, 800, 8
Z_AT_3 = math.sqrt(ROUNDS) / 0.7191  # epsilon 3 at delta 1e-5 for eight full batches


def plan(noise: float = Z_AT_3, *, rate: float = 1.0, clip: float | None = 0.7, **inner: Any) -> Plan:
    inner = {"local_steps": 1, **inner}
    return Plan.model_validate(
        {
            "name": "test",
            "data": {"label": {"name": "default"}, "institution": "bank", "columns": COLUMNS},
            "model": {"base_rate": 0.2},
            "inner": inner,
            "mechanism": {"noise_multiplier": noise, "max_grad_norm": clip, "sample_rate": rate},
            "outer": {"rounds": ROUNDS, "learning_rate": 20 / inner["local_steps"], "momentum": 0, "learn_prior": True},
        }
    )


@dataclass(frozen=True)
class World:
    """Institutions with weights drawn around shared ones, logistic outcomes, and how far they differ as drawn."""

    banks: dict[str, list[Task]]
    sizes: dict[str, int]
    spread: dict[str, float]


@pytest.fixture(scope="module")
def world() -> World:
    random = np.random.default_rng(1)
    encoder = Encoder(plan().data)
    deviations = np.sqrt([TRUTH[group] for group in encoder.groups])
    shared = random.normal(0, 0.5, encoder.width)
    shared[-1] = math.log(0.25) / 0.25
    weights = shared + deviations * random.normal(size=(BANKS, encoder.width))
    inputs = public_inputs(plan().data, 50_000)
    banks = {}
    for number, own in enumerate(weights):
        x = inputs[random.integers(len(inputs), size=RECORDS)]
        y = random.random(RECORDS) < expit(x @ own)
        banks[f"bank {number}"] = [Task("", "", torch.tensor(x, dtype=torch.float32), torch.tensor(y).float())]
    variance = weights.var(axis=0, ddof=1)
    spread = {group: variance[[g == group for g in encoder.groups]].mean() for group in TRUTH}
    return World(banks, dict.fromkeys(banks, RECORDS), spread)


@dataclass(frozen=True)
class Run:
    learned: LearnedPrior
    meta_params: dict[str, Any]
    released: list[Released]


Play = Callable[[Plan], Run]


@pytest.fixture(scope="module")
def play(world: World) -> Iterator[Play]:
    """Play a plan with the real private engine, once, and keep what its estimate was made of."""
    played: dict[str, Run] = {}
    kept: list[Released] = []

    def keep(plan: Plan, meta: Any, released: list[Released], *, rounds: int) -> LearnedPrior:
        kept[:] = released
        return estimate_prior(plan, meta, released, rounds=rounds)

    def once(chosen: Plan) -> Run:
        if chosen.hash() not in played:
            width = Encoder(chosen.data).width
            end = vector.learn(chosen, world.banks, world.sizes, width=width, seed=3)
            assert end.prior is not None
            played[chosen.hash()] = Run(end.prior, end.meta_params, list(kept))
        return played[chosen.hash()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior_sums, "estimate_prior", keep)
        yield once


def found(learned: LearnedPrior) -> dict[str, float]:
    return dict(zip(learned.groups, learned.tau2, strict=True))


@pytest.mark.parametrize(
    "chosen",
    [
        plan(),
        plan(noise=0.0, clip=None),
        plan(rate=0.5, noise=Z_AT_3 / 2),
        plan(algorithm="prox", prox_strength=0.1, local_steps=2, learning_rate=4.0),
    ],
    ids=["epsilon 3", "no privacy", "sampled", "two steps of prox"],
)
def test_the_estimate_is_the_truth(world: World, chosen: Plan, play: Play) -> None:
    outcome = play(chosen)
    learned = found(outcome.learned)
    for group in SIGNAL:
        assert 1 / 1.5 < learned[group] / world.spread[group] < 1.5
        assert 1 / 1.5 < learned[group] / TRUTH[group] < 1.5
    for group in TRUTH.keys() - set(SIGNAL):
        assert learned[group] < 0.1
    assert (outcome.learned.rounds, outcome.learned.institutions) == (2, BANKS)


def test_noise_does_not_bias_it_and_would_if_it_were_not_subtracted(play: Play) -> None:
    noisy, plain = play(plan()), play(plan(noise=0.0, clip=None))
    for group in SIGNAL:
        assert found(noisy.learned)[group] == pytest.approx(found(plain.learned)[group], rel=0.2)
    # Negative controls: told of no noise, of less or of more than there is.
    told = {
        factor: found(estimate_prior(plan(factor * Z_AT_3), noisy.meta_params, noisy.released, rounds=2))
        for factor in (0.0, 0.5, 1.0, 1.5)
    }
    assert told[1.0] == found(noisy.learned)
    for group in ("amount", "age", "years"):
        assert told[0.0][group] > 1.5 * told[1.0][group] + 0.5
    assert told[0.5]["amount"] > 1.5 * told[1.0]["amount"] > 1.5 * told[1.5]["amount"]


def test_with_the_squares_alone_it_would_be_far_off(play: Play) -> None:
    """Bins of one column go together, and each seems to differ by what its neighbours differ, too."""
    outcome = play(plan(noise=0.0, clip=None))
    inputs = public_inputs(plan().data, 20_000)
    p = expit(inputs @ outcome.meta_params["points.weight"].reshape(-1))
    amount = np.array([group == "amount" for group in Encoder(plan().data).groups])
    squares = ((p * (1 - p))[:, None] * inputs**2).mean(axis=0)[amount]
    updates = np.array([one.mean_update["points.weight"].reshape(-1) for one in outcome.released])[:, amount]
    errors = np.array([np.diag(1 / (RECORDS * squares))] * BANKS)
    assert _most_likely(updates / squares, errors) > 1.6 * found(outcome.learned)["amount"]


def test_it_has_no_bias_from_fitting_the_mean() -> None:
    """Of eight institutions plain maximum likelihood would find an eighth too little."""
    random = np.random.default_rng(2)
    errors = np.array([np.diag([0.5, 0.1, 2.0]) * scale for scale in random.uniform(0.1, 0.6, 8)])
    errors[:, 0, 1] = errors[:, 1, 0] = 0.02
    estimates = []
    for _ in range(150):
        noise = np.array([random.multivariate_normal(np.zeros(3), one) for one in errors])
        estimates.append(_most_likely(5.0 + random.normal(0, math.sqrt(1.5), (8, 3)) + noise, errors))
    assert np.mean(estimates) == pytest.approx(1.5, abs=0.13)


def test_no_spread_is_none_at_all() -> None:
    errors = np.array([np.eye(2)] * 6)
    assert _most_likely(np.tile([[0.5, -0.5]], (6, 1)), errors) == 0.0


# What it may be asked for.


def test_what_it_cannot_read_is_refused(world: World) -> None:
    one = Released({"points.weight": np.zeros((1, 5))}, 2, 100)
    with pytest.raises(ValueError, match="at least 3 institutions"):
        estimate_prior(plan(), {"points.weight": np.zeros((1, 5))}, [one] * 2, rounds=2)
    with pytest.raises(ValueError, match='learn_prior cannot read the updates of algorithm = "fomaml"'):
        plan(algorithm="fomaml")
    values = plan().model_dump(mode="json")
    with pytest.raises(ValueError, match='learn_prior needs kind = "scorecard"'):
        Plan.model_validate({**values, "model": {"kind": "mlp", "hidden": [3]}})


def test_a_wide_group_is_judged_by_its_strongest_directions() -> None:
    """As many inputs as random trees make: one figure for all their leaves, from a matrix that stays small."""
    values = plan(noise=0.0, clip=None).model_dump(mode="json")
    values["data"]["columns"] = [
        {"kind": "categorical", "name": "branch", "categories": [str(number) for number in range(150)]}
    ]
    wide = Plan.model_validate(values)
    width = Encoder(wide.data).width
    random = np.random.default_rng(4)
    x = public_inputs(wide.data, 20_000)
    information = 0.16 * x.T @ x / len(x)  # at weights that give everybody the base rate of 0.2
    label_noise = np.linalg.cholesky(information + 1e-12 * np.eye(width)) / math.sqrt(100_000)
    updates = [
        information @ random.normal(0, math.sqrt(0.1), width) + label_noise @ random.normal(size=width)
        for _ in range(20)
    ]
    released = [Released({"points.weight": update[None]}, 2, 100_000) for update in updates]
    start = np.zeros((1, width))
    start[0, -1] = math.log(0.25) / 0.25
    learned = found(estimate_prior(wide, {"points.weight": start}, released, rounds=2))
    assert learned["branch"] == pytest.approx(0.1, rel=0.15)


def test_too_wide_a_model_has_no_prior_and_the_run_ends_all_the_same() -> None:
    columns = [{"kind": "categorical", "name": "branch", "categories": [str(number) for number in range(2000)]}]
    values = plan().model_dump(mode="json")
    wide = Plan.model_validate({**values, "data": {**values["data"], "columns": columns}})
    meta = {"points.weight": np.zeros((1, Encoder(wide.data).width))}
    sums = prior_sums.init()
    for name in ("a", "b", "c"):
        sums = prior_sums.add(sums, wide, ROUNDS, name, meta)
    assert prior_sums.result(sums, wide, {"a": 5, "b": 5, "c": 5}, meta) is None
    with pytest.raises(ValueError, match="at most 2000 inputs"):
        estimate_prior(wide, meta, [Released(meta, 1, 5)] * 3, rounds=2)


def test_segments_share_the_batch_so_each_steps_noise_grows() -> None:
    by_segment = {**plan().data.model_dump(mode="json"), "segment": "kind", "segments": ["x", "y", "z"]}
    values = {**plan().model_dump(mode="json"), "data": by_segment, "inner": {"task": "segment", "local_steps": 1}}
    whole, cut = plan(), Plan.model_validate(values)
    assert gradient_noise_variance(whole, 100) == pytest.approx((Z_AT_3 * 0.7 / 100) ** 2)
    assert gradient_noise_variance(cut, 100) == pytest.approx(3 * gradient_noise_variance(whole, 100))


PRIOR = LearnedPrior(("amount", "intercept"), (0.25, 2.0), 5, 40)


def test_each_input_has_its_groups_variance() -> None:
    assert PRIOR.variances(["amount", "amount", "intercept"]).tolist() == [0.25, 0.25, 2.0]
    with pytest.raises(ValueError, match="has no group 'age'; it was learned for another schema"):
        PRIOR.variances(["amount", "age"])


def test_it_survives_json() -> None:
    assert LearnedPrior.from_json(json.loads(json.dumps(PRIOR.to_json()))) == PRIOR


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau2": [0.25]},
        {"tau2": [0.25, -1.0]},
        {"tau2": [0.25, math.inf]},
        {"tau2": [0.25, math.nan]},
        {"tau2": [0.25, "much"]},
        {"groups": ["amount", "amount"]},
        {"groups": None},
        {"rounds": 0},
        {"institutions": None},
    ],
)
def test_what_is_no_prior_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LearnedPrior.from_json({**PRIOR.to_json(), **wrong})
    with pytest.raises(ValueError, match="not a learned prior"):
        LearnedPrior.from_json({})


# The public records that it takes expectations over.


def test_public_records_are_as_the_schema_claims() -> None:
    schema = plan().data
    x, encoder = public_inputs(schema, 40_000), Encoder(plan().data)
    assert x.shape == (40_000, encoder.width)
    assert np.linalg.norm(x, axis=1).max() < 1 + 1e-6
    # The bound on a row's norm takes a little of every square; before it, they are the encoder's own.
    kept = (x**2).mean(axis=0) / encoder.second_moment
    assert kept.min() > 0.6
    assert kept.max() < 1.01
    assert np.abs(x[:, :-1].mean(axis=0)).max() < 0.02
    sectors = x[:, [name.startswith("sector") for name in encoder.names]]
    np.testing.assert_allclose(np.bincount(sectors.argmax(axis=1)) / len(x), [0.5, 0.2, 0.2, 0.1], atol=0.01)
    missing = x[:, list(encoder.names).index("age is missing")]
    assert (missing > 0).mean() == pytest.approx(MISSING_SHARE, abs=0.003)
    assert public_inputs(schema, 500).tobytes() == public_inputs(schema, 500).tobytes()


def test_columns_that_share_a_source_or_are_divided_are_drawn_by_what_comes_of_them() -> None:
    columns = [
        {"kind": "numeric", "name": "amount", "lower": 1, "upper": 100},
        {"kind": "numeric", "name": "share", "source": "amount", "divide_by": "total", "lower": 0, "upper": 1,
         "bins": [0.5], "shares": [0.9, 0.1], "missing": "refuse"},
        {"kind": "categorical", "name": "total", "categories": ["1", "2"]},
    ]  # fmt: skip
    schema = Schema.model_validate({**plan().data.model_dump(mode="json"), "columns": columns})
    x = public_inputs(schema, 10_000)
    above = x[:, list(Encoder(schema).names).index("share > 0.5")]
    assert (above > 0).mean() == pytest.approx(0.1, abs=0.02)


# Every engine tells the same.


def test_the_federation_and_the_vector_engine_learn_the_same_prior(
    make_scenario: Callable[..., Path], tmp_path: Path
) -> None:
    asked = "rounds = 5\nlearn_prior = true\ntail_averaging = 0.4\nwarmup_rounds = 1"
    asked += '\noptimizer = "yogi"\nsubtract_noise = true'
    path = make_scenario(tmp_path, replace={"rounds = 12": asked})
    frame = read_table(path.parent / "loans.csv")
    prepared = runfolder.prepare(
        tmp_path / "run", load_scenario(path), frame, where="loans.csv", epsilon=None, engine="inprocess"
    )
    meta = experiment.train(prepared, workers=0)
    banks = {
        name: tasks_for(prepared.plan, load_dataset(folder / "data.parquet", prepared.plan.data, name))
        for name, folder in prepared.bank_folders.items()
    }
    width = Encoder(prepared.plan.data).width
    end = vector.learn(prepared.plan, banks, prepared.sizes, width=width, seed=prepared.info["seed"])
    assert end.prior is not None
    assert prepared.journal()[-1]["learned_prior"] == end.prior.to_json()
    assert all(value.tobytes() == meta[name].tobytes() for name, value in end.meta_params.items())
    assert set(end.prior.groups) == set(Encoder(prepared.plan.data).groups)
    assert (end.prior.rounds, end.prior.institutions) == (2, len(banks))

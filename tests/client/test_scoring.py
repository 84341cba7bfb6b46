"""Score histograms of a bank: what is released, how much noise it has, and what one customer can change."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from scipy import stats

from client.dataset import from_frame
from client.rng import SecureRandom
from client.scoring import noised_histograms
from client.training import tasks_for
from metarisk_common.features import Encoder
from metarisk_common.histograms import NEGATIVES, POSITIVES
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params, l2_norm, sub
from metarisk_common.plan import Plan, ScoreHistograms

BINS = 12


@pytest.fixture
def asking(plan: Plan) -> Plan:
    return plan.model_copy(update={"metrics": ScoreHistograms(bins=BINS, noise_multiplier=4.0)})


@pytest.fixture
def own(make_loans: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    return make_loans(lenders=1)


def released(plan: Plan, frame: pl.DataFrame, seed: int = 1) -> Params:
    dataset = from_frame(frame, plan.data, "Lender A", "loans")
    width = Encoder(plan.data).width
    start = initial_params(plan, width)
    rng = SecureRandom.seeded(seed)
    return noised_histograms(start, plan, tasks_for(plan, dataset), width=width, rng=rng)


def quiet(plan: Plan) -> Plan:
    assert plan.metrics is not None
    return plan.model_copy(update={"metrics": plan.metrics.model_copy(update={"noise_multiplier": 0.0})})


def test_every_record_is_counted_once_by_its_outcome(asking: Plan, own: pl.DataFrame) -> None:
    found = released(quiet(asking), own)
    assert found[POSITIVES].sum() == (own["outcome"] == "bad").sum()
    assert found[POSITIVES].sum() + found[NEGATIVES].sum() == own.height
    by_segment = asking.model_copy(update={"inner": asking.inner.model_copy(update={"task": "segment"})})
    for name, count in released(quiet(by_segment), own).items():
        np.testing.assert_array_equal(count, found[name])


def test_a_records_cell_is_its_own_whoever_else_is_there(asking: Plan, own: pl.DataFrame) -> None:
    # By outcome: edges that a table's own base rate decides would differ between all three.
    parts = [released(quiet(asking), own.filter(pl.col("outcome") == outcome)) for outcome in ("good", "bad")]
    for name, count in released(quiet(asking), own).items():
        np.testing.assert_array_equal(count, parts[0][name] + parts[1][name])


def test_the_noise_is_the_promised_one_and_fresh(asking: Plan, own: pl.DataFrame) -> None:
    exact = released(quiet(asking), own)
    noise = np.concatenate(
        [count.ravel() for seed in range(60) for count in sub(released(asking, own, seed), exact).values()]
    )
    assert stats.kstest(noise, stats.norm(0, 4.0).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, stats.norm(0, wrong * 4.0).cdf).pvalue < 1e-6
    assert len(np.unique(noise)) == len(noise)


def test_a_customer_moves_the_cells_by_its_records_at_most_and_the_noise_covers_it(
    asking: Plan, own: pl.DataFrame
) -> None:
    of_customers = asking.data.model_copy(update={"privacy_unit": "customer", "max_records_per_unit": 3})
    plan = asking.model_copy(update={"data": of_customers})
    # One customer with ten equal loans: at most three count.
    frame = own.with_columns(pl.int_range(pl.len()).clip(lower_bound=9).alias("customer"))
    frame = pl.concat([frame[:1]] * 9 + [frame[9:]]).with_columns(
        pl.when(pl.int_range(pl.len()) < 9).then(9).otherwise(pl.col("customer")).alias("customer")
    )
    without = frame.filter(pl.col("customer") != 9)
    moved = sub(released(quiet(plan), frame), released(quiet(plan), without))
    assert 1 < l2_norm(moved) <= 3
    noise = sub(released(plan, frame), released(quiet(plan), frame))
    single = sub(released(asking, own), released(quiet(asking), own))
    for name, values in noise.items():
        np.testing.assert_allclose(values, 3 * single[name], rtol=1e-9)


def test_a_plan_that_asks_for_none_gets_none(plan: Plan, own: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="asks for no"):
        released(plan, own)

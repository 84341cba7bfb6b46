"""Fraud and volatility are measured as their fields measure them: known answers, and draws that keep their promises."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import average_precision_score

from metarisk_common import fraud_metrics as fraud
from metarisk_common import volatility_metrics as volatility
from metarisk_common.errors import DataError
from metarisk_common.evaluation import EvaluationSet, Predictor, in_time, paired_difference, run_episodes, summarise
from metarisk_common.tasks import few_shot_draw, few_shot_in_time
from metarisk_common.yardsticks import FRAUD, VOLATILITY, YARDSTICKS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=60))
def test_average_precision_is_scikit_learns_with_ties(rows: list[tuple[bool, int]]) -> None:
    y, p = np.array([int(one) for one, _ in rows]), np.array([score / 6 for _, score in rows])
    if 0 < y.sum() < len(y):
        assert fraud.average_precision(y, p) == pytest.approx(average_precision_score(y, p), abs=1e-12)


def test_alerts_are_counted_by_hand() -> None:
    # 200 sound payments with scores 0.000 to 0.199, and four frauds.
    y = np.array([0] * 200 + [1] * 4)
    p = np.concatenate([np.arange(200) / 1000, [0.9, 0.1985, 0.1955, 0.1]])
    # At 1% two sound payments may be alerted (0.199, 0.198): two frauds lie above 0.197.
    assert fraud.recall_at(y, p, 0.01) == 0.5
    assert fraud.recall_at(y, p, 0.05) == 0.75
    assert fraud.recall_at(y, p, 0.0) == 0.25
    amount = np.concatenate([np.full(200, 1e6), [10.0, 20.0, 30.0, 40.0]])
    assert fraud.value_captured(y, p, amount, 0.01) == pytest.approx(0.3)
    assert fraud.value_captured(y, p, amount, 0.05) == pytest.approx(0.6)
    # Alerted: two frauds and the sound ones at 0.199 and 0.198.
    assert fraud.alerts_a_day(y, p, np.linspace(3.0, 5.9, 204), 0.01) == pytest.approx(4 / 3)
    # 1% of 204 records is 2.04 places: 0.9 is a fraud, 0.199 is none, and of the third place 0.04 is a fraud.
    assert fraud.precision_in_alerts(y, p) == pytest.approx(1.04 / 2.04)


def test_what_shares_a_score_is_alerted_together() -> None:
    y = np.array([1, 0, 1, 0, 0, 0])
    assert fraud.recall_at(y, np.array([0.9, 0.9, 0.5, 0.1, 0.1, 0.1]), 0.2) == 0.0
    assert not fraud.alerted(y, np.full(6, 0.5), 0.2).any()
    assert fraud.recall_at(y, np.full(6, 0.5), 1.0) == 1.0
    assert fraud.precision_in_alerts(y, np.full(6, 0.5), 0.5) == pytest.approx(1 / 3)


def test_volatility_is_measured_by_hand() -> None:
    y, f = np.array([0.0, np.log(2), -1.0]), np.array([0.0, 0.0, 1.0])
    expected = np.mean([0, 2 - np.log(2) - 1, np.exp(-2) + 2 - 1])
    assert volatility.qlike(y, f) == pytest.approx(expected)
    assert volatility.mse(y, f) == pytest.approx((np.log(2) ** 2 + 4) / 3)
    assert volatility.bias(y, f) == pytest.approx((2 - np.log(2)) / 3)
    assert volatility.r2(y, y, np.zeros(3)) == 1.0
    assert volatility.r2(y, np.zeros(3), np.zeros(3)) == 0.0
    # A forecast of the judged records' own mean earns something where the reference was off; never by itself.
    assert volatility.r2(y, np.full(3, y.mean()), np.full(3, y.mean())) == 0.0
    # In standardised units of 2 log-variance each, QLIKE is of the variances themselves.
    scored = VOLATILITY.score(y / 2, f / 2, {"reference": np.zeros(3), "scale": np.full(3, 2.0)})
    assert scored["qlike"] == pytest.approx(expected)
    assert scored["mse"] == pytest.approx(volatility.mse(y, f) / 4)
    with pytest.raises(ValueError, match="reference"):
        VOLATILITY.score(y, f, {})
    with pytest.raises(ValueError, match="1 of 3 forecasts are not finite"):
        VOLATILITY.score(y, np.array([0.0, np.nan, 0.0]), {"reference": np.zeros(3)})


def test_a_yardstick_titles_all_that_it_measures() -> None:
    for name, yardstick in YARDSTICKS.items():
        assert yardstick.name == name
        assert set(yardstick.metrics) == set(yardstick.titles)
        assert yardstick.lower_is_better < set(yardstick.metrics)
        assert yardstick.headline not in yardstick.lower_is_better


Array = npt.NDArray[Any]


class Ranker:
    name = "ranker"
    needs_support = False

    def fit(self, _x: Array, _raw: Array, y: Array) -> Predictor:
        shift = float(len(y))
        return lambda x, _raw: 1 / (1 + np.exp(-x[:, 0] - 1e-4 * shift))


def rare(name: str, positives: int = 24, rows: int = 1200) -> EvaluationSet:
    random = np.random.default_rng(len(name))
    y = np.zeros(rows)
    y[random.choice(rows, positives, replace=False)] = 1
    x = random.normal(size=(rows, 2)) + 2 * y[:, None] - 3
    extra = {"amount": random.uniform(1, 9, rows), "day": np.arange(rows) / 10}
    return EvaluationSet(name, x.astype(np.float32), x, y, extra)


def test_episodes_of_fraud_are_judged_by_frauds_measures() -> None:
    scores = run_episodes([rare("a"), rare("bb")], [Ranker()], [0, 50], draws=2, seed=1, yardstick=FRAUD)
    found = summarise(scores, FRAUD)["ranker"]["50"]
    assert set(found) == {*FRAUD.metrics, "worst_decile", "institutions"}
    assert found["worst_decile"]["pr_auc"] <= found["pr_auc"]["mean"]
    assert scores[0].to_json().keys() == {"institution", "k", "draw", "method", *FRAUD.metrics}
    # The two differ in level alone, which no ranking sees.
    assert paired_difference(scores, "ranker", "ranker", 50, "pr_auc", k_b=0)["mean"] == pytest.approx(0, abs=1e-12)
    assert paired_difference(scores, "ranker", "ranker", 50, "brier", k_b=0)["mean"] > 0
    bare = [EvaluationSet(one.institution, one.x, one.raw, one.y) for one in (rare("a"),)]
    assert (
        "value_captured"
        not in summarise(run_episodes(bare, [Ranker()], [50], draws=1, seed=1, yardstick=FRAUD), FRAUD)["ranker"]["50"]
    )


def test_the_smallest_support_holds_the_positives_that_it_must() -> None:
    y = rare("a").y
    counts: Counter[int] = Counter()
    for number in range(400):
        drawn = few_shot_draw(y, k_min=100, k_max=200, seed_parts=(number,), where="a", min_positives=5)
        assert sorted([*drawn.support, *drawn.query]) == list(range(len(y)))
        assert y[drawn.query].sum() > 0
        counts[int(y[drawn.support[:100]].sum())] += 1
    assert min(counts) == 5
    # Of 2 expected, 5 or more is a tail: nearly all draws are at its edge, as shuffling until it fits would have them.
    tail = hypergeom.sf(4, len(y), 24, 100)
    share = hypergeom.pmf(5, len(y), 24, 100) / tail
    assert counts[5] / 400 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 400))


def test_one_positive_is_the_draw_that_it_has_always_been() -> None:
    y = rare("a").y
    one = few_shot_draw(y, k_min=50, k_max=60, seed_parts=(1,), where="a")
    same = few_shot_draw(y, k_min=50, k_max=60, seed_parts=(1,), where="a", min_positives=1)
    assert np.array_equal(one.support, same.support)


def test_a_support_that_cannot_hold_them_is_refused() -> None:
    with pytest.raises(DataError, match="Little: 5 positive records are too few"):
        few_shot_draw(rare("a", 5).y, k_min=100, k_max=100, seed_parts=(), where="Little", min_positives=5)
    with pytest.raises(ValueError, match="below k_min"):
        few_shot_draw(rare("a").y, k_min=5, k_max=10, seed_parts=(), where="a", min_positives=5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(2, 30))
def test_support_lies_before_the_query_by_more_than_the_embargo(seed: int, embargo: int, k: int) -> None:
    time = np.random.default_rng(seed).integers(0, 120, 300).astype(np.float64)
    drawn = few_shot_in_time(time, k_max=k, embargo=embargo, least_judged=20, seed_parts=(seed,), where="a")
    assert time[drawn.support].max() < time[drawn.query].min() - embargo
    assert len(drawn.support) == k
    assert len(drawn.query) >= 20
    # Everything from the moment on is judged, and what adapts is the latest that may.
    assert set(drawn.query) == set(np.flatnonzero(time >= time[drawn.query].min()))
    assert (np.diff(time[drawn.support]) <= 0).all()
    left_out = np.setdiff1d(np.flatnonzero(time < time[drawn.query].min() - embargo), drawn.support)
    assert not len(left_out) or time[left_out].max() <= time[drawn.support].min()


def test_no_moment_is_an_error_that_names_the_institution() -> None:
    with pytest.raises(DataError, match="Desk: no moment has 30 records more than 5 before it"):
        few_shot_in_time(np.arange(50.0), k_max=30, embargo=5, least_judged=20, seed_parts=(), where="Desk")


def test_episodes_may_be_drawn_in_time() -> None:
    rule = partial(in_time, embargo=5, least_judged=100)
    seen = run_episodes([rare("a")], [Ranker()], [0, 20], draws=3, seed=0, yardstick=FRAUD, draw=rule)
    assert {score.draw for score in seen} == {0, 1, 2}

"""Metrics against scikit-learn, known answers and their symmetries."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve
from sklearn.metrics import log_loss as reference_log_loss

from metarisk_common import metrics

# Scores on a coarse grid: ties within and across outcomes in nearly every example.
SAMPLES = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2, max_size=60).filter(
    lambda rows: len({outcome for outcome, _ in rows}) == 2
)


Vector = npt.NDArray[Any]
Rows = list[tuple[bool, int]]


def unpack(rows: Rows) -> tuple[Vector, Vector]:
    return np.array([int(row[0]) for row in rows]), np.array([row[1] / 12 for row in rows])


@settings(max_examples=30, deadline=None)
@given(SAMPLES)
def test_agrees_with_scikit_learn_with_ties(rows: Rows) -> None:
    y, p = unpack(rows)
    false_positive, true_positive, _ = roc_curve(y, p)
    assert metrics.auc(y, p) == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert metrics.ks(y, p) == pytest.approx(np.abs(true_positive - false_positive).max(), abs=1e-12)
    assert metrics.log_loss(y, p) == pytest.approx(reference_log_loss(y, p), rel=1e-12)
    assert metrics.brier(y, p) == pytest.approx(brier_score_loss(y, p), abs=1e-12)


def test_agrees_with_scikit_learn_on_many_rows() -> None:
    generator = np.random.default_rng(0)
    p = generator.random(5000)
    y = (generator.random(5000) < p).astype(np.int8)
    assert metrics.auc(y, p) == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert metrics.log_loss(y, p) == pytest.approx(reference_log_loss(y, p), rel=1e-12)


@given(SAMPLES)
def test_score_all_is_the_single_metrics(rows: Rows) -> None:
    y, p = unpack(rows)
    assert metrics.score_all(y, p) == {name: getattr(metrics, name)(y, p) for name in metrics.METRICS}


@given(SAMPLES)
def test_ranking_ignores_the_scale_and_mirrors_the_outcome(rows: Rows) -> None:
    y, p = unpack(rows)
    stretched = np.exp(3 * p) - 7
    assert metrics.auc(y, stretched) == metrics.auc(y, p)
    assert metrics.ks(y, stretched) == metrics.ks(y, p)
    assert metrics.auc(1 - y, p) == pytest.approx(1 - metrics.auc(y, p), abs=1e-12)
    assert metrics.ks(1 - y, p) == pytest.approx(metrics.ks(y, p), abs=1e-12)


def test_known_answers() -> None:
    y = np.array([False, False, True, True])
    assert metrics.auc(y, np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert metrics.auc(y, np.array([0.5, 0.5, 0.5, 0.5])) == 0.5
    assert metrics.ks(y, np.array([0.1, 0.2, 0.3, 0.4])) == 1.0
    assert metrics.log_loss(y, np.full(4, 0.5)) == pytest.approx(np.log(2))
    assert metrics.brier(y, np.array([0.0, 0.5, 0.5, 1.0])) == 0.125


def test_a_certain_mistake_costs_much_but_not_infinitely() -> None:
    assert 30 < metrics.log_loss(np.array([1, 1]), np.array([0.0, 0.0])) < 40


@pytest.mark.parametrize("outcome", [0, 1])
def test_one_outcome_has_no_ranking(outcome: int) -> None:
    y, p = np.full(3, outcome), np.array([0.1, 0.2, 0.3])
    for metric in (metrics.auc, metrics.ks, metrics.score_all):
        with pytest.raises(ValueError, match="only one outcome"):
            metric(y, p)
    assert np.isfinite(metrics.log_loss(y, p))


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([0, 1], [0.1, np.nan], "1 of 2 scores are not finite"),
        ([0, 1], [0.1], "one length"),
        ([], [], "one length"),
        ([0, 2], [0.1, 0.2], "only 0 and 1"),
        ([0, 1], [0.1, 1.5], "probabilities"),
    ],
)
def test_what_cannot_be_scored_is_refused(y: list[int], p: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.score_all(np.array(y), np.array(p))


def test_calibration_of_true_probabilities_is_nothing_on_average_however_few_the_records() -> None:
    generator = np.random.default_rng(3)
    figures = []
    for _ in range(3000):
        p = generator.uniform(0.05, 0.6, 40)
        figures.append(metrics.calibration(generator.random(40) < p, p))
    error = np.std(figures) / np.sqrt(len(figures))
    assert abs(np.mean(figures)) < 3 * error
    assert error < 0.001
    # Without the correction it would be the variance of a share of ten records: 0.02.


def test_calibration_finds_a_base_rate_that_is_wrong() -> None:
    generator = np.random.default_rng(4)
    p = generator.uniform(0.1, 0.5, 50_000)
    y = generator.random(50_000) < p
    assert np.sqrt(metrics.calibration(y, p + 0.1)) == pytest.approx(0.1, abs=0.01)
    assert metrics.calibration(y, p) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="two records"):
        metrics.calibration(np.array([1]), np.array([0.5]))

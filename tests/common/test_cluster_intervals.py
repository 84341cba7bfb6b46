"""Intervals where what is judged are several tasks of each institution."""

import numpy as np
import pytest
from scipy import stats

from metarisk_common.evaluation import EpisodeScore, paired_difference, summarise
from metarisk_common.intervals import estimate


def half(values: np.ndarray, clusters: list[str] | None = None) -> float:
    found = estimate(values, clusters)
    low, high = found["ci95"]
    assert low is not None
    assert high is not None
    assert low + high == pytest.approx(2 * found["mean"])
    return (high - low) / 2


def test_one_task_an_institution_is_the_plain_interval() -> None:
    values = np.random.default_rng(1).normal(size=9)
    plain = stats.t.ppf(0.975, 8) * values.std(ddof=1) / 3
    assert half(values) == pytest.approx(plain)
    assert half(values, [f"bank {number}" for number in range(9)]) == pytest.approx(plain)


def test_tasks_that_say_the_same_count_once() -> None:
    banks = np.random.default_rng(2).normal(size=8)
    thrice, whose = np.repeat(banks, 3), [f"bank {number}" for number in np.repeat(np.arange(8), 3)]
    assert half(thrice, whose) == pytest.approx(half(banks))
    assert half(thrice) < half(banks) / 1.6


def test_the_interval_holds_where_tasks_of_a_bank_are_alike() -> None:
    random, clustered, plain = np.random.default_rng(3), 0, 0
    whose = [f"bank {number}" for number in np.repeat(np.arange(24), 3)]
    for _ in range(1000):
        values = np.repeat(random.normal(size=24), 3) + 0.3 * random.normal(size=72)
        mean = abs(values.mean())
        clustered += mean < half(values, whose)
        plain += mean < half(values)
    assert 0.92 < clustered / 1000 < 0.98
    assert plain / 1000 < 0.85


def test_one_institution_leaves_the_ends_open() -> None:
    assert estimate(np.array([0.1, 0.2]), ["a", "a"])["ci95"] == [None, None]


def test_summaries_and_differences_take_the_institution_of_a_task() -> None:
    scores = [
        EpisodeScore(institution=f"bank {bank} / {part}", k=0, draw=0, method=method, values={"auc": share * value})
        for bank, value in enumerate([0.6, 0.7, 0.8])
        for part in ("a", "b")
        for method, share in (("one", 1.0), ("other", 0.5))
    ]
    found = paired_difference(scores, "one", "other", 0, cluster=lambda name: name.split(" / ")[0])
    assert found["ci95"] == pytest.approx(estimate(np.array([0.3, 0.35, 0.4]))["ci95"])
    assert len(found["by_institution"]) == 6
    low, high = summarise(scores, cluster=lambda name: name.split(" / ")[0])["one"]["0"]["auc"]["ci95"]
    assert (low, high) == pytest.approx(estimate(np.array([0.6, 0.7, 0.8]))["ci95"])

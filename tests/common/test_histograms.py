"""Score histograms: what a record can change, and what their sum says of a model."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarisk_common import metrics
from metarisk_common.histograms import NEGATIVES, POSITIVES, histograms, score_edges, summarise
from metarisk_common.params import Params, add, l2_norm, sub

BASE_RATE = 0.2
EDGES = score_edges(BASE_RATE, 20)


def sample(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = (random.random(rows) < BASE_RATE).astype(np.float32)
    return random.normal(-1.4 + 0.8 * y, 0.8).astype(np.float32), y


def test_the_edges_are_even_on_the_logit_about_the_base_rate() -> None:
    assert len(EDGES) == 19
    assert EDGES[9] == pytest.approx(math.log(0.25))
    assert np.diff(EDGES) == pytest.approx(0.3)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.sampled_from([0.0, -1e9, 1e30, math.nan, math.inf, -math.inf]))
def test_one_record_moves_all_cells_together_by_one(seed: int, score: float) -> None:
    logits, y = sample(50, seed)
    logits[7] = score
    others = np.arange(50) != 7
    moved = sub(histograms(logits, y, EDGES), histograms(logits[others], y[others], EDGES))
    assert l2_norm(moved) == 1
    assert set(moved) == {POSITIVES, NEGATIVES}


def test_without_records_there_are_empty_bins() -> None:
    found = histograms(np.zeros(0), np.zeros(0), EDGES)
    assert all(count.shape == (20,) and not count.any() for count in found.values())


def test_fine_histograms_give_the_figures_of_the_scores_themselves() -> None:
    logits, y = sample(40_000)
    found = summarise(histograms(logits, y, score_edges(BASE_RATE, 500)), noise_std=0.0, base_rate=BASE_RATE)
    assert found is not None
    assert found.auc == pytest.approx(metrics.auc(y, logits), abs=2e-4)
    assert found.ks == pytest.approx(metrics.ks(y, logits), abs=5e-3)
    assert found.base_rate == pytest.approx(y.mean())
    assert found.auc_noise_std == 0


def test_calibration_compares_what_was_scored_with_what_came() -> None:
    random = np.random.default_rng(3)
    logits = random.uniform(-4, 1, 200_000)
    y = random.random(len(logits)) < 1 / (1 + np.exp(-logits))
    found = summarise(histograms(logits, y, EDGES), noise_std=0.0, base_rate=BASE_RATE)
    assert found is not None
    inner = slice(2, 16)
    np.testing.assert_allclose(found.observed[inner], found.expected[inner], atol=0.02)
    assert math.isnan(found.observed[-1])


def test_the_spread_of_noised_figures_is_the_one_that_is_told() -> None:
    logits, y = sample(20_000)
    exact = histograms(logits, y, EDGES)
    random = np.random.default_rng(1)
    std = 15.0
    found = []
    for _ in range(400):
        noise: Params = {name: random.normal(0, std, count.shape) for name, count in exact.items()}
        summary = summarise(add(exact, noise), noise_std=std, base_rate=BASE_RATE)
        assert summary is not None
        found.append((summary.auc, summary.auc_noise_std))
    values, told = np.array(found).T
    assert values.std() == pytest.approx(told.mean(), rel=0.1)
    clean = summarise(exact, noise_std=0.0, base_rate=BASE_RATE)
    assert clean is not None
    assert values.mean() == pytest.approx(clean.auc, abs=4 * values.std() / 20)


@pytest.mark.parametrize("noise_std", [0.0, 5.0])
def test_what_is_lost_in_the_noise_is_not_judged(noise_std: float) -> None:
    empty: Params = {POSITIVES: np.zeros(20), NEGATIVES: np.full(20, 100.0)}
    assert summarise(empty, noise_std=noise_std, base_rate=BASE_RATE) is None

"""Noise and sampling: the right distribution, and not a torch seed in sight."""

import os

import numpy as np
import pytest
import torch
from scipy import stats

from client import rng as module
from client.rng import SecureRandom

# Fixed streams: these tests ask whether the transformation is right, and must not fail by chance.
STREAM = SecureRandom.seeded(20, "tests")


@pytest.mark.parametrize("std", [0.01, 1.0, 300.0])
def test_normals_have_this_standard_deviation_and_not_one_and_a_half_times_it(std: float) -> None:
    values = STREAM.normal(20_000, std)
    assert stats.kstest(values, stats.norm(0, std).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(values, stats.norm(0, wrong * std).cdf).pvalue < 1e-9


def test_normals_are_uncorrelated_symmetric_and_shaped() -> None:
    values = STREAM.normal((200, 500), 1.0)
    assert values.shape == (200, 500)
    assert values.dtype == np.float64
    flat = values.ravel()
    for lag in (1, 2, 16, 500):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 5 / len(flat) ** 0.5
    assert abs(flat.mean()) < 5 / len(flat) ** 0.5
    assert abs(stats.skew(flat)) < 0.05
    assert abs(stats.kurtosis(flat)) < 0.1


def test_no_value_comes_twice() -> None:
    values = np.concatenate([STREAM.normal(50_000, 1.0), SecureRandom.from_system().normal(50_000, 1.0)])
    assert len(np.unique(values)) == len(values)
    assert not np.array_equal(SecureRandom.from_system().normal(8, 1.0), SecureRandom.from_system().normal(8, 1.0))


def test_no_noise_is_exactly_none() -> None:
    assert not STREAM.normal((3, 4), 0.0).any()


@pytest.mark.parametrize("keystream", [b"\x00", b"\xff"])
def test_the_ends_of_the_keystream_are_finite(keystream: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SecureRandom.seeded(0)
    monkeypatch.setattr(stream, "_keystream", lambda count: keystream * count)
    uniform = stream._uniform(1)
    assert 0 < uniform[0] < 1
    assert 8 < abs(stream.normal(1, 1.0)[0]) < 9


def test_batch_sizes_are_binomial() -> None:
    n, rate = 60, 0.25
    sizes = np.array([STREAM.bernoulli(n, rate).sum() for _ in range(5000)])
    edges = np.arange(9, 22)
    observed = np.histogram(sizes, [-np.inf, *edges, np.inf])[0]
    cdf = stats.binom(n, rate).cdf(edges - 1)
    expected = np.diff([0, *cdf, 1]) * len(sizes)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # A shuffled batch of fixed size, sold as Poisson, has no variance at all.
    assert sizes.var() == pytest.approx(n * rate * (1 - rate), rel=0.1)


def test_two_records_are_drawn_independently() -> None:
    draws = np.array([STREAM.bernoulli(20, 0.3) for _ in range(8000)], dtype=np.float64)
    covariance = np.cov(draws, rowvar=False)
    pairs = covariance[~np.eye(20, dtype=bool)]
    assert np.abs(pairs).max() < 5 * 0.3 * 0.7 / 8000**0.5
    # Shuffling would give every pair -q (1 - q) / (n - 1) = -0.011.
    assert pairs.mean() == pytest.approx(0, abs=5e-4)


def test_rates_at_the_ends_are_exact() -> None:
    assert STREAM.bernoulli(1000, 1.0).all()
    assert not STREAM.bernoulli(1000, 0.0).any()
    assert STREAM.bernoulli(0, 0.5).shape == (0,)
    with pytest.raises(ValueError, match="rate"):
        STREAM.bernoulli(5, 1.5)


def test_a_torch_or_numpy_seed_changes_nothing() -> None:
    def after_seeding() -> bytes:
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002 - the very thing that must have no effect
        return SecureRandom.from_system().normal(4, 1.0).tobytes()

    assert after_seeding() != after_seeding()


def test_seeded_streams_repeat_and_labels_keep_them_apart() -> None:
    labels: list[tuple[str | int, ...]] = [(), ("a",), ("a", 1), ("a1",), ("a", "1"), (1, "a")]
    streams = [SecureRandom.seeded(3, *label).normal(8, 1.0).tobytes() for label in labels]
    again = [SecureRandom.seeded(3, *label).normal(8, 1.0).tobytes() for label in labels]
    assert streams == again
    assert len(set(streams)) == len(labels)
    assert SecureRandom.seeded(4).normal(8, 1.0).tobytes() not in streams


def test_only_the_systems_randomness_is_private() -> None:
    assert SecureRandom.from_system().is_private
    assert not SecureRandom.seeded(1).is_private


def test_drawing_in_pieces_gives_the_same_stream_and_nonces_change_before_the_counter_wraps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = SecureRandom.seeded(5).normal(64, 1.0)
    pieces = SecureRandom.seeded(5)
    assert np.array_equal(np.concatenate([pieces.normal(size, 1.0) for size in (1, 20, 43)]), whole)
    monkeypatch.setattr(module, "_BYTES_PER_NONCE", 64)
    short = SecureRandom.seeded(5).normal(64, 1.0)
    assert np.array_equal(short[:8], whole[:8])
    assert len(np.unique(short)) == 64


def test_a_forked_process_does_not_repeat_its_parents_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    secure, seeded = SecureRandom.from_system(), SecureRandom.seeded(1)
    key = secure._key
    monkeypatch.setattr(os, "getpid", lambda: -1)
    secure.normal(1, 1.0)
    assert secure._key != key
    assert np.array_equal(seeded.normal(3, 1.0), SecureRandom.seeded(1).normal(3, 1.0))

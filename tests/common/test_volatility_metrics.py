"""From a forecast of a logarithm to one of the variance, and against each asset's own past mean."""

import numpy as np
import pytest

from metarisk_common import volatility_metrics as volatility
from metarisk_common.yardsticks import VOLATILITY

RANDOM = np.random.default_rng(7)
F = RANDOM.normal(-8.5, 1.0, 20_000)
Y = F + 0.3 + RANDOM.normal(0.0, 0.9, 20_000)


def test_half_the_variance_of_residuals_whatever_their_mean() -> None:
    y = np.array([1.0, -1.0, 1.0, -1.0])
    assert volatility.half_variance(y, np.zeros(4)) == pytest.approx(0.5)
    assert volatility.half_variance(y + 3.0, np.zeros(4)) == pytest.approx(0.5)
    assert volatility.half_variance(y, y) == 0.0
    with pytest.raises(ValueError, match="one length"):
        volatility.half_variance(y, np.zeros(3))


def test_of_normal_residuals_it_is_what_the_mean_variance_lies_above() -> None:
    unbiased = Y - 0.3
    above = np.log(np.exp(unbiased - F).mean())
    assert volatility.half_variance(unbiased, F) == pytest.approx(above, abs=0.03)
    # And of all constants it leaves the least QLIKE.
    found = {shift: volatility.qlike(unbiased, F + shift * above) for shift in (0.0, 0.5, 1.0, 1.5)}
    assert min(found, key=lambda shift: found[shift]) == 1.0


def test_a_retransformation_moves_qlike_alone() -> None:
    reference = {"reference": np.full(len(Y), -8.5), "scale": np.full(len(Y), 2.0)}
    plain = VOLATILITY.score(Y, F, reference)
    none = VOLATILITY.score(Y, np.column_stack([F, np.zeros(len(F))]), reference)
    assert none == plain
    below = np.full(len(F), 0.4)
    moved = VOLATILITY.score(Y, np.column_stack([F, below]), reference)
    assert {name: moved[name] for name in ("r2", "mse", "bias")} == {
        name: plain[name] for name in ("r2", "mse", "bias")
    }
    assert moved["qlike"] == pytest.approx(volatility.qlike(2 * Y, 2 * (F + 0.4)))
    assert moved["qlike"] < plain["qlike"]
    assert moved["bias"] == pytest.approx(-0.3, abs=0.03)


def test_level_alone_earns_nothing_against_the_own_past_mean() -> None:
    """A bond far below what was learned from: its mean has an R2 of nearly 1, and of 0 against itself."""
    came = RANDOM.normal(-11.0, 0.5, 500)
    extra = {"reference": np.full(500, -8.0), "own_reference": np.full(500, -11.0)}
    level = VOLATILITY.score(came, np.full(500, -11.0), extra)
    assert level["r2"] > 0.95
    assert level["r2_own"] == 0.0
    half = VOLATILITY.score(came, (came - 11.0) / 2, extra)
    assert half["r2_own"] == pytest.approx(0.75)
    assert "r2_own" not in VOLATILITY.score(came, came, {"reference": extra["reference"]})
    # Reports go by the order of `metrics`, and the reference that is harder to please stands beside the headline.
    assert VOLATILITY.metrics[:2] == ("r2", "r2_own")
    assert "r2_own" not in VOLATILITY.lower_is_better


def test_a_forecast_far_too_low_is_charged_what_a_number_holds() -> None:
    charged = volatility.qlike(np.zeros(2), np.array([0.0, -800.0]))
    assert np.isfinite(charged)
    assert charged > 1e300

"""Fraud's measures at the rates that they are named after, and amounts that make sense."""

import numpy as np
import pytest

from metarisk_common import fraud_metrics as fraud
from metarisk_common.yardsticks import FRAUD


def test_every_measure_is_taken_at_the_rate_that_its_title_says() -> None:
    # 200 sound payments below 100 frauds' scores: a fraud lies under every second of the highest sound ones.
    sound = np.arange(200.0) / 1000
    p = np.concatenate([sound, sound[::-1][:100] - 0.0005])
    y = np.concatenate([np.zeros(200), np.ones(100)])
    amount, day = np.arange(1.0, 301.0), np.zeros(300)
    found = FRAUD.score(y, p, {"amount": amount, "day": day})
    # At 1% two sound payments are alerted with the one fraud between them and the next; at 5% ten, with ten.
    assert found["recall_1"] == pytest.approx(0.02)
    assert found["recall_5"] == pytest.approx(0.10)
    assert found["precision_1"] == pytest.approx(1 / 3)
    assert found["value_captured"] == pytest.approx(amount[200:202].sum() / amount[200:].sum())
    assert found["alerts_a_day"] == 4


def test_a_rate_of_whole_negatives_is_not_lost_to_binary_fractions() -> None:
    # 29% of 100 is 29, and 28.999999999999996 in floating point.
    y = np.concatenate([np.zeros(100), [1.0]])
    p = np.concatenate([np.arange(100.0), [70.5]])
    assert 0.29 * 100 < 29
    assert fraud.recall_at(y, p, 0.29) == 1.0
    assert fraud.recall_at(y, p, 0.28) == 0.0


def test_amounts_below_nothing_and_no_amount_at_all_are_refused() -> None:
    y, p = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.8, 0.2, 0.1])
    for amounts in ([5.0, -1.0, 0.0, 0.0], [0.0, 0.0, 7.0, 7.0]):
        with pytest.raises(ValueError, match="0 or more, with one above 0"):
            fraud.value_captured(y, p, np.array(amounts), 0.01)

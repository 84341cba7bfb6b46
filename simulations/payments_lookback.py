"""What a bank knows of a customer's recent payments at the moment of one more: strictly earlier ones only."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

DAY_MINUTES: Final = 1440.0


@dataclass(frozen=True)
class LookBack:
    """`(rows,)` each: payments and their sum over the last day and week, and the hours since the last one or NaN."""

    count_24h: npt.NDArray[np.int64]
    sum_24h: npt.NDArray[np.float64]
    count_7d: npt.NDArray[np.int64]
    sum_7d: npt.NDArray[np.float64]
    hours_since: npt.NDArray[np.float64]


def look_back(
    customer: npt.NDArray[np.int64], minute: npt.NDArray[np.int64], amount: npt.NDArray[np.float64]
) -> LookBack:
    """Count and sum each customer's payments before each of them; payments of the same minute do not see each other.

    Args:
        customer: (rows,) whose each payment is, from 0.
        minute: (rows,) when, in minutes from any day 0, not negative.
        amount: (rows,) how much.

    Raises:
        ValueError: the payments are not in order of customer and minute.

    """
    # A customer's minutes lie further apart from the next customer's than any window reaches.
    reach = int(minute.max(initial=0)) + 8 * int(DAY_MINUTES)
    key = customer * reach + minute
    if (np.diff(key) < 0).any():
        raise ValueError("payments must be in order of customer and minute")
    before = np.searchsorted(key, key, side="left")
    running = np.concatenate([[0.0], np.cumsum(amount)])

    def window(minutes: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        start = np.searchsorted(key, np.maximum(key - minutes, customer * reach), side="left")
        return (before - start).astype(np.int64), np.round(running[before] - running[start], 2)

    day, week = window(int(DAY_MINUTES)), window(7 * int(DAY_MINUTES))
    last = np.maximum(before - 1, 0)
    known = (before > 0) & (customer[last] == customer)
    hours = np.where(known, (minute - minute[last]) / 60.0, np.nan)
    return LookBack(*day, *week, hours)

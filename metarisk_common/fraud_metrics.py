"""How good scores are where positives are rare and cost money: precision and recall, and what an alert desk would see.

All functions take `y: (rows,)` of 0 and 1 and `p: (rows,)` scores, and are pure NumPy. Records of one score are
alerted together or not at all: a threshold cannot tell them apart, and so no figure depends on the order of records.
"""

import numpy as np
import numpy.typing as npt

from .metrics import Vector, counts_by_score

_ALERTS = 0.01


def average_precision(y: Vector, p: Vector) -> float:
    """Area under the precision-recall curve: the sum over thresholds of precision times the recall that each adds.

    The step-wise sum, without interpolation, that Davis and Goadrich (2006) ask for; guessing gets the share of
    positives. Ties are one threshold.

    Raises:
        ValueError: as for `metarisk_common.metrics.auc`.

    """
    false_alerts, caught = _alerts(y, p)
    return float(np.dot(np.diff(caught), caught[1:] / (caught[1:] + false_alerts[1:])) / caught[-1])


def recall_at(y: Vector, p: Vector, false_positive_rate: float) -> float:
    """Largest share of positives caught by a threshold that alerts at most this share of the negatives.

    Raises:
        ValueError: as for `metarisk_common.metrics.auc`.

    """
    false_alerts, caught = _alerts(y, p)
    return float(caught[_last_allowed(false_alerts, false_positive_rate)] / caught[-1])


def precision_in_alerts(y: Vector, p: Vector, alert_rate: float = _ALERTS) -> float:
    """Share of positives among the given share of records with the highest scores, at least one record.

    Where the last place falls among records of one score, all choices among those count alike.

    Raises:
        ValueError: as for `metarisk_common.metrics.auc`.

    """
    false_alerts, caught = _alerts(y, p)
    alerts = false_alerts + caught
    room = max(1.0, alert_rate * float(alerts[-1]))
    return float(np.interp(room, alerts, caught) / room)


def alerted(y: Vector, p: Vector, false_positive_rate: float) -> npt.NDArray[np.bool_]:
    """Return `(rows,)`: the records that the threshold of `recall_at` alerts.

    Raises:
        ValueError: as for `metarisk_common.metrics.auc`.

    """
    false_alerts, _caught = _alerts(y, p)
    at = _last_allowed(false_alerts, false_positive_rate)
    score = np.asarray(p, dtype=np.float64)
    if not at:
        return np.zeros(len(score), dtype=np.bool_)
    return np.asarray(score >= np.unique(score)[::-1][at - 1])


def value_captured(y: Vector, p: Vector, amount: Vector, false_positive_rate: float) -> float:
    """Share of the positives' amount that lies in alerts.

    Args:
        y: outcomes.
        p: scores.
        amount: (rows,) what is at stake, 0 or more.
        false_positive_rate: which threshold; see `recall_at`.

    Raises:
        ValueError: as for `metarisk_common.metrics.auc`, or there is nothing at stake.

    """
    stake = np.where(np.asarray(y) == 1, np.asarray(amount, dtype=np.float64), 0.0)
    if not stake.sum() > 0 or stake.min() < 0:
        raise ValueError("amounts of positives must be 0 or more, with one above 0")
    return float(stake[alerted(y, p, false_positive_rate)].sum() / stake.sum())


def alerts_a_day(y: Vector, p: Vector, day: Vector, false_positive_rate: float) -> float:
    """Alerts among the records judged, by the days from the first of them to the last.

    Args:
        y: outcomes.
        p: scores.
        day: (rows,) numbers of days.
        false_positive_rate: which threshold; see `recall_at`.

    Raises:
        ValueError: as for `metarisk_common.metrics.auc`.

    """
    days = np.floor(np.asarray(day, dtype=np.float64))
    return float(np.count_nonzero(alerted(y, p, false_positive_rate)) / (days.max() - days.min() + 1))


def _alerts(y: Vector, p: Vector) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count negatives and positives at or above each distinct score, the highest first; both open with 0."""
    negatives, positives = counts_by_score(y, p)
    return (negatives[-1] - negatives)[::-1], (positives[-1] - positives)[::-1]


def _last_allowed(false_alerts: npt.NDArray[np.int64], false_positive_rate: float) -> int:
    # Counted in whole negatives; the sliver keeps 1% of 300 at 3 in spite of binary fractions.
    allowed = np.floor(false_positive_rate * float(false_alerts[-1]) + 1e-9)
    return int(np.searchsorted(false_alerts, allowed, side="right")) - 1

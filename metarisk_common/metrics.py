"""How good scores are: ranking (AUC, KS) and probabilities (log-loss, Brier, calibration), for binary outcomes.

All functions take `y: (rows,)` of 0 and 1 (or booleans) and `p: (rows,)` and are pure NumPy. AUC and KS need only an
order, so any finite score will do; the others need probabilities. Where a figure is not defined, because
only one outcome occurs, they raise: half of nothing is no AUC.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[Any]
"""One number (or boolean) a record."""

METRICS = ("auc", "ks", "log_loss", "brier", "calibration")
"""The keys of `score_all`, in the order of reports."""

LOWER_IS_BETTER = frozenset({"log_loss", "brier", "calibration"})
"""Metrics of which the smaller value is the better one."""

_BINS = 10
_SMALLEST = float(np.finfo(np.float64).eps)


def auc(y: Vector, p: Vector) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    By ranks (Mann and Whitney 1947), tied scores sharing their middle rank.

    Raises:
        ValueError: the shapes differ, a score is not finite, or only one outcome occurs.

    """
    return _auc(*_cumulative(*_checked(y, p)))


def ks(y: Vector, p: Vector) -> float:
    """Kolmogorov-Smirnov distance: the largest gap between the two outcomes' distributions of scores.

    Raises:
        ValueError: as for `auc`.

    """
    return _ks(*_cumulative(*_checked(y, p)))


def log_loss(y: Vector, p: Vector) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept one float64 epsilon away from 0 and 1.

    Raises:
        ValueError: the shapes differ, or a score is no probability.

    """
    return _log_loss(*_probabilities(*_checked(y, p)))


def brier(y: Vector, p: Vector) -> float:
    """Mean squared difference between probability and outcome (Brier 1950).

    Raises:
        ValueError: as for `log_loss`.

    """
    return _brier(*_probabilities(*_checked(y, p)))


def calibration(y: Vector, p: Vector) -> float:
    """Squared calibration error, unbiased: how far shares of positives lie from what was predicted for them.

    Records are put in order of `p` into ten bins of equal count (fewer where there would be under ten records in one);
    the squared difference of mean prediction and share of positives is averaged over records. Of each square the
    sampling variance of the share is taken off (Kumar, Liang and Ma 2019, "Verified Uncertainty Calibration", the
    debiased estimator), so the mean over many draws of few records is that of many records: a figure may lie below 0,
    and the root of a mean is the calibration error in units of probability.

    Raises:
        ValueError: as for `log_loss`, or there is one record only.

    """
    return _calibration(*_probabilities(*_checked(y, p)))


def score_all(y: Vector, p: Vector) -> dict[str, float]:
    """All of `METRICS` at once, sorting only once.

    Raises:
        ValueError: as for the single metrics.

    """
    positive, score = _probabilities(*_checked(y, p))
    negatives, positives = _cumulative(positive, score)
    return {
        "auc": _auc(negatives, positives),
        "ks": _ks(negatives, positives),
        "log_loss": _log_loss(positive, score),
        "brier": _brier(positive, score),
        "calibration": _calibration(positive, score),
    }


def counts_by_score(y: Vector, p: Vector) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count negatives and positives at or below each distinct score, ascending; both open with 0.

    Raises:
        ValueError: as for `auc`.

    """
    return _cumulative(*_checked(y, p))


def _checked(y: Vector, p: Vector) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    outcome, score = np.asarray(y), np.asarray(p, dtype=np.float64)
    if outcome.ndim != 1 or outcome.shape != score.shape or not outcome.size:
        raise ValueError(f"y and p must be vectors of one length above 0, not {outcome.shape} and {score.shape}")
    positive = outcome == 1
    if not np.all(positive | (outcome == 0)):
        raise ValueError("y may hold only 0 and 1")
    if not np.isfinite(score).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(score))} of {score.size} scores are not finite")
    return positive, score


def _probabilities(
    positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    if score.min() < 0 or score.max() > 1:
        raise ValueError("log-loss, Brier and calibration need probabilities between 0 and 1")
    return positive, score


def _cumulative(
    positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count negatives and positives at or below each distinct score, ascending; both open with 0."""
    order = np.argsort(score)
    ordered = score[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), score.size - 1)
    positives = np.append(0, np.cumsum(positive[order], dtype=np.int64)[ends])
    negatives = np.append(0, ends + 1) - positives
    if not positives[-1] or not negatives[-1]:
        raise ValueError("AUC and KS are not defined where only one outcome occurs")
    return negatives, positives


def _auc(negatives: npt.NDArray[np.int64], positives: npt.NDArray[np.int64]) -> float:
    # Trapezes under the curve of positives against negatives: ties count half, exactly, in integers.
    twice = np.dot(np.diff(positives), negatives[1:] + negatives[:-1])
    return float(twice) / (2.0 * float(negatives[-1]) * float(positives[-1]))


def _ks(negatives: npt.NDArray[np.int64], positives: npt.NDArray[np.int64]) -> float:
    return float(np.abs(positives / positives[-1] - negatives / negatives[-1]).max())


def _log_loss(positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]) -> float:
    right = np.where(positive, score, 1.0 - score)
    return float(-np.log(np.clip(right, _SMALLEST, 1.0)).mean())


def _brier(positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]) -> float:
    return float(np.square(score - positive).mean())


def _calibration(positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]) -> float:
    if score.size < 2:  # noqa: PLR2004 - the variance of one outcome is not known
        raise ValueError("calibration needs two records or more")
    # Stable: records of one score keep their order, so that one table gives one figure.
    order = np.argsort(score, kind="stable")
    edges = np.linspace(0, score.size, min(_BINS, max(1, score.size // _BINS)) + 1).astype(np.int64)
    count = np.diff(edges)
    share = np.add.reduceat(positive[order].astype(np.float64), edges[:-1]) / count
    expected = np.add.reduceat(score[order], edges[:-1]) / count
    squares = np.square(expected - share) - share * (1.0 - share) / (count - 1)
    return float(np.dot(count, squares) / score.size)

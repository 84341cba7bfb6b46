"""A mean over institutions, its 95% interval, the worst tenth of them, and where a gain can be shown no longer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit


class Estimate(TypedDict):
    """A mean over institutions with its 95% interval; the ends are None where one institution leaves them open."""

    mean: float
    ci95: list[float | None]


@dataclass(frozen=True)
class Crossover:
    """The number of labels from which on what an institution can do alone is level with what it is compared with.

    `labels`: where the lower end of the paired interval reaches 0, between two measured k by a straight line; None
    where it stays above. `at_most`: it lay at or below 0 at the smallest k already, so that `labels` is a ceiling.
    `last`: the largest k measured.
    """

    labels: float | None
    at_most: bool
    last: int

    def __str__(self) -> str:
        """Return it in words."""
        if self.labels is None:
            return f"beyond {self.last}"
        return f"at most {self.labels:.0f}" if self.at_most else f"about {self.labels:.0f}"


def crossover(gains: Mapping[int, Estimate]) -> Crossover:
    """Find the number of labels at which a gain can no longer be shown.

    Args:
        gains: by k above 0, what the shared start gains over the best that the same k labels give alone.
            An interval with an open end shows nothing.

    Raises:
        ValueError: there is no k above 0.

    """
    ks = sorted(k for k in gains if k > 0)
    if not ks:
        raise ValueError("a crossover needs gains at one k above 0 or more")
    before: tuple[int, float] | None = None
    for k in ks:
        end = gains[k]["ci95"][0]
        low = 0.0 if end is None else end
        if low <= 0:
            if before is None:
                return Crossover(float(k), at_most=True, last=ks[-1])
            at = before[0] + (k - before[0]) * before[1] / (before[1] - low)
            return Crossover(at, at_most=False, last=ks[-1])
        before = k, low
    return Crossover(None, at_most=False, last=ks[-1])


def estimate(values: npt.NDArray[np.float64], clusters: Sequence[str] | None = None) -> Estimate:
    """Mean of one value an institution with its 95% interval (Student's t), open where there is one institution.

    Several tasks of one institution are no independent sample. Where `clusters` names the institution of each value,
    the interval is the cluster-robust one of their mean: G/(G-1) sum over institutions of the squared sum of their
    deviations, over the square of the number of values, with G-1 degrees of freedom (Liang and Zeger 1986,
    "Longitudinal data analysis using generalized linear models"; the correction as in Cameron and Miller 2015, "A
    practitioner's guide to cluster-robust inference", equation 11 without its factor for regressors). With one value
    an institution it is the plain interval.

    Args:
        values: (tasks,) one value a task.
        clusters: (tasks,) whose each is; None: each value is of an institution of its own.

    """
    mean, deviations = float(values.mean()), values - values.mean()
    if clusters is not None:
        _, whose = np.unique(list(clusters), return_inverse=True)
        deviations = np.bincount(whose, weights=deviations)
    count = len(deviations)
    if count < 2:  # noqa: PLR2004 - one institution says nothing of how institutions differ
        return {"mean": mean, "ci95": [None, None]}
    variance = count / (count - 1) * float(deviations @ deviations) / len(values) ** 2
    half = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance)
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def worst_decile(values: npt.NDArray[np.float64]) -> float:
    """Mean of the lowest tenth of one value an institution, rounded up."""
    return float(np.sort(values)[: math.ceil(len(values) / 10)].mean())

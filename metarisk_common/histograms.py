"""Score histograms: what banks may release of how a model does, and what follows from their sum.

Each bank counts its records by score, those with the outcome and those without apart, and adds noise. The sum over
banks gives AUC, KS and calibration at once. All of this is post-processing: it costs nothing beyond the release.
"""

import math
from dataclasses import dataclass

import numpy as np

from .params import Params

POSITIVES, NEGATIVES = "positives", "negatives"
"""Names of the two histograms, each (bins,) float64."""

_HALF_RANGE = 3.0


@dataclass(frozen=True)
class ScoreSummary:
    """What two summed histograms say. `auc_noise_std`: standard deviation of `auc` that the noise alone accounts for.

    `observed` and `expected`: (bins,) shares of records with the outcome, as counted and as scored by the middle of
    the bin; a bin whose count is lost in the noise has NaN.
    """

    auc: float
    auc_noise_std: float
    ks: float
    base_rate: float
    observed: np.ndarray
    expected: np.ndarray


def score_edges(base_rate: float, bins: int) -> np.ndarray:
    """Give the public edges between `bins` bins of the logit, (bins - 1,), evenly within 3 of the public base rate's.

    Scores crowd around the base rate; edges on the scale of probabilities would leave most bins empty.
    """
    centre = math.log(base_rate / (1 - base_rate))
    return np.linspace(centre - _HALF_RANGE, centre + _HALF_RANGE, bins + 1)[1:-1]


def histograms(logits: np.ndarray, y: np.ndarray, edges: np.ndarray) -> Params:
    """Count records by score. logits, y: (rows,), y of 0 and 1. A score that is no number counts in the first bin.

    Every record adds one to one cell of one histogram, whatever else there is.
    """
    bin_of = np.searchsorted(edges, np.nan_to_num(logits, nan=-np.inf), side="right")
    positive = np.asarray(y) > 0.5  # noqa: PLR2004 - halfway between the two labels
    size = len(edges) + 1
    return {
        POSITIVES: np.bincount(bin_of[positive], minlength=size).astype(np.float64),
        NEGATIVES: np.bincount(bin_of[~positive], minlength=size).astype(np.float64),
    }


def summarise(total: Params, *, noise_std: float, base_rate: float) -> ScoreSummary | None:
    """Judge a model by summed histograms whose cells carry Gaussian noise of standard deviation `noise_std`.

    AUC counts ties within a bin as half (Mann and Whitney 1947); its noise is propagated to first order.

    Returns:
        None where the noise leaves no outcome to judge by: a total of positives or negatives within four standard
        deviations of none.

    """
    positives, negatives = total[POSITIVES], total[NEGATIVES]
    p, n = float(positives.sum()), float(negatives.sum())
    bins = len(positives)
    if min(p, n) <= 4 * noise_std * math.sqrt(bins):
        return None
    below = np.cumsum(negatives) - negatives / 2
    above = p - np.cumsum(positives) + positives / 2
    auc = float(positives @ below) / (p * n)
    slopes = np.concatenate([below / (p * n) - auc / p, above / (p * n) - auc / n])
    gap = np.cumsum(positives) / p - np.cumsum(negatives) / n
    count = positives + negatives
    clear = count > 4 * noise_std * math.sqrt(2)
    middle = _middles(base_rate, bins)
    return ScoreSummary(
        auc=auc,
        auc_noise_std=noise_std * float(np.linalg.norm(slopes)),
        ks=float(np.abs(gap).max()),
        base_rate=p / (p + n),
        observed=np.where(clear, positives / np.where(clear, count, 1.0), np.nan),
        expected=1 / (1 + np.exp(-middle)),
    )


def _middles(base_rate: float, bins: int) -> np.ndarray:
    centre = math.log(base_rate / (1 - base_rate))
    edges = np.linspace(centre - _HALF_RANGE, centre + _HALF_RANGE, bins + 1)
    return np.asarray((edges[1:] + edges[:-1]) / 2)

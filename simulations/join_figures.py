"""How much better one method is than another at one bank, and how far that can be trusted.

Draws of one bank overlap, so they are no sample: an interval over them must say what would have come of other records.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from scipy.stats import rankdata

from metarisk_common.evaluation import EvaluationSet, Method
from metarisk_common.metrics import auc, log_loss
from metarisk_common.tasks import few_shot_draw

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[Any]
_LEAST: Final = 1e-15


class Figure(TypedDict):
    """A mean over draws, its 95% interval, and what nineteen of twenty single draws lay between."""

    mean: float
    ci95: list[float | None]
    draws95: list[float]


def draw_interval(values: Vector, shares: Sequence[Vector], *, k: int, records: int) -> Figure:
    """Give the mean of a difference over overlapping draws with an interval for this bank.

    The variance has three parts. Other records would have been judged: over records, the variance of each one's mean
    share in the difference (for AUC these are the placements of DeLong, DeLong and Clarke-Pearson 1988). There are only
    so many draws: S^2 / draws. And all draws take their labels from the same n records: S^2 k / n, more than which the
    labels cannot make a mean over all draws vary (Hoeffding 1948, on U-statistics).

    Nadeau and Bengio (2003, "Inference for the Generalization Error", section 3) multiply S^2 by 1 / draws plus records
    judged over records learned from. That is made for learning from more than is judged: with 10 labels and 800 judged
    it is 80, and nothing could ever be shown. Their rule has the overlap of the judged records in mind, which is the
    first part here; the labels hardly overlap.

    Args:
        values: (draws,) differences; at least 2.
        shares: for each class (of a mean over all records: once) each record's mean share in the difference.
        k: labels in a draw.
        records: the bank's records.

    """
    count = len(values)
    variance = float(values.var(ddof=1)) * (1 / count + k / records)
    variance += sum(float(share.var(ddof=1)) / len(share) for share in shares)
    half = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance)
    mean = float(values.mean())
    low, high = np.quantile(values, (0.025, 0.975))
    return {"mean": mean, "ci95": [mean - half, mean + half], "draws95": [float(low), float(high)]}


@dataclass
class Track:
    """One method at one k: a figure a draw, and each record's summed share in them, for AUC and log-loss."""

    auc: list[float]
    log_loss: list[float]
    places: Vector
    losses: Vector


@dataclass(frozen=True)
class Tracks:
    """All methods at all k, and how often each record was judged."""

    by_method: Mapping[tuple[str, int], Track]
    judged: Vector


def play(
    own: EvaluationSet,
    methods: Sequence[Method],
    ks: Sequence[int],
    *,
    draws: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> Tracks:
    """Judge methods at all k on the same draws, as `run_episodes` does, and keep what each record had a share in.

    Raises:
        DataError: there are too few records, or too few of one class.

    """
    rows, positive = len(own.y), [k for k in ks if k > 0]
    tracks = {
        (method.name, k): Track([], [], np.zeros(rows), np.zeros(rows))
        for method in methods
        for k in ks
        if k > 0 or not method.needs_support
    }
    judged = np.zeros(rows)
    for draw in range(draws):
        chosen = few_shot_draw(
            own.y, k_min=positive[0], k_max=positive[-1], seed_parts=(seed, own.institution, draw),
            where=f"institution '{own.institution}'",
        )  # fmt: skip
        query = chosen.query
        judged[query] += 1
        for method in methods:
            for k in ks:
                track = tracks.get((method.name, k))
                if track is not None:
                    labelled = chosen.support[:k]
                    fitted = method.fit(own.x[labelled], own.raw[labelled], own.y[labelled])
                    _add(track, own.y[query], fitted(own.x[query], own.raw[query]), query)
        if on_progress is not None:
            on_progress(draw + 1, draws)
    return Tracks(tracks, judged)


def _add(track: Track, y: Vector, p: Vector, query: npt.NDArray[np.int64]) -> None:
    positive = y == 1
    track.auc.append(auc(y, p))
    track.log_loss.append(log_loss(y, p))
    track.places[query] += placements(positive, p)
    track.losses[query] -= np.log(np.clip(np.where(positive, p, 1.0 - p), _LEAST, 1.0))


def placements(positive: npt.NDArray[np.bool_], p: Vector) -> Vector:
    """Give of each record the share of the other class that it is on the right side of, ties half: their means are AUC.

    Args:
        positive: (rows,) outcomes.
        p: (rows,) scores.

    """
    together = rankdata(p)
    found = np.empty(len(p))
    for own, side in ((positive, 1.0), (~positive, -1.0)):
        above = (together[own] - rankdata(p[own])) / np.count_nonzero(~own)
        found[own] = above if side > 0 else 1.0 - above
    return found


def difference(tracks: Tracks, a: tuple[str, int], b: tuple[str, int], y: Vector) -> tuple[Figure, Figure]:
    """Give a less b in AUC, and b less a in log-loss, so that more is better in both."""
    one, other = tracks.by_method[a], tracks.by_method[b]
    seen = tracks.judged > 0
    places = (one.places - other.places)[seen] / tracks.judged[seen]
    losses = (other.losses - one.losses)[seen] / tracks.judged[seen]
    positive, records = y[seen] == 1, len(y)
    k = max(a[1], b[1])
    in_auc = np.array(one.auc) - np.array(other.auc)
    in_loss = np.array(other.log_loss) - np.array(one.log_loss)
    return (
        draw_interval(in_auc, [places[positive], places[~positive]], k=k, records=records),
        draw_interval(in_loss, [losses], k=k, records=records),
    )

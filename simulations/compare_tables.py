"""The table of a comparison: every figure over lenders, paired differences, and where a lender does as well alone.

Draws and seeds are averaged within a lender first, so that intervals (95%, Student's t) speak of lenders. In a
cross-validation lenders of one fold share what was learned, which intervals leave out of account.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from metarisk_common.intervals import Estimate, crossover, estimate, worst_decile
from metarisk_common.metrics import LOWER_IS_BETTER, METRICS

from .compare import BASELINES, Outcome
from .comparison import LOCAL, POOLED, Loaded, titles

TOLERANCE = 0.005
"""A draw that loses more AUC than this against k = 0 is harmed."""

Kind = Literal["federated", "local", "pooled"]
Who = tuple[str, float | None]
"""A method and its epsilon; None for a baseline, which has none."""


class Row(TypedDict):
    """One method at one epsilon after k labels. `epsilon`: None where nothing is private, "inf" without noise."""

    method: str
    title: str
    kind: Kind
    epsilon: float | str | None
    k: int
    lenders: int
    auc: Estimate
    worst_decile: float
    ks: float
    log_loss: float
    brier: float
    calibration_error: float
    share_harmed: float | None
    lenders_harmed: float | None


class Pair(TypedDict):
    """A paired difference in a metric, lender by lender: `method` at `epsilon` and `k` less the other at its own."""

    kind: Literal["reference", "labels", "privacy"]
    metric: str
    method: str
    epsilon: float | str | None
    k: int
    other: str
    other_epsilon: float | str | None
    other_k: int
    mean: float
    ci95: list[float | None]
    wins: int
    losses: int
    by_lender: NotRequired[dict[str, float]]


class Level(TypedDict):
    """Where a lender needs a method no longer; `labels`: None where that is beyond the most that were tried."""

    method: str
    epsilon: float | str | None
    labels: float | None
    words: str
    best_local: dict[str, str]


class Gain(TypedDict):
    """What each lender gains in AUC with k labels over the strongest local method."""

    method: str
    epsilon: float | str | None
    k: int
    baseline: str
    by_lender: dict[str, float]


class Table(TypedDict):
    """All that a comparison found, as plain values."""

    name: str
    title: str
    not_private: bool
    reference: str
    reference_title: str
    split: str
    k: list[int]
    seeds: list[int]
    draws: int
    delta: float
    lenders: int
    left_out: list[str]
    rows: list[Row]
    pairs: list[Pair]
    crossover: list[Level]
    gains: list[Gain]


@dataclass(frozen=True)
class _Means:
    """Per lender means by (who, k, metric), shares of draws harmed by (who, k), and everyone in the file's order."""

    values: Mapping[tuple[Who, int, str], Mapping[str, float]]
    harmed: Mapping[tuple[Who, int], float]
    everyone: tuple[Who, ...]

    def difference(self, a: Who, b: Who, k: int, k_b: int, metric: str) -> dict[str, float] | None:
        """Lender by lender; None where one of the two has no figure there."""
        one, other = self.values.get((a, k, metric)), self.values.get((b, k_b, metric))
        if one is None or other is None:
            return None
        return {name: one[name] - other[name] for name in sorted(one)}


def tabulate(loaded: Loaded, outcome: Outcome) -> Table:
    """Return the table of a comparison; the same scores give the same table."""
    comparison, means = loaded.comparison, _means(outcome)
    named = titles(loaded)
    lenders = {name for by_lender in means.values.values() for name in by_lender}
    return {
        "name": comparison.name,
        "title": comparison.title or comparison.name,
        "not_private": True,
        "reference": comparison.reference,
        "reference_title": named[comparison.reference],
        "split": _split_words(loaded),
        "k": sorted(comparison.evaluation.k),
        "seeds": list(comparison.seeds),
        "draws": comparison.evaluation.draws,
        "delta": loaded.base.privacy.delta,
        "lenders": len(lenders),
        "left_out": list(outcome.left_out),
        "rows": _rows(means, named),
        "pairs": [*_reference_pairs(means, loaded), *_label_pairs(means), *_privacy_pairs(means)],
        "crossover": _levels(means),
        "gains": _gains(means, comparison.evaluation.gain_k),
    }


def kind_of(method: str) -> Kind:
    """Return who holds the data that a method learns from."""
    return "local" if method in LOCAL else "pooled" if method in POOLED else "federated"


def best_local(table: Table, k: int) -> str | None:
    """Return the local method with the highest mean AUC after k labels."""
    found = {row["method"]: row["auc"]["mean"] for row in table["rows"] if row["kind"] == "local" and row["k"] == k}
    return max(found, key=lambda name: found[name], default=None)


def _means(outcome: Outcome) -> _Means:
    collected: dict[tuple[Who, int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    losses: dict[tuple[Who, int], list[bool]] = defaultdict(list)
    everyone: dict[Who, None] = {}
    for key, scores in outcome.scores.items():
        start = {(score.institution, score.draw, score.method): score["auc"] for score in scores if score.k == 0}
        for score in scores:
            who = (score.method, None if key.method == BASELINES else key.epsilon)
            everyone[who] = None
            for metric in METRICS:
                collected[who, score.k, metric][score.institution].append(score[metric])
            before = start.get((score.institution, score.draw, score.method))
            if before is not None and score.k > 0:
                losses[who, score.k].append(before - score["auc"] > TOLERANCE)
    values = {
        place: {name: float(np.mean(own)) for name, own in sorted(by_lender.items())}
        for place, by_lender in collected.items()
    }
    return _Means(values, {place: float(np.mean(lost)) for place, lost in losses.items()}, tuple(everyone))


def _rows(means: _Means, named: Mapping[str, str]) -> list[Row]:
    rows: list[Row] = []
    for who in means.everyone:
        for k in sorted({k for found, k, _ in means.values if found == who}):
            at = {metric: np.array(list(means.values[who, k, metric].values())) for metric in METRICS}
            federated = kind_of(who[0]) == "federated" and k > 0
            start = means.difference(who, who, k, 0, "auc") if federated else None
            rows.append(
                {
                    "method": who[0],
                    "title": named[who[0]],
                    "kind": kind_of(who[0]),
                    "epsilon": told(who[1]),
                    "k": k,
                    "lenders": len(at["auc"]),
                    "auc": estimate(at["auc"]),
                    "worst_decile": worst_decile(at["auc"]),
                    "ks": float(at["ks"].mean()),
                    "log_loss": float(at["log_loss"].mean()),
                    "brier": float(at["brier"].mean()),
                    "calibration_error": math.sqrt(max(0.0, float(at["calibration"].mean()))),
                    "share_harmed": means.harmed.get((who, k)) if federated else None,
                    "lenders_harmed": None if start is None else float(np.mean([v < 0 for v in start.values()])),
                }
            )
    return rows


def told(epsilon: float | None) -> float | str | None:
    """Return an epsilon as JSON can hold it."""
    return "inf" if epsilon is not None and math.isinf(epsilon) else epsilon


def _pair(kind: Any, metric: str, a: Who, b: Who, k: int, k_b: int, found: Mapping[str, float]) -> Pair:  # noqa: ANN401
    values = np.array(list(found.values()))
    better = -values if metric in LOWER_IS_BETTER else values
    spread = estimate(values)
    return {
        "kind": kind, "metric": metric, "method": a[0], "epsilon": told(a[1]), "k": k,
        "other": b[0], "other_epsilon": told(b[1]), "other_k": k_b, "mean": spread["mean"], "ci95": spread["ci95"],
        "wins": int(np.count_nonzero(better > 0)), "losses": int(np.count_nonzero(better < 0)),
    }  # fmt: skip


def _reference_pairs(means: _Means, loaded: Loaded) -> list[Pair]:
    """Every method less the reference at the same epsilon and k; what has no epsilon of its own, at each of them."""
    name = loaded.comparison.reference
    references = [who for who in means.everyone if who[0] == name]
    pairs = []
    for who in means.everyone:
        for reference in references:
            if who[0] == name or (None not in (who[1], reference[1]) and who[1] != reference[1]):
                continue
            for metric in ("auc", "log_loss"):
                for k in sorted({k for found, k, _ in means.values if found == who}):
                    found = means.difference(who, reference, k, k, metric)
                    if found is not None:
                        pair = _pair("reference", metric, who, reference, k, k, found)
                        pairs.append({**pair, "by_lender": found} if metric == "auc" else pair)
    return pairs


def _label_pairs(means: _Means) -> list[Pair]:
    """Every federated method after k labels less itself before them."""
    return [
        _pair("labels", metric, who, who, k, 0, found)
        for who in means.everyone
        if kind_of(who[0]) == "federated"
        for metric in ("auc", "log_loss", "brier")
        for k in sorted({k for own, k, _ in means.values if own == who and k > 0})
        if (found := means.difference(who, who, k, 0, metric)) is not None
    ]


def _privacy_pairs(means: _Means) -> list[Pair]:
    """Every method at an epsilon less itself at the next larger one."""
    pairs = []
    for name in dict.fromkeys(who[0] for who in means.everyone if who[1] is not None):
        ordered = sorted((who for who in means.everyone if who[0] == name), key=lambda who: who[1] or 0.0)
        for who, next_one in pairwise(ordered):
            for k in sorted({k for own, k, _ in means.values if own == who}):
                found = means.difference(who, next_one, k, k, "auc")
                if found is not None:
                    pairs.append(_pair("privacy", "auc", who, next_one, k, k, found))
    return pairs


def _best_local(means: _Means, k: int) -> Who | None:
    found = {
        who: float(np.mean(list(means.values[who, k, "auc"].values())))
        for who in means.everyone
        if kind_of(who[0]) == "local" and (who, k, "auc") in means.values
    }
    return max(found, key=lambda who: found[who], default=None)


def _levels(means: _Means) -> list[Level]:
    levels: list[Level] = []
    ks = sorted({k for _, k, _ in means.values if k > 0})
    rivals = {k: rival for k in ks if (rival := _best_local(means, k)) is not None}
    for who in means.everyone:
        if kind_of(who[0]) != "federated" or not rivals:
            continue
        gains = {k: means.difference(who, rival, k, k, "auc") for k, rival in rivals.items()}
        at = crossover({k: estimate(np.array(list(gain.values()))) for k, gain in gains.items() if gain is not None})
        levels.append(
            {
                "method": who[0],
                "epsilon": told(who[1]),
                "labels": at.labels,
                "words": str(at),
                "best_local": {str(k): rival[0] for k, rival in rivals.items()},
            }
        )
    return levels


def _gains(means: _Means, k: int) -> list[Gain]:
    rival = _best_local(means, k)
    if rival is None:
        return []
    found: list[Gain] = []
    for who in means.everyone:
        gain = means.difference(who, rival, k, k, "auc") if kind_of(who[0]) == "federated" else None
        if gain is not None:
            found.append(
                {"method": who[0], "epsilon": told(who[1]), "k": k, "baseline": rival[0], "by_lender": gain}
            )  # fmt: skip
    return found


def _split_words(loaded: Loaded) -> str:
    wanted = loaded.comparison.split
    if wanted.kind == "folds":
        whose = "the training lenders" if wanted.over == "training" else "all lenders, those kept unseen as well"
        return f"{wanted.folds}-fold cross-validation over {whose}"
    if wanted.kind == "unseen":
        return "lenders that took no part"
    return f"segments that nobody learned from ({', '.join(wanted.unseen)}), of lenders that took part"

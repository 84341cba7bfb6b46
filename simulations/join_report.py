"""Should one bank join? What it would gain from a finished run that it took no part in, by its own records.

The gain is a newcomer's: the shared start was learned without this bank, is adapted to k of its labels, and is judged
on its other records beside what the bank could make of the same k labels alone. No figure here is over banks: an
interval speaks of this bank, of other records of its kind and of other draws of k labels among them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

import numpy as np
import polars as pl

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.evaluation import EvaluationSet, Method, Predictor
from metarisk_common.intervals import Crossover, crossover
from metarisk_common.privacy import epsilon
from metarisk_common.table import require_columns

from . import baselines, experiment, results
from .compare import shared
from .comparison import Adapting
from .join_figures import Figure, Matrix, Tracks, difference, play
from .runfolder import RunFolder

KS: Final = (0, 10, 20, 50, 100, 200)
DRAWS: Final = 30
MIN_JUDGED: Final = 100
"""Records that must be left to judge by beyond the most labels."""

SHARED: Final = "shared"
GUESS: Final = "none"
TITLES: Final = {
    SHARED: "The shared start, adapted",
    GUESS: "No model: without labels a bank can only guess",
    "local-logistic": "Own logistic regression",
    "local-logistic-binned": "Own logistic regression, same inputs",
    "local-lightgbm": "Own LightGBM",
}

Verdict = Literal["yes", "no", "not shown"]
Overall = Literal["yes", "no", "it depends", "not shown"]


class Rival(TypedDict):
    """What the bank could do instead with k labels: its AUC, and the shared start's gain over it in both measures."""

    method: str
    auc: float
    gain_auc: Figure
    gain_log_loss: Figure
    verdict: Verdict


class AtLabels(TypedDict):
    """Everything with k labels. `strongest`: the rival with the highest AUC, which the verdict is against.

    `labels_added`: what the labels themselves add to the AUC of the shared start; None at k = 0.
    """

    k: int
    auc: float
    log_loss: float
    rivals: list[Rival]
    strongest: str
    verdict: Verdict
    labels_added: Figure | None


class Cost(TypedDict):
    """What taking part in such a run costs, by its plan; `epsilon` is None where nothing is private."""

    epsilon: float | None
    delta: float
    unit: str
    rounds: int
    steps: int
    delta_limit: float
    delta_fits: bool


class Join(TypedDict):
    """The report as plain values; no cell of the bank's table is among them."""

    institution: str
    run: str
    not_private: bool
    trained_by: int
    records: int
    draws: int
    adaptation: str
    verdict: Overall
    words: str
    crossover: float | None
    crossover_words: str
    left_out_k: list[int]
    at: list[AtLabels]
    cost: Cost


def judge(
    run: RunFolder,
    frame: pl.DataFrame,
    institution: str,
    *,
    where: str,
    ks: Sequence[int] = KS,
    draws: int = DRAWS,
    adaptation: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Join:
    """Judge what a finished run is worth to a bank that took no part in it.

    Args:
        run: the finished run.
        frame: the bank's records, or a table in which the schema's column of institutions names it.
        institution: the bank.
        where: the table's name, for messages.
        ks: numbers of labels; those that leave fewer than 100 records to judge by are left out, and told.
        draws: draws of labels, at least 2.
        adaptation: how the shared start is adapted, see `metarisk_common.adapters`.
        on_progress: called with (draws done, draws in all).

    Raises:
        ConfigError: the bank took part in the run, is not in the table, or the run has not finished; or the run
            forecasts a number.
        DataError: the table does not fit the run's schema, or is too small.

    """
    if run.scenario.columns.regression:
        raise ConfigError(
            f"{run.path}: its label is a number, and this report is for binary outcomes; "
            "judge it by `metarisk-simulate evaluate`"
        )
    if institution in run.sizes:
        raise ConfigError(
            f"'{institution}' took part in {run.path}: what it gained can be told only by a run without it; "
            "name it in splits.unseen of a scenario and run that"
        )
    params = experiment.meta_params(run)
    own = _own_records(run, frame, institution, where)
    possible = sorted({k for k in ks if len(own.y) - k >= MIN_JUDGED})
    if not [k for k in possible if k > 0]:
        raise DataError(
            f"{where}: {len(own.y)} records of '{institution}' are too few; {MIN_JUDGED} must be left to judge by"
        )
    adapting = Adapting(method=adaptation, prior_variance=run.scenario.evaluation.prior_variance)
    methods: list[Method] = [
        shared(SHARED, run.plan.model, params, adapting, results.learned_prior(run)),
        _Guess(),
        baselines.LocalLogistic(),
        baselines.LocalLogisticBinned(),
        baselines.LocalLightGBM(),
    ]
    tracks = play(own, methods, possible, draws=draws, seed=run.scenario.evaluation.seed, on_progress=on_progress)
    at = [_at(tracks, k, own.y) for k in possible]
    level = crossover({one["k"]: strongest_of(one)["gain_auc"] for one in at})
    verdict, words = overall(at, level)
    return {
        "institution": institution,
        "run": run.path.name,
        "not_private": run.not_private,
        "trained_by": len(run.sizes),
        "records": len(own.y),
        "draws": draws,
        "adaptation": adaptation,
        "verdict": verdict,
        "words": words,
        "crossover": level.labels,
        "crossover_words": str(level),
        "left_out_k": sorted(set(ks) - set(possible)),
        "at": at,
        "cost": _cost(run, len(own.y)),
    }


@dataclass(frozen=True)
class _Guess:
    """What ranks nobody: every record the same, at the share of positives among the labels, or a half."""

    name: str = GUESS
    needs_support: bool = False

    def fit(self, _x: Matrix, _raw: Matrix, y: Matrix) -> Predictor:
        rate = (float(y.sum()) + 1) / (len(y) + 2)
        return lambda x, _raw: np.full(len(x), rate)


def verdict_of(gain: Figure) -> Verdict:
    """Say yes or no only where the whole interval lies on one side of 0."""
    low, high = (0.0 if end is None else end for end in gain["ci95"])
    return "yes" if low > 0 else "no" if high < 0 else "not shown"


def _at(tracks: Tracks, k: int, y: Matrix) -> AtLabels:
    own = tracks.by_method[SHARED, k]
    rivals: list[Rival] = []
    for name, own_k in tracks.by_method:
        # With labels of its own a bank would not guess; without any it can do nothing else.
        if own_k != k or name == SHARED or (name == GUESS) != (k == 0):
            continue
        gain, gain_loss = difference(tracks, (SHARED, k), (name, k), y)
        rivals.append(
            {
                "method": name,
                "auc": float(np.mean(tracks.by_method[name, k].auc)),
                "gain_auc": gain,
                "gain_log_loss": gain_loss,
                "verdict": verdict_of(gain),
            }
        )
    strongest = max(rivals, key=lambda rival: rival["auc"])
    added = k > 0 and (SHARED, 0) in tracks.by_method
    return {
        "k": k,
        "auc": float(np.mean(own.auc)),
        "log_loss": float(np.mean(own.log_loss)),
        "rivals": rivals,
        "strongest": strongest["method"],
        "verdict": strongest["verdict"],
        "labels_added": difference(tracks, (SHARED, k), (SHARED, 0), y)[0] if added else None,
    }


def strongest_of(one: AtLabels) -> Rival:
    """Return the rival that the verdict at these labels is against."""
    return next(rival for rival in one["rivals"] if rival["method"] == one["strongest"])


def overall(at: Sequence[AtLabels], level: Crossover) -> tuple[Overall, str]:
    """Put the verdicts at each k into one, and into a sentence."""
    yes = [str(one["k"]) for one in at if one["verdict"] == "yes"]
    no = [str(one["k"]) for one in at if one["verdict"] == "no"]
    better, worse = f"with {', '.join(yes)} labels", f"with {', '.join(no)} labels"
    if yes and no:
        return "it depends", f"This bank does better from the shared start {better}, and better alone {worse}."
    if yes:
        lasts = "" if level.labels is None else f"; alone it is level from {level} labels on"
        return "yes", f"This bank does better from the shared start than alone {better}{lasts}."
    if no:
        return "no", f"This bank does better alone {worse}, and nowhere is a gain from the shared start shown."
    return "not shown", "Neither a gain over what this bank could do alone is shown, nor a loss."


def _own_records(run: RunFolder, frame: pl.DataFrame, institution: str, where: str) -> EvaluationSet:
    schema = run.plan.data
    if schema.institution in frame.columns:
        require_columns(frame, (schema.institution,), where)
        named = frame[schema.institution].cast(pl.String)
        frame = frame.filter(named == institution)
        if not frame.height:
            raise ConfigError(
                f"{where}: no record has '{institution}' in column '{schema.institution}'; name a bank of the table "
                "with --institution, or leave that column out where all records are one bank's"
            )
    frame = frame.with_columns(pl.lit(institution).alias(schema.institution))
    return results.evaluation_sets(frame, schema, where)[0]


def _cost(run: RunFolder, records: int) -> Cost:
    plan = run.plan
    spent = epsilon(plan.events(), plan.mechanism.delta)
    unit = plan.data.privacy_unit
    limit = 1 / (10 * records)
    return {
        "epsilon": spent if math.isfinite(spent) else None,
        "delta": plan.mechanism.delta,
        "unit": "one record" if unit is None else f"all records of one '{unit}'",
        "rounds": plan.outer.rounds,
        "steps": plan.total_steps,
        "delta_limit": limit,
        "delta_fits": plan.mechanism.delta <= limit,
    }

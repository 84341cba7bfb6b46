"""What each field measures by, and in whose words: credit, fraud and market volatility.

A yardstick scores one draw: what came, what was predicted, and what else is known of the judged records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from . import fraud_metrics as fraud
from . import volatility_metrics as volatility
from .metrics import LOWER_IS_BETTER, METRICS, Vector, score_all

Field = Literal["credit", "fraud", "volatility"]
Extra = Mapping[str, Vector]
"""(rows,) arrays by name, aligned with the records judged."""

ALERT_FPR: Final = 0.01
"""False positive rate of the threshold at which value captured and alerts a day are counted."""


@dataclass(frozen=True)
class FieldWords:
    """How a field speaks. `question`: completes "an institution that the model has never seen ...".

    `guessing`: what the headline measure of a guess is, in a clause; `floor`: where its axis begins at the latest.
    `unseen`: one and many of those that are judged and took no part, where they are called something else.
    """

    institution: str
    institutions: str
    records: str
    question: str
    guessing: str
    floor: float
    terms: tuple[tuple[str, str], ...]
    unseen: tuple[str, str] | None = None


@dataclass(frozen=True)
class Yardstick:
    """The measures of a field. `metrics`: keys in the order of reports; a score may lack those that need extras."""

    name: Field
    headline: str
    metrics: tuple[str, ...]
    lower_is_better: frozenset[str]
    titles: Mapping[str, str]
    words: FieldWords
    score: Callable[[Vector, Vector, Extra], dict[str, float]]

    @property
    def title(self) -> str:
        """What the headline measure is called."""
        return self.titles[self.headline]


def _credit(y: Vector, prediction: Vector, _extra: Extra) -> dict[str, float]:
    return score_all(y, prediction)


def _fraud(y: Vector, prediction: Vector, extra: Extra) -> dict[str, float]:
    """Score alerts; `extra`: "amount" for value captured and "day" for alerts a day, each may be absent."""
    found = score_all(y, prediction)
    del found["ks"]
    found |= {
        "pr_auc": fraud.average_precision(y, prediction),
        "recall_1": fraud.recall_at(y, prediction, 0.01),
        "recall_5": fraud.recall_at(y, prediction, 0.05),
        "precision_1": fraud.precision_in_alerts(y, prediction),
    }
    if "amount" in extra:
        found["value_captured"] = fraud.value_captured(y, prediction, extra["amount"], ALERT_FPR)
    if "day" in extra:
        found["alerts_a_day"] = fraud.alerts_a_day(y, prediction, extra["day"], ALERT_FPR)
    return {name: found[name] for name in FRAUD.metrics if name in found}


def _volatility(y: Vector, prediction: Vector, extra: Extra) -> dict[str, float]:
    """Score forecasts in standardised units of log-variance.

    `prediction`: (rows,), or (rows, 2) with what each forecast lies below the logarithm of the variance it stands for
    (`volatility_metrics.half_variance`), which QLIKE alone asks for and takes to be 0 where it is not said. `extra`:
    "reference", the mean of the target learned from, in the same units; "scale", one such unit in log-variance (1 where
    absent), which QLIKE needs; "own_reference", what each one's own past mean would have forecast, may be absent.
    """
    if "reference" not in extra:
        raise ValueError('out-of-sample R2 needs extra["reference"], the mean of the target learned from')
    scale = np.asarray(extra.get("scale", np.ones(len(y))), dtype=np.float64)
    came, columns = np.asarray(y, dtype=np.float64), np.asarray(prediction, dtype=np.float64)
    forecast, below = (columns[:, 0], columns[:, 1]) if columns.ndim > 1 else (columns, np.zeros(len(columns)))
    found = {"r2": volatility.r2(came, forecast, extra["reference"])}
    if "own_reference" in extra:
        found["r2_own"] = volatility.r2(came, forecast, extra["own_reference"])
    return found | {
        "qlike": volatility.qlike(came * scale, (forecast + below) * scale),
        "mse": volatility.mse(came, forecast),
        "bias": volatility.bias(came, forecast),
    }


_LOSSES: Final = ("Log-loss, Brier", "How far predicted probabilities lie from what happened. Lower is better.")
_AUC: Final = (
    "The chance that a loan that failed is ranked riskier than one that did not. Higher is better; 0.5 is guessing."
)

CREDIT: Final = Yardstick(
    name="credit",
    headline="auc",
    metrics=METRICS,
    lower_is_better=LOWER_IS_BETTER,
    titles={"auc": "AUC", "ks": "KS", "log_loss": "Log-loss", "brier": "Brier", "calibration": "Calibration"},
    words=FieldWords(
        institution="lender",
        institutions="lenders",
        records="loans",
        question="ranks risk",
        guessing="An AUC of 0.5 is what guessing gets.",
        floor=0.5,
        terms=(
            (
                "AUC",
                _AUC,
            ),
            ("AUC, worst tenth", "The same over the tenth of lenders for which the method does worst."),
            (
                "KS",
                "The largest distance between the score distributions of failed and of sound loans. Higher is better.",
            ),
            _LOSSES,
        ),
    ),
    score=_credit,
)

FRAUD: Final = Yardstick(
    name="fraud",
    headline="pr_auc",
    metrics=(
        "pr_auc", "auc", "recall_1", "recall_5", "precision_1", "value_captured", "alerts_a_day",
        "log_loss", "brier", "calibration",
    ),
    lower_is_better=LOWER_IS_BETTER,
    titles={
        "pr_auc": "PR-AUC",
        "auc": "AUC",
        "recall_1": "Recall at 1% FPR",
        "recall_5": "Recall at 5% FPR",
        "precision_1": "Precision in top 1%",
        "value_captured": "Value captured",
        "alerts_a_day": "Alerts a day",
        "log_loss": "Log-loss",
        "brier": "Brier",
        "calibration": "Calibration",
    },
    words=FieldWords(
        institution="bank",
        institutions="banks",
        records="payments",
        question="finds fraud",
        guessing="Guessing gets the share of fraud among the payments.",
        floor=0.0,
        terms=(
            (
                "PR-AUC",
                "Average precision: area under precision against recall. Guessing gets the share of fraud.",
            ),
            ("PR-AUC, worst tenth", "The same over the tenth of the judged for which the method does worst."),
            ("AUC", "The chance that a fraud is ranked above a sound payment. 0.5 is guessing."),
            ("Recall at 1% (5%) FPR", "Share of frauds caught when at most 1% (5%) of sound payments are alerted."),
            ("Precision in top 1%", "Share of frauds among the 1% of payments with the highest scores."),
            ("Value captured", "Share of the frauds' amount that lies in the alerts at 1% FPR."),
            ("Alerts a day", "Payments alerted at 1% FPR, by days, among the payments judged."),
            _LOSSES,
        ),
    ),
    score=_fraud,
)  # fmt: skip

VOLATILITY: Final = Yardstick(
    name="volatility",
    headline="r2",
    metrics=("r2", "r2_own", "qlike", "mse", "bias"),
    lower_is_better=frozenset({"qlike", "mse"}),
    titles={"r2": "R2", "r2_own": "R2, own mean", "qlike": "QLIKE", "mse": "MSE", "bias": "Bias"},
    words=FieldWords(
        institution="desk",
        institutions="desks",
        records="days",
        question="forecasts volatility",
        guessing="An R2 of 0 is what the mean of the target learned from gets.",
        floor=0.0,
        unseen=("asset", "assets"),
        terms=(
            (
                "R2",
                (
                    "Out of sample: 1 less the squared error by that of the mean of the target learned from. Where an "
                    "asset's own level is far from that mean, as a bond's is, most of its R2 is for the level."
                ),
            ),
            ("R2, worst tenth", "The same over the tenth of the judged for which the method does worst."),
            ("R2, own mean", "The same against the asset's own past mean, known on each day: level alone earns 0."),
            (
                "QLIKE",
                (
                    "v/h - log(v/h) - 1 of variance v and forecast h. Lower is better; 0 is exact. A forecast of the "
                    "logarithm becomes one of the variance by half the variance of its errors before the judged days."
                ),
            ),
            ("MSE, bias", "In standardised log-variance: mean squared error, and mean forecast less what came."),
        ),
    ),
    score=_volatility,
)

YARDSTICKS: Final[Mapping[Field, Yardstick]] = {"credit": CREDIT, "fraud": FRAUD, "volatility": VOLATILITY}
"""By the name that a scenario's `evaluation.field` gives."""

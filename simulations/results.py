"""What a finished run is worth: its initializations and their rivals on institutions that took no part."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import polars as pl

from client.dataset import read_table
from metarisk_common.errors import ConfigError
from metarisk_common.evaluation import (
    DrawRule,
    EpisodeScore,
    EvaluationSet,
    Method,
    at_random,
    in_time,
    paired_difference,
    run_episodes,
    share_harmed,
    summarise,
)
from metarisk_common.features import Encoder
from metarisk_common.files import write_atomically
from metarisk_common.params import Params
from metarisk_common.prior import LearnedPrior
from metarisk_common.schema import NumericLabel, Schema
from metarisk_common.table import check_table, check_two_classes, labels, split_by_institution
from metarisk_common.yardsticks import CREDIT, VOLATILITY, YARDSTICKS

from . import baselines, market_classes, market_episodes
from .experiment import MAIN, data_files
from .runfolder import RunFolder, numbers_of
from .scenarios import Evaluation, Scenario
from .unseen import institution_of

GAIN_K = 50
"""Labels at which the gain of each institution is shown, or the nearest number that was evaluated."""

_TITLES: Final = {
    "reptile": "Reptile",
    "fedavg": "FedAvg",
    "prox": "MR-MTL",
    "fomaml": "First-order MAML",
    "anil": "ANIL",
    "maml": "MAML",
    "meta_sgd": "Meta-SGD",
}


@dataclass(frozen=True)
class Results:
    """Scores of every episode, and the summary that `metrics.json` holds."""

    scores: Sequence[EpisodeScore]
    metrics: dict[str, Any]
    main_method: str

    def to_json(self) -> dict[str, Any]:
        """Episodes and summary as plain values."""
        return {"episodes": [score.to_json() for score in self.scores], "summary": self.metrics["summary"]}


def method_names(run: RunFolder) -> dict[str, str]:
    """Name each initialization as the tables do, by its key in `experiment.initializations`."""
    algorithm = run.plan.inner.algorithm
    private = run.plan.mechanism.noise_multiplier > 0
    prefix = "dp-" if private else ""
    return {MAIN: f"{prefix}{algorithm}", "no-dp": f"{algorithm}-no-dp", "joint": f"{prefix}joint"}


def evaluation_sets(
    frame: pl.DataFrame, schema: Schema, where: str, extra: Mapping[str, str] | None = None
) -> list[EvaluationSet]:
    """Check a table and encode it, institution by institution.

    Args:
        frame: the table.
        schema: what its columns are.
        where: the table's name, for messages.
        extra: columns of numbers or dates that the yardstick asks for, by its names for them.

    Raises:
        DataError: the table does not fit the schema, lacks a column, or an institution, named, has one class only.

    """
    check_table(frame, schema, where)
    encoder = Encoder(schema)
    sets = []
    for name, table in split_by_institution(frame, schema, where).items():
        y = labels(table, schema.label, where)
        if not schema.regression:
            check_two_classes(y, f"{where}: institution '{name}'")
        x, _ = encoder.encode(table, where)
        known = {key: numbers_of(table, column, where) for key, column in (extra or {}).items()}
        sets.append(EvaluationSet(name, x, baselines.raw_matrix(table, schema, where).values, y, known))
    return sets


def extras(scenario: Scenario) -> dict[str, str]:
    """Return the columns that a scenario's yardstick needs, by the yardstick's names for them."""
    named = {"amount": scenario.evaluation.amount, "day": scenario.evaluation.day}
    return {key: column for key, column in named.items() if column is not None}


def measure(
    run: RunFolder,
    initializations: Mapping[str, Params],
    frame: pl.DataFrame,
    *,
    where: str,
    ks: Sequence[int] | None = None,
    draws: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Judge a run on the institutions of a table; every comparison is paired.

    Raises:
        ConfigError: an institution of the table took part in the run: it would not be unseen.
        DataError: the table does not fit the run's schema, or an institution is too small for the largest k.

    """
    evaluation = run.scenario.evaluation
    yardstick, schema = YARDSTICKS[evaluation.field], run.scenario.columns
    if schema.regression != (evaluation.field == VOLATILITY.name):
        what = "a number" if schema.regression else "one of two outcomes"
        raise ConfigError(f'{run.path}: evaluation.field = "{evaluation.field}" does not fit a label that is {what}')
    sets = evaluation_sets(frame, schema, where, extras(run.scenario))
    if isinstance(schema.label, NumericLabel):
        known = {"reference": float(np.mean(_pool(run)[1])), "scale": schema.label.scale}
        sets = [_with_constants(item, known) for item in sets]
        sets = market_episodes.with_forecasts(sets, frame, schema.institution, schema.label)
    taken = [item.institution for item in sets if item.institution in run.sizes]
    if taken:
        message = f"{where}: {len(taken)} institution(s) took part in the run, '{taken[0]}' among them"
        raise ConfigError(f"{message}; leave them out, or they would not be unseen")
    chosen = tuple(sorted(set(ks))) if ks is not None else evaluation.k
    methods, described = _methods(run, initializations, frame)
    if isinstance(schema.label, NumericLabel):
        methods = market_episodes.retransformed(methods, _learned_from(run), schema.label.scale)
    scores = run_episodes(
        sets,
        methods,
        chosen,
        draws=draws or evaluation.draws,
        seed=evaluation.seed,
        yardstick=yardstick,
        draw=draw_rule(evaluation),
        on_progress=on_progress,
    )
    main = method_names(run)[MAIN]
    # A bank's products, or its years, are no independent sample of banks.
    cluster = institution_of if run.scenario.splits.judges_what_came_later else str
    metrics = {
        "ks": list(chosen),
        "draws": draws or evaluation.draws,
        "main_method": main,
        "not_private": run.not_private,
        "methods": described,
        "summary": summarise(scores, yardstick, cluster=cluster),
        "paired": _paired(scores, main, list(described), chosen, yardstick.headline, cluster),
        "gain_by_institution": _gains(scores, main, list(described), chosen, yardstick.headline),
        "share_harmed": {
            str(k): share_harmed(scores, main, k, metric=yardstick.headline) for k in chosen if k > 0 and 0 in chosen
        },
    }
    if evaluation.field != CREDIT.name:
        metrics["field"] = evaluation.field
    classes = market_classes.classes_of(frame, schema.institution) if schema.regression else {}
    if classes:
        metrics["classes"] = market_classes.by_class(scores, classes, main, list(described), chosen)
    if run.scenario.splits.judges_what_came_later:
        metrics["judged"] = "tasks"
    if evaluation.min_positives > 1:
        metrics["min_positives"] = evaluation.min_positives
    if evaluation.base_rate is not None:
        metrics["base_rate"] = evaluation.base_rate
    return Results(scores, metrics, main)


def draw_rule(evaluation: Evaluation) -> DrawRule:
    """Return how a scenario's draws are made: in time where it names an embargo, at random elsewhere."""
    if evaluation.embargo is not None:
        return partial(in_time, embargo=evaluation.embargo, least_judged=evaluation.least_judged)
    return partial(at_random, min_positives=evaluation.min_positives)


def _with_constants(item: EvaluationSet, known: Mapping[str, float]) -> EvaluationSet:
    return replace(item, extra={**item.extra, **{name: np.full(len(item.y), value) for name, value in known.items()}})


def learned_prior(run: RunFolder) -> np.ndarray | None:
    """Return (width,) variances of a scorecard's weights where the run's plan has let the server learn them."""
    records = run.journal()
    found = records[-1].get("learned_prior") if records else None
    return None if found is None else LearnedPrior.from_json(found).variances(Encoder(run.plan.data).groups)


def save_results(run: RunFolder, results: Results) -> None:
    """Write `metrics.json` and `episodes.json` into the run's folder."""
    write_atomically(run.path / "metrics.json", json.dumps(results.metrics, indent=1).encode())
    write_atomically(run.path / "episodes.json", json.dumps(results.to_json()["episodes"]).encode())


def _methods(
    run: RunFolder, found: Mapping[str, Params], judged: pl.DataFrame
) -> tuple[list[Method], dict[str, dict[str, Any]]]:
    names = method_names(run)
    algorithm = _TITLES[run.plan.inner.algorithm]
    private = run.plan.mechanism.noise_multiplier > 0
    budget = f", epsilon {run.epsilon:g}" if private else ""
    titles = {MAIN: f"{algorithm}{budget}", "no-dp": f"{algorithm}, no privacy", "joint": f"Joint training{budget}"}
    methods: list[Method] = []
    described: dict[str, dict[str, Any]] = {}
    for key, params in found.items():
        methods.append(_initialization(run, names[key], params))
        described[names[key]] = {"title": titles[key], "kind": "federated", "private": private and key != "no-dp"}
    if not run.scenario.evaluation.baselines:
        return methods, described
    base_rate = run.scenario.evaluation.base_rate
    for method, title, kind in _rivals(run, judged):
        if base_rate is not None and kind == "local":
            method = baselines.Corrected(method, base_rate)  # noqa: PLW2901 - the same method, corrected
        methods.append(method)
        described[method.name] = {"title": title, "kind": kind, "private": False}
    return methods, described


def _rivals(run: RunFolder, judged: pl.DataFrame) -> list[tuple[Method, str, str]]:
    """Return what a run is measured against, with titles and kinds."""
    raw, y = _pool(run)
    if run.scenario.columns.regression:
        return market_episodes.rivals(raw, y, market_episodes.forecasts_in(judged))
    return [
        (baselines.LocalLogistic(), "Own logistic regression", "local"),
        (baselines.LocalLogisticBinned(), "Own logistic regression, same inputs", "local"),
        (baselines.LocalLightGBM(), "Own LightGBM", "local"),
        (baselines.pooled_logistic(raw, y), "Pooled logistic regression", "pooled"),
        (baselines.pooled_lightgbm(raw, y), "Pooled LightGBM (oracle)", "pooled"),
    ]


def _initialization(run: RunFolder, name: str, params: Params) -> Method:
    evaluation, prior = run.scenario.evaluation, learned_prior(run)
    if evaluation.adaptation == "prior" and prior is None:
        raise ConfigError(f'{run.path}: adaptation = "prior" needs a scorecard, and a plan that learns a prior')
    return baselines.ModelInitialization(
        name, run.plan.model, params, evaluation.adaptation, evaluation.prior_variance, prior, evaluation.base_rate
    )


def _pool(run: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    schema, pooled = run.scenario.columns, _pooled_table(run)
    return baselines.raw_matrix(pooled, schema).values, labels(pooled, schema.label, str(run.path))


def _learned_from(run: RunFolder) -> market_episodes.Learned:
    table, schema, where = _pooled_table(run), run.scenario.columns, str(run.path)
    raw = baselines.raw_matrix(table, schema).values
    return market_episodes.Learned(Encoder(schema).encode(table, where)[0], raw, labels(table, schema.label, where))


def _pooled_table(run: RunFolder) -> pl.DataFrame:
    return pl.concat([read_table(path) for path in data_files(run)])


def _paired(
    scores: Sequence[EpisodeScore],
    main: str,
    methods: list[str],
    ks: Sequence[int],
    metric: str,
    cluster: Callable[[str], str],
) -> list[dict[str, Any]]:
    scored = {(score.method, score.k) for score in scores}
    rows = []
    for other in methods:
        for k in ks:
            if other != main and (other, k) in scored:
                difference = paired_difference(scores, main, other, k, metric, cluster=cluster)
                row = {key: difference[key] for key in ("mean", "ci95", "wins", "losses")}
                rows.append({"method": main, "baseline": other, "k": k, **row})
    return rows


def _gains(
    scores: Sequence[EpisodeScore], main: str, methods: list[str], ks: Sequence[int], metric: str
) -> dict[str, Any] | None:
    positive = [k for k in ks if k > 0]
    local = [name for name in methods if name.startswith("local-")]
    if not positive or not local:
        return None
    k = min(positive, key=lambda value: abs(value - GAIN_K))
    mean = {name: np.mean([s[metric] for s in scores if s.method == name and s.k == k]) for name in local}
    strongest = max(local, key=lambda name: float(mean[name]))
    gains = paired_difference(scores, main, strongest, k, metric)["by_institution"]
    return {"k": k, "baseline": strongest, "method": main, "gains": gains}

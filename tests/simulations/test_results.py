"""What a run is worth, measured only on those who took no part in it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from client.dataset import read_table
from metarisk_common.errors import ConfigError, DataError, IntegrityError
from simulations import experiment, results, runfolder
from simulations.results import Results
from simulations.runfolder import RunFolder

Call = Callable[..., tuple[int, str, str]]
MakeScenario = Callable[..., Path]


@pytest.fixture(scope="module")
def run(finished_run: Path) -> RunFolder:
    return runfolder.open_run(finished_run)


def measured(run: RunFolder, frame: pl.DataFrame | None = None, **choices: Any) -> Results:
    found = {"meta": experiment.meta_params(run)}
    table = read_table(run.path / "unseen.parquet") if frame is None else frame
    return results.measure(run, found, table, where="unseen", **choices)


def test_an_institution_that_took_part_is_refused_by_name(
    run: RunFolder, make_loans: Callable[..., pl.DataFrame]
) -> None:
    with pytest.raises(ConfigError, match=r"unseen: 4 institution\(s\) took part in the run, 'Lender"):
        measured(run, make_loans())


def test_a_lender_too_small_for_the_largest_k_is_named(run: RunFolder) -> None:
    unseen = run.info["unseen"][0]
    with pytest.raises(DataError, match=unseen):
        measured(run, ks=[0, 400])


def test_a_lender_with_one_class_is_named(run: RunFolder) -> None:
    frame = read_table(run.path / "unseen.parquet")
    one = pl.when(pl.col("lender") == run.info["unseen"][1]).then(pl.lit("good")).otherwise(pl.col("outcome"))
    with pytest.raises(DataError, match=f"{run.info['unseen'][1]}.*one class"):
        measured(run, frame.with_columns(one.alias("outcome")))


@pytest.mark.parametrize("ks", [[0], [0, 20], [20], [5, 20, 0, 20]])
def test_any_numbers_of_labels_can_be_asked_for(run: RunFolder, ks: list[int]) -> None:
    found = measured(run, ks=ks)
    wanted = sorted(set(ks))
    assert found.metrics["ks"] == wanted
    assert list(found.metrics["summary"]["dp-reptile"]) == [str(k) for k in wanted]
    assert {(score.institution, score.k, score.draw) for score in found.scores} == {
        (name, k, draw) for name in run.info["unseen"] for k in wanted for draw in (0, 1)
    }
    assert set(found.metrics["share_harmed"]) == {str(k) for k in wanted if k > 0 and 0 in wanted}


def test_what_was_learned_tells_good_from_bad_on_lenders_never_seen(run: RunFolder) -> None:
    summary = measured(run, draws=5).metrics["summary"]["dp-reptile"]
    assert summary["0"]["auc"]["mean"] > 0.62
    start = {"points.weight": np.zeros_like(experiment.meta_params(run)["points.weight"])}
    untrained = results.measure(run, {"meta": start}, read_table(run.path / "unseen.parquet"), where="unseen")
    assert untrained.metrics["summary"]["dp-reptile"]["0"]["auc"]["mean"] == pytest.approx(0.5)


def test_results_are_saved_as_strict_json(run: RunFolder, tmp_path: Path) -> None:
    copy = dataclasses.replace(run, path=tmp_path)
    found = measured(run)
    results.save_results(copy, found)
    for name, expected in (("metrics.json", found.metrics), ("episodes.json", found.to_json()["episodes"])):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(expected))


def test_methods_are_named_after_what_they_are(make_scenario: MakeScenario, tmp_path: Path, call: Call) -> None:
    from simulations.cli import app  # noqa: PLC0415 - as the command does

    replace = {"baselines = false": "baselines = true", "rounds = 12": "rounds = 2", "k = [0, 10]": "k = [0, 20]"}
    scenario = make_scenario(tmp_path, replace=replace)
    local = {"local-logistic", "local-logistic-binned", "local-lightgbm", "pooled-logistic", "pooled-lightgbm"}
    for name, epsilon, federated in (
        ("private", 4, {"dp-reptile", "reptile-no-dp", "dp-joint"}),
        ("open", "inf", {"reptile", "joint"}),
    ):
        out = tmp_path / name
        code, text, err = call(app, "run", scenario, "--out", out, "--workers", 0, "--json", "--epsilon", epsilon)
        assert (code, err) == (0, "")
        answer = json.loads(text, parse_constant=pytest.fail)
        assert set(answer["summary"]) == federated | local
        assert {row["baseline"] for row in answer["paired"]} == (federated | local) - {answer["paired"][0]["method"]}
        assert (answer["privacy"]["epsilon_budget"] is None) == (epsilon == "inf")
        opened = runfolder.open_run(out)
        assert math.isinf(opened.epsilon) == (epsilon == "inf")
        assert opened.not_private
    damaged = tmp_path / "private" / experiment.INITIALIZATIONS
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="remove it"):
        experiment.initializations(runfolder.open_run(tmp_path / "private"), workers=0)


def test_a_network_is_learned_and_adapted_like_a_scorecard(
    make_scenario: MakeScenario, tmp_path: Path, call: Call
) -> None:
    from simulations.cli import app  # noqa: PLC0415 - as the command does

    replace = {
        'kind = "scorecard"': 'kind = "mlp"\nhidden = [6]',
        "rounds = 12": "rounds = 4",
        "epsilon = 4": "epsilon = 50",
    }
    out = tmp_path / "run"
    code, text, err = call(app, "run", make_scenario(tmp_path, replace=replace), "--out", out, "--workers", 0, "--json")
    assert (code, err) == (0, "")
    summary = json.loads(text)["summary"]["dp-reptile"]
    assert {k: summary[k]["institutions"] for k in summary} == {"0": 2, "10": 2}
    assert len(experiment.meta_params(runfolder.open_run(out))) == 4
    assert 0.4 < summary["10"]["auc"]["mean"] <= 1

"""`adapt --base-rate`: labels chosen with an eye on the outcome give probabilities of the true level."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy.special import logit

from client.artifacts import load_model
from client.cli import app
from client.dataset import load_dataset
from metarisk_common.adapters import predict
from metarisk_common.plan import Plan, read_plan
from server.manifest import export_file

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def start(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "start.safetensors"
    export_file(finished_run, out)
    return out


@pytest.fixture
def bank(tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], plan: Plan) -> Path:
    """A bank of 3,000 loans that labels every bad one and a few of the others."""
    loans = make_loans(lenders=1, rows=3000)
    folder = make_bank(tmp_path / "bank", plan, loans, seed=None)
    label = plan.data.outcome
    bad = pl.col(label.name).cast(pl.String) == str(label.positive)
    kept = pl.concat([loans.filter(bad), loans.filter(~bad).head(loans.filter(bad).height // 2)])
    assert kept.height > 1000
    loans.write_csv(folder / "all.csv")
    kept.write_csv(folder / "chosen.csv")
    return folder


@pytest.fixture
def adapt(call: Call, start: Path, bank: Path) -> Callable[..., dict[str, Any]]:
    def adapted(*arguments: object) -> dict[str, Any]:
        code, out, err = call(
            app, "adapt", start, "--folder", bank, "--data", bank / "chosen.csv", "--seed", 3, "--json", *arguments
        )
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    return adapted


@pytest.mark.parametrize(("k", "method"), [(400, "prox"), ("all", "auto")])
def test_the_level_is_the_true_one(
    adapt: Callable[..., dict[str, Any]], bank: Path, finished_run: Path, k: object, method: str
) -> None:
    everyone = load_dataset(bank / "all.csv", read_plan(finished_run / "plan.json").data, "Lender A")
    rate = float(everyone.y.mean())

    def mean_predicted(*arguments: object) -> float:
        model = load_model(Path(adapt("--k", k, "--method", method, *arguments)["model"]))
        return float(predict(model.plan.model, model.params, everyone.x).mean())

    assert mean_predicted() > rate + 0.15
    assert mean_predicted("--base-rate", rate) == pytest.approx(rate, abs=0.03)


def test_a_model_says_what_was_taken_out_and_every_draw_has_it_taken_out(
    adapt: Callable[..., dict[str, Any]], bank: Path, finished_run: Path
) -> None:
    said = adapt("--base-rate", 0.1)
    chosen = load_dataset(bank / "chosen.csv", read_plan(finished_run / "plan.json").data, "Lender A")
    assert said["method"]["base_rate"] == 0.1
    assert said["method"]["offset"] == pytest.approx(logit(chosen.y.mean()) - logit(0.1))
    model = load_model(Path(said["model"]))
    levels = [predict(model.plan.model, each, chosen.x).mean() for each in (model.params, *model.draws)]
    assert max(levels) < 0.5 * chosen.y.mean()
    assert adapt()["method"] | {"base_rate": 0.1} != said["method"]


def test_it_is_told_in_words(call: Call, start: Path, bank: Path) -> None:
    table = "--folder", bank, "--data", bank / "chosen.csv"
    code, out, _ = call(app, "adapt", start, *table, "--base-rate", 0.1)
    assert code == 0
    assert "the labels stand for a share of 10.00%, as --base-rate says: +" in out
    assert "--base-rate" not in call(app, "adapt", start, *table)[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--base-rate", 1.0), "between 0 and 1"),
        (("--base-rate", 0), "between 0 and 1"),
        (("--base-rate", 0.1, "--k", 0), "--k 0 asks for none"),
    ],
)
def test_what_cannot_be_corrected_is_refused(
    call: Call, start: Path, bank: Path, arguments: tuple[object, ...], told: str
) -> None:
    code, _, err = call(app, "adapt", start, "--folder", bank, *arguments)
    assert code == 2
    assert told in err


def test_labels_of_one_outcome_say_nothing_of_how_they_were_selected(call: Call, start: Path, bank: Path) -> None:
    table = pl.read_csv(bank / "chosen.csv").filter(pl.col("outcome") == "bad")
    table.write_csv(bank / "bad.csv")
    code, _, err = call(app, "adapt", start, "--folder", bank, "--data", bank / "bad.csv", "--base-rate", 0.1)
    assert code == 2
    assert "have one outcome" in err

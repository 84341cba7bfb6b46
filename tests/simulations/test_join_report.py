"""A bank is told yes, no, or that nothing is shown; intervals hold what they promise; no cell of its table is told."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, t

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.evaluation import EvaluationSet, Predictor
from metarisk_common.metrics import auc
from simulations import runfolder
from simulations.cli import app
from simulations.join_figures import difference, draw_interval, placements, play
from simulations.join_page import render
from simulations.join_report import Join, judge, strongest_of

Array = npt.NDArray[Any]
SEPARATION = np.array([0.8, 0.5, 0.3])


@pytest.fixture(scope="module")
def newcomer(make_loans: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    """Records of a bank that no run knows; its income is one that can be found again wherever it should not stand."""
    frame = make_loans(lenders=1, rows=1200, seed=5)
    incomes = [54321.98, *frame["income"][1:]]
    return frame.with_columns(pl.lit("Newcomer").alias("lender"), pl.Series("income", incomes))


@pytest.fixture(scope="module")
def flipped(newcomer: pl.DataFrame) -> pl.DataFrame:
    """The same bank in a world where whatever raises the risk of others lowers its own."""
    return newcomer.with_columns(pl.col("outcome").replace({"good": "bad", "bad": "good"}))


def asked(run: Path, frame: pl.DataFrame, **named: Any) -> Join:
    return judge(runfolder.open_run(run), frame, "Newcomer", where="newcomer.csv", **{"draws": 6, **named})


def test_yes_where_the_shared_start_fits(finished_run: Path, newcomer: pl.DataFrame) -> None:
    found = asked(finished_run, newcomer, ks=(0, 10))
    assert found["verdict"] == "yes"
    assert [one["verdict"] for one in found["at"]] == ["yes", "yes"]
    ten = strongest_of(found["at"][1])
    assert ten["auc"] == max(rival["auc"] for rival in found["at"][1]["rivals"])
    assert {rival["method"] for rival in found["at"][1]["rivals"]} == {
        "local-logistic", "local-logistic-binned", "local-lightgbm",
    }  # fmt: skip
    assert ten["gain_auc"]["mean"] == pytest.approx(found["at"][1]["auc"] - ten["auc"])
    assert found["crossover_words"] == "beyond 10"
    assert render(found).count("Yes: Newcomer gains from joining") == 1


def test_no_where_the_bank_is_better_alone(finished_run: Path, flipped: pl.DataFrame) -> None:
    # Adaptation is held back here, for what it makes of a start that points the wrong way is not the question.
    found = asked(finished_run, flipped, ks=(0, 200), adaptation="intercept")
    assert found["verdict"] == "no"
    assert [one["verdict"] for one in found["at"]] == ["no", "no"]
    assert found["at"][0]["auc"] < 0.5 < strongest_of(found["at"][1])["auc"]
    assert found["crossover"] == 200
    page = render(found)
    assert "No: Newcomer does better alone" in page
    assert "Yes:" not in page


def test_a_bank_that_took_part_is_refused(finished_run: Path, make_loans: Callable[..., pl.DataFrame]) -> None:
    run = runfolder.open_run(finished_run)
    with pytest.raises(ConfigError, match=r"'Lender A' took part in .*; name it in splits.unseen"):
        judge(run, make_loans(), "Lender A", where="loans.csv")
    with pytest.raises(ConfigError, match="no record has 'Nobody' in column 'lender'"):
        judge(run, make_loans(), "Nobody", where="loans.csv")


def test_a_bank_of_few_records_is_told_which_labels_were_not_tried(finished_run: Path, newcomer: pl.DataFrame) -> None:
    found = asked(finished_run, newcomer.head(130), draws=2, ks=(0, 20, 50))
    assert found["left_out_k"] == [50]
    assert [one["k"] for one in found["at"]] == [0, 20]
    with pytest.raises(DataError, match="100 records of 'Newcomer' are too few"):
        asked(finished_run, newcomer.head(100))


def test_the_command_writes_a_page_and_json_without_a_cell_of_the_table(
    finished_run: Path, newcomer: pl.DataFrame, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    table, out = tmp_path / "ours.csv", tmp_path / "answer" / "join.html"
    newcomer.drop("lender").write_csv(table)
    arguments = ("join-report", finished_run, "--data", table, "--institution", "Newcomer", "--out", out, "--draws", 2)
    code, printed, err = call(app, *arguments)
    assert (code, err) == (0, "")
    assert printed.splitlines()[0].startswith("YES: ")
    written = json.loads(out.with_suffix(".json").read_text())
    spent = runfolder.open_run(finished_run).spent()
    # Whoever takes part in such a run spends what those spent who did.
    assert written["cost"]["epsilon"] == pytest.approx(max(each["spent"] for each in spent.values()), abs=1e-6)
    assert written["cost"]["rounds"] == 12
    assert written["cost"]["delta_fits"] is False  # 1e-4 is more than 1 / (10 * 1200)
    page = out.read_text()
    assert "this bank&rsquo;s client would refuse the plan" in page
    assert "NOT PRIVATE" in page
    for text in (page, printed, json.dumps(written)):
        assert "54321" not in text
        assert "travel" not in text
    code, printed, _ = call(app, *arguments, "--json")
    assert json.loads(printed) == written
    code, _, err = call(app, *arguments, "--adaptation", "magic")
    assert code == 2
    assert "--adaptation magic: choose one of" in err


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=4, max_size=40))
def test_placements_have_the_auc_as_their_mean(rows: list[tuple[bool, int]]) -> None:
    positive, p = np.array([row[0] for row in rows]), np.array([row[1] / 5 for row in rows])
    if positive.all() or not positive.any():
        return
    found = placements(positive, p)
    assert found[positive].mean() == pytest.approx(auc(positive, p))
    assert found[~positive].mean() == pytest.approx(auc(positive, p))


def test_the_interval_counts_records_draws_and_shared_labels() -> None:
    generator = np.random.default_rng(2)
    good, bad, values = generator.normal(size=300), generator.normal(0, 2, size=90), generator.normal(size=20)

    def half(values: Array, shares: list[Array], k: int) -> float:
        low, high = draw_interval(values, shares, k=k, records=390)["ci95"]
        assert low is not None
        assert high is not None
        return (high - low) / 2 / float(t.ppf(0.975, 19))

    # Draws that agree: what other records would have changed, class by class.
    assert half(np.full(20, 0.1), [good, bad], 10) ** 2 == pytest.approx(good.var(ddof=1) / 300 + bad.var(ddof=1) / 90)
    # Records that all say the same: so many draws, and labels out of the same records.
    within = values.var(ddof=1)
    assert half(values, [np.zeros(300)], 0) ** 2 == pytest.approx(within / 20)
    assert half(values, [np.zeros(300)], 200) ** 2 == pytest.approx(within * (1 / 20 + 200 / 390))


# The interval where the truth is known: records of two normal clouds, a fixed direction against what k labels give.


@dataclass(frozen=True)
class Direction:
    """Scores along a direction that is given, or is the difference of the labels' class means."""

    name: str
    fixed: Array | None = None
    needs_support: ClassVar[bool] = False

    def fit(self, x: Array, _raw: Array, y: Array) -> Predictor:
        along = x[y == 1].mean(0) - x[y == 0].mean(0) if self.fixed is None else self.fixed
        return lambda x, _raw: np.asarray(1 / (1 + np.exp(-(x @ along))))


def records(generator: np.random.Generator, rows: int) -> tuple[Array, Array]:
    y = (generator.random(rows) < 0.4).astype(np.float64)
    return generator.normal(size=(rows, 3)) + y[:, None] * SEPARATION, y


def true_auc(along: Array) -> float:
    return float(norm.cdf(along @ SEPARATION / (np.sqrt(2) * np.linalg.norm(along))))


@pytest.mark.parametrize("k", [10, 50])
def test_the_interval_covers_what_a_bank_like_this_would_gain(k: int) -> None:
    generator = np.random.default_rng(k)
    fixed = np.array([1.0, 0.2, 0.9])
    learned: list[float] = []
    while len(learned) < 2000:
        x, y = records(generator, k)
        if 0 < y.sum() < k:
            learned.append(true_auc(x[y == 1].mean(0) - x[y == 0].mean(0)))
    truth = true_auc(fixed) - float(np.mean(learned))
    covered, widths = [], []
    for bank in range(60):
        x, y = records(generator, 250)
        own = EvaluationSet(f"bank {bank}", x, x, y)
        methods = [Direction("shared", fixed), Direction("alone")]
        tracks = play(own, methods, [k], draws=8, seed=1, on_progress=None)
        low, high = difference(tracks, ("shared", k), ("alone", k), y)[0]["ci95"]
        assert low is not None
        assert high is not None
        covered.append(low < truth < high)
        widths.append(high - low)
    # Of 60, 95% is 57 +- 1.7. Wider than it needs to be is allowed, but not so wide that nothing could be shown.
    assert sum(covered) >= 52
    assert np.mean(widths) < 0.25

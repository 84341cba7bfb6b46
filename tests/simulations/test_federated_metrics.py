"""Score histograms from real banks, and customers with several loans: charged, and worth what they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from client.dataset import load_dataset
from client.ledger import Ledger
from client.training import tasks_for
from metarisk_common import metrics
from metarisk_common.models import build, forward, to_tensors
from metarisk_common.privacy import epsilon
from simulations import experiment, runfolder
from simulations.cli import app

Call = Callable[..., tuple[int, str, str]]
METRICS = "[metrics]\nbins = 8\nnoise_multiplier = 8.0\nevery = 6\n\n[splits]"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, make_scenario: Callable[..., Path], make_loans: Callable[..., Any],
    call: Call,
) -> runfolder.RunFolder:  # fmt: skip
    """A run over customers with two or three loans each, with score histograms."""
    folder = tmp_path_factory.mktemp("metrics")
    frame = make_loans(rows=2500).with_row_index("row").with_columns((pl.col("row") % 900).alias("customer"))
    replace = {
        "[splits]": METRICS,
        'institution = "lender"': 'institution = "lender"\nprivacy_unit = "customer"\nmax_records_per_unit = 2',
    }
    scenario = make_scenario(folder, frame=frame.drop("row"), replace=replace)
    code, out, _ = call(app, "run", scenario, "--out", folder / "run", "--workers", 0)
    assert code == 0
    assert "federated metrics, from the noised score histograms of 4 lenders" in " ".join(out.split())
    return runfolder.open_run(folder / "run")


def test_the_histograms_are_charged_within_the_budget(run: runfolder.RunFolder) -> None:
    for folder in run.bank_folders.values():
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            events = ledger.events()
            assert [event.mechanism for event in events].count("gaussian_histograms") == 2
            assert sorted(events) == sorted(run.plan.events())
            assert 0.999 * 4 <= ledger.spent() <= 4
            assert ledger.spent() == epsilon(run.plan.events(), 1e-4)


def test_what_they_say_is_true_of_the_records_learned_from(run: runfolder.RunFolder) -> None:
    journal = run.journal()
    assert [record["round"] for record in journal if "federated_metrics" in record] == [6, 12]
    found = journal[-1]["federated_metrics"]
    learned = experiment.meta_params(run)
    logits, labels = [], []
    for name, folder in run.bank_folders.items():
        dataset = load_dataset(folder / "data.parquet", run.plan.data, name)
        for task in tasks_for(run.plan, dataset):
            assert task.unit is not None
            params = to_tensors({key: np.asarray(value, np.float32) for key, value in learned.items()})
            logits.append(forward(build(run.plan.model, task.x.shape[1]), params, task.x).numpy())
            labels.append(task.y.numpy())
    exact = metrics.auc(np.concatenate(labels), np.concatenate(logits))
    assert found["auc_noise_std"] < 0.05
    assert abs(found["auc"] - exact) < 4 * found["auc_noise_std"] + 0.02
    assert found["noise_std"] == 8.0 * 2 * 2  # the multiplier, two loans a customer, the root of four lenders


def test_declared_is_what_is_protected(run: runfolder.RunFolder) -> None:
    for name, folder in run.bank_folders.items():
        table = pl.read_parquet(folder / "data.parquet")
        assert run.sizes[name] == table["customer"].n_unique() < table.height


def test_the_report_tells_of_both(run: runfolder.RunFolder) -> None:
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "What the lenders measured together" in page
    assert "all records of one &#39;customer&#39; (at most 2) of one institution" in page

"""The built-in loans from beginning to end, with fewer rounds: what `demo` does, and what it leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

from client.ledger import Ledger
from simulations import runfolder
from simulations.cli import app
from simulations.scenarios import built_in, data_path, load_scenario


def test_59_lenders_learn_and_20_judge(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    path = built_in("credit")
    table = data_path(load_scenario(path), path)
    text = path.read_text(encoding="utf-8")
    for old, new in (
        ('file = "data/sba_loans.parquet"', f'file = "{table}"'),
        ("rounds = 20", "rounds = 1"),
        ("k = [0, 20, 50, 100]", "k = [0, 50]\nbaselines = false"),
        ("draws = 10", "draws = 1"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    scenario = tmp_path / "short.toml"
    scenario.write_text(text, encoding="utf-8")
    out = tmp_path / "run"
    code, shown, err = call(app, "run", scenario, "--out", out, "--workers", 0)
    assert code == 0, err
    assert "59 institutions learn together, 20 take no part" in shown
    assert "NOT PRIVATE: a simulation whose noise comes from the seed 2026" in shown

    run = runfolder.open_run(out)
    (record,) = run.journal()
    assert len(record["admitted"]) == len(record["federated_metrics"]["admitted"]) == 59
    assert record["federated_metrics"]["auc"] > 0.6
    for folder in run.bank_folders.values():
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            ledger.verify()
            assert 0.999 * 3 <= ledger.spent() <= 3
            assert [entry.kind for entry in ledger.entries()] == ["create", "approve", *["reserve", "release"] * 2]
            mechanisms = [event.mechanism for event in ledger.events()]
            assert mechanisms == ["poisson_gaussian", "gaussian_histograms"]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "NOT PRIVATE" in report
    assert len(run.info["unseen"]) == 20
    # One round is little; what every lender shares shows all the same.
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["summary"]["dp-reptile"]["0"]["auc"]["mean"] > 0.6
    assert metrics["summary"]["dp-reptile"]["0"]["institutions"] == 20

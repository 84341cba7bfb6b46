"""What `status` says of a run: who took part in what, and what is left, from the run's own folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metarisk_common.errors import MetariskError
from metarisk_common.flower_deployment import RunStatus
from metarisk_common.plan import OuterLoop
from server.overview import overview, tables
from server.run_cli import _conclude, federated_metrics, weaknesses


@pytest.fixture
def run(tmp_path: Path, federation: Any) -> Path:
    """A run of four rounds that stands after two: one bank refused once, one sent nonsense twice, one was absent."""
    fed = federation(outer={"rounds": 4, "min_reports": 2})
    (tmp_path / "plan.json").write_text(fed.plan.to_json(), encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "flower_runs": [1]}), encoding="utf-8")
    records = [
        {
            "round": number, "cohort": 4, "admitted": ["A", "B"][: 3 - number],
            "refused": {"B": "budget"} if number == 2 else {},
            "rejected": {"C": "not-finite"}, "absent": ["D"], "quorum": number == 1, "seconds": 2.0 * number,
            "mean_update_norm": 0.5, "update_norms": {"A": 0.25 * number, "B": 0.75},
        }
        for number in (1, 2)
    ]  # fmt: skip
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return tmp_path


def shown(seen: Any) -> str:
    console = Console(width=160, record=True, file=Path("/dev/null").open("w", encoding="utf-8"))  # noqa: SIM115
    console.print(tables(seen))
    return console.export_text()


def test_each_bank_is_named_with_what_became_of_its_answers(run: Path) -> None:
    seen = overview(run, {"A": True, "B": True, "C": True, "D": False, "E": True}, RunStatus("running", "", ""))
    assert seen.state == "running"
    assert seen.banks["A"].admitted == 2
    assert seen.banks["A"].last_update_norm == 0.5
    assert (seen.banks["B"].admitted, seen.banks["B"].refused) == (1, {"budget": 1})
    assert seen.banks["C"].rejected == {"not-finite": 2}
    assert (seen.banks["D"].absent, seen.banks["D"].online) == (2, False)
    assert (seen.banks["E"].admitted, seen.banks["E"].online) == (0, True)
    text = shown(seen)
    for told in ("budget 1", "not-finite 2", "MISSED", "quorum 2", "running"):
        assert told in text, told


def test_time_left_is_that_of_the_last_rounds(run: Path) -> None:
    seen = overview(run, None)
    assert seen.seconds_left == pytest.approx(3.0 * 4)
    assert seen.round == 0  # The checkpoint says how far the run is, not the journal.


@pytest.mark.parametrize(
    ("status", "hub_down", "state"),
    [
        (None, False, "waiting"),
        (None, True, "unknown"),
        (RunStatus("pending", "", ""), False, "waiting"),
        (RunStatus("running", "", ""), False, "running"),
        (RunStatus("finished", "failed", "why"), False, "failed"),
        (RunStatus("finished", "stopped", ""), False, "stopped"),
    ],
)
def test_a_run_stands_as_the_hub_says(run: Path, status: RunStatus | None, state: str, *, hub_down: bool) -> None:
    seen = overview(run, None, status, hub_down=hub_down)
    assert seen.state == state
    assert ("why" in shown(seen)) == (seen.details == "why")


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({}, []),
        ({"aggregator": "trimmed_mean", "weighting": "equal", "min_reports": 9}, ["cuts none"]),
        ({"aggregator": "trimmed_mean", "weighting": "equal", "min_reports": 10}, []),
        ({"aggregator": "median", "weighting": "equal", "min_reports": 2}, ["withstands no liar"]),
        ({"aggregator": "median", "weighting": "equal", "min_reports": 3}, []),
    ],
)
def test_an_aggregator_that_protects_less_than_its_name_is_told(outer: dict[str, Any], said: list[str]) -> None:
    found = weaknesses(OuterLoop.model_validate(outer))
    assert len(found) == len(said)
    assert all(words in text for words, text in zip(said, found, strict=True))


def test_how_a_run_ended_is_told_with_the_way_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path("consortium")
    with pytest.raises(MetariskError, match=r"has failed: why; .* --resume .* --folder consortium"):
        _conclude(RunStatus("finished", "failed", "why"), run, home, as_json=False)
    _conclude(RunStatus("finished", "completed", ""), run, home, as_json=False)
    said = capsys.readouterr()
    assert "1 of 2 rounds missed the quorum" in said.err
    assert said.out.startswith(f"completed: {run.name}")


def test_a_run_that_learned_nothing_is_no_success(run: Path) -> None:
    path = run / "journal.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"quorum": true', '"quorum": false'), encoding="utf-8")
    with pytest.raises(MetariskError, match="all 2 rounds missed the quorum"):
        _conclude(RunStatus("finished", "completed", ""), run, Path("consortium"), as_json=True)


def test_what_the_banks_histograms_say_is_told(run: Path) -> None:
    path = run / "journal.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records[-1]["federated_metrics"] = {"auc": 0.731, "auc_noise_std": 0.004, "admitted": ["A", "B"]}
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (line,) = federated_metrics(overview(run, None))
    assert "0.731" in line
    assert "2 banks" in line

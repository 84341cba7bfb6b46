"""What Prometheus reads of the operator, over real HTTP: what the journals say, and not a word of epsilon."""

import os
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import server.metrics
from metarisk_common.errors import ConfigError
from server.config import Server, ServerConfig, ServerFolder
from server.journal import append_record, read_journal
from server.metrics import MAX_RUNS, MetricsServer, serve_metrics
from server.rounds import JOURNAL, run_rounds

Samples = dict[tuple[str, ...], float]


class Hub:
    """Says which banks are online, as the real one would."""

    def __init__(self) -> None:
        self.banks: Mapping[str, bool] | None = {"Bank A": True, "Bank B": False}

    def __call__(self) -> Mapping[str, bool] | None:
        if self.banks is not None and not self.banks:
            raise ConnectionError("bearer abcdefgh12345678")
        return self.banks


def scrape(running: MetricsServer, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}{path}", timeout=10) as answer:
        return str(answer.read(), "utf-8")


def samples(running: MetricsServer) -> Samples:
    """The value of each (name, its labels' values in the order of their names)."""
    return {
        (
            sample.name.removeprefix("metarisk_server_"),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(scrape(running))
        for sample in family.samples
    }


def record(number: int, **parts: Any) -> dict[str, Any]:
    whole = {
        "round": number, "cohort": 3, "admitted": ["A", "B", "C"], "refused": {}, "rejected": {}, "absent": [],
        "quorum": True, "mean_update_norm": 0.5, "seconds": 1.5, "run_id": "id",
    }  # fmt: skip
    return whole | parts


@pytest.fixture
def operator(tmp_path: Path) -> Server:
    (tmp_path / "runs").mkdir()
    return Server(ServerFolder(tmp_path), ServerConfig(name="Consortium"))


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def running(operator: Server, hub: Hub) -> Iterator[MetricsServer]:
    with serve_metrics(operator, hub, 0) as serving:
        yield serving


@pytest.fixture
def run(operator: Server, federation: Any) -> Path:
    return new_run(operator, federation, "first")


def new_run(operator: Server, federation: Any, name: str) -> Path:
    folder = operator.folder.runs / name
    folder.mkdir()
    (folder / "plan.json").write_text(federation(outer={"min_reports": 2}).plan.to_json())
    (folder / "run.json").write_text('{"run_id": "id"}')
    return folder


def test_a_run_of_real_rounds_is_told(running: MetricsServer, run: Path, federation: Any) -> None:
    played = federation(outer={"min_reports": 7})
    grid = played.grid(b1="refuses", b2="sends NaN", b3="fails", b4="answers garbage")
    grid.silent.add("Bank 5")
    run_rounds(played.start(), played.plan.model_copy(update={"outer": quick(played)}), grid, run)
    found = samples(running)
    assert (found["round", "first"], found["rounds", "first"]) == (2, 4)
    assert found["quorum_missed_total", "first"] == 2
    # Labels in the order of their names: the outcome or code, then the run.
    for outcome, count in {"admitted": 6, "refused": 2, "rejected": 6, "absent": 2}.items():
        assert found["reports_total", outcome, "first"] == count
    assert found["refusals_total", "budget", "first"] == 2
    for code in ("not-finite", "flower-error-2", "protocol"):
        assert found["rejections_total", code, "first"] == 2
    last = read_journal(run / JOURNAL)[-1]
    assert found["round_seconds", "first"] == last["seconds"]
    assert found["update_norm_mean", "first"] == last["mean_update_norm"]


def quick(played: Any) -> Any:
    return played.plan.outer.model_copy(update={"rounds": 2, "deadline_seconds": 0.3})


def test_a_run_before_its_first_round(running: MetricsServer, run: Path) -> None:
    found = samples(running)
    assert (found["round", "first"], found["journal_ok", "first"], found["rounds", "first"]) == (0, 1, 4)
    assert ("round_seconds", "first") not in found
    assert ("update_norm_mean", "first") not in found


def test_each_scrape_tells_what_was_written_since(running: MetricsServer, run: Path) -> None:
    for number in (1, 2, 3):
        append_record(run / JOURNAL, record(number, seconds=number / 2, mean_update_norm=None if number == 3 else 0.5))
        found = samples(running)
        assert (found["round", "first"], found["round_seconds", "first"]) == (number, number / 2)
    assert ("update_norm_mean", "first") not in found
    assert found["reports_total", "admitted", "first"] == 9


def test_a_journal_is_parsed_once_while_it_stays(
    running: MetricsServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def reading(path: Path) -> list[dict[str, Any]]:
        parsed.append(path)
        return read_journal(path)

    monkeypatch.setattr(server.metrics, "read_journal", reading)
    append_record(run / JOURNAL, record(1))
    for _ in range(3):
        samples(running)
    append_record(run / JOURNAL, record(2))
    assert samples(running)["round", "first"] == 2
    assert len(parsed) == 2


@pytest.mark.parametrize("tail", [b'{"round": 2, "adm', b"\0\0\0", b"\xff\xfe", b"{"])
def test_a_half_written_line_is_left_out(running: MetricsServer, run: Path, tail: bytes) -> None:
    append_record(run / JOURNAL, record(1))
    with (run / JOURNAL).open("ab") as stream:
        stream.write(tail)
    found = samples(running)
    assert (found["journal_ok", "first"], found["round", "first"]) == (1, 1)


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"[]", b"{}", b'{"round": null}', b'{"round": 1, "refused": 3}', b"\xff", b"1" * 5000],
)
def test_a_damaged_journal_does_not_break_the_scrape(
    running: MetricsServer, run: Path, operator: Server, federation: Any, line: bytes
) -> None:
    append_record(run / JOURNAL, record(1))
    append_record(new_run(operator, federation, "second") / JOURNAL, record(5))
    (run / JOURNAL).write_bytes(line + b"\n" + (run / JOURNAL).read_bytes())
    found = samples(running)
    assert (found["journal_ok", "first"], found["journal_ok", "second"], found["round", "second"]) == (0, 1, 5)
    assert ("round", "first") not in found
    (run / JOURNAL).unlink()
    append_record(run / JOURNAL, record(1))
    assert samples(running)["round", "first"] == 1


def test_what_is_no_run_or_has_no_plan_yet_breaks_nothing(running: MetricsServer, run: Path, operator: Server) -> None:
    (operator.folder.runs / "notes.txt").write_text("x")
    (operator.folder.runs / "empty").mkdir()
    (run / "plan.json").write_text("{")
    append_record(run / JOURNAL, record(1))
    found = samples(running)
    assert found["round", "first"] == 1
    assert ("rounds", "first") not in found
    assert {key[1] for key in found if key[0] == "journal_ok"} == {"first"}
    shutil.rmtree(operator.folder.runs)
    assert samples(running)["bank_online", "Bank A"] == 1


def test_only_the_newest_runs_are_told(running: MetricsServer, operator: Server, federation: Any) -> None:
    for number in range(MAX_RUNS + 5):
        folder = new_run(operator, federation, f"run-{number:02}")
        append_record(folder / JOURNAL, record(1))
        # The earlier the name, the later at work.
        os.utime(folder / JOURNAL, (1_700_000_000 - number, 1_700_000_000 - number))
    told = {key[1] for key in samples(running) if key[0] == "round"}
    assert told == {f"run-{number:02}" for number in range(MAX_RUNS)}


def test_a_name_that_cannot_be_sent_breaks_nothing(running: MetricsServer, run: Path) -> None:
    append_record(run / JOURNAL, record(1))
    run.rename(run.with_name('a"b\n' + os.fsdecode(b"\xff")))
    assert samples(running)["round", 'a"b\n?'] == 1


def test_no_number_of_a_banks_message_makes_labels(running: MetricsServer, run: Path) -> None:
    for number, code in enumerate(["flower-error-123456789", "income 40211", "norm", "", "UPPER", "a" * 100, 7], 1):
        append_record(run / JOURNAL, record(number, rejected={"A": code}))
    found = samples(running)
    assert {key[1]: value for key, value in found.items() if key[0] == "rejections_total"} == {"other": 6, "norm": 1}


def test_banks_are_told_and_a_hub_that_is_down_hides_nothing(
    running: MetricsServer, run: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    found = samples(running)
    assert (found["bank_online", "Bank A"], found["bank_online", "Bank B"], found["hub_reachable",]) == (1, 0, 1)
    states: tuple[dict[str, bool] | None, ...] = (None, {})  # does not answer; fails
    for state in states:
        hub.banks = state
        for _ in range(2):
            found = samples(running)
            assert (found["hub_reachable",], found["journal_ok", "first"]) == (0, 1)
            assert not [key for key in found if key[0] == "bank_online"]
    assert caplog.text.count("cannot be asked") == 1
    hub.banks = {"Bank A": True}
    assert samples(running)["hub_reachable",] == 1


def test_the_operator_has_no_metric_of_epsilon(running: MetricsServer, run: Path, federation: Any) -> None:
    played = federation(outer={"rounds": 4}, metrics={"every": 1, "bins": 4, "noise_multiplier": 3.0})
    run_rounds(played.start(), played.plan, played.grid(), run)
    (run / "plan.json").write_text(played.plan.to_json())
    extra = {"epsilon": 2.71828, "epsilon_spent": {"A": 2.71828}, "budget": 2.71828}
    append_record(run / JOURNAL, record(5, **extra))
    text = scrape(running)
    assert samples(running)["round", "first"] == 5
    assert "2.71828" not in text
    names = " ".join(line for line in text.splitlines() if "metarisk" in line).lower()
    assert not [word for word in ("epsilon", "delta", "budget", "privacy", "noise", "spent") if word in names]


def test_nothing_else_than_loopback_is_bound(running: MetricsServer) -> None:
    assert running._server.socket.getsockname() == ("127.0.0.1", running.port)
    for family, address in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as other, pytest.raises(OSError):
            other.connect((address, running.port))


def test_only_metrics_are_served(running: MetricsServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        scrape(running, "/server.toml")
    assert refused.value.code == 404
    refused.value.close()


def test_scrapes_at_the_same_time_all_get_their_answer(running: MetricsServer, run: Path) -> None:
    append_record(run / JOURNAL, record(1))
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(samples(running)["round", "first"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


def test_a_caller_that_says_nothing_holds_up_nobody(running: MetricsServer, run: Path) -> None:
    with socket.create_connection(("127.0.0.1", running.port)):
        assert samples(running)["journal_ok", "first"] == 1


def test_a_port_in_use_is_said_with_the_way_out(running: MetricsServer, operator: Server, hub: Hub) -> None:
    with pytest.raises(
        ConfigError, match=r"server\.toml: key 'metrics\.port': port \d+ .*another process has it; choose"
    ):
        serve_metrics(operator, hub, running.port)

"""What a bank counts and what Prometheus reads of it, over real HTTP: right numbers, and nothing of a record."""

import json
import logging
import math
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from prometheus_client.parser import text_string_to_metric_families

import client.ledger
import metarisk_common.privacy
from client.approval import approve
from client.bank import Bank
from client.counters import STATUS_FILE, Counters, count_answer, read_counters
from client.ledger import Ledger
from client.metrics import MetricsServer, serve_metrics
from client.signing import head_path
from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import REFUSAL_CODES, TrainOrder

Samples = dict[tuple[str, tuple[str, ...]], float]
NOW = 1_700_000_000.0


def scrape(server: MetricsServer, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as answer:
        return str(answer.read(), "utf-8")


def samples(server: MetricsServer) -> Samples:
    """The value of each (name, its labels' values)."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(scrape(server))
        for sample in family.samples
    }


def own(found: Samples, name: str) -> float:
    return found[f"metarisk_client_{name}", ()]


@pytest.fixture
def folder(tmp_path: Path, make_bank: Callable[..., Path], plan: Plan, make_loans: Callable[..., pl.DataFrame]) -> Path:
    return make_bank(tmp_path / "bank", plan, make_loans(lenders=1))


@pytest.fixture
def server(folder: Path) -> Iterator[MetricsServer]:
    with serve_metrics(folder, 0) as running:
        yield running


@pytest.fixture
def order(plan: Plan) -> TrainOrder:
    return TrainOrder("run", 1, plan.hash(), initial_params(plan, Encoder(plan.data).width))


# Counters.


def test_answers_are_counted(tmp_path: Path) -> None:
    assert read_counters(tmp_path) == Counters()
    count_answer(tmp_path, kind="report", run_id="run", round=3, seconds=0.5, now=NOW)
    count_answer(tmp_path, kind="report", run_id="run", round=4, seconds=0.7, now=NOW + 1)
    count_answer(tmp_path, kind="refusal", code="budget", run_id="run", round=5, seconds=0.1, now=NOW + 2)
    count_answer(tmp_path, kind="refusal", code="budget", run_id="run", round=6, seconds=0.2, now=NOW + 3)
    told = count_answer(tmp_path, kind="error", run_id="other", round=1, seconds=0.25, now=NOW + 4)
    assert told == Counters(2, {"budget": 2}, 1, "other", 1, 0.25, NOW + 4)
    told = count_answer(tmp_path, kind="bundle", now=NOW + 5)
    assert told == Counters(2, {"budget": 2}, 1, "other", 1, 0.25, NOW + 4, bundles_refused=1)
    assert read_counters(tmp_path) == told


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"answered": -1}', b'{"answered": "2"}', b'{"refused": {"plan": 1.5}}',
     b'{"last_answer_time": NaN}', b'{"last_answer_seconds": -1}'],
)  # fmt: skip
def test_a_damaged_file_counts_from_zero(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATUS_FILE).write_bytes(content)
    assert read_counters(tmp_path) == Counters()
    assert count_answer(tmp_path, kind="report", now=NOW).answered == 1
    assert read_counters(tmp_path).answered == 1


def test_a_text_is_no_code_and_a_name_has_an_end(tmp_path: Path) -> None:
    counters = count_answer(tmp_path, kind="refusal", code="income 40211", run_id="x" * 10_000, now=NOW)
    assert counters.refused == {"other": 1}
    assert len(counters.last_run) == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_stops_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count_answer(tmp_path, kind="report", now=NOW)
    (tmp_path / f".{STATUS_FILE}.new").symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        assert count_answer(tmp_path, kind="report", now=NOW).answered == 2
    assert "No space left on device" in caplog.text
    assert read_counters(tmp_path).answered == 1


# What Prometheus reads.


def test_a_bank_that_has_not_answered_yet(server: MetricsServer) -> None:
    found = samples(server)
    assert (own(found, "ledger_ok"), own(found, "epsilon_spent"), own(found, "epsilon_budget")) == (1, 0, 4)
    assert own(found, "ledger_entries") == 2  # created, approved
    for outcome in ("report", "refusal", "error"):
        assert found["metarisk_client_orders_total", (outcome,)] == 0
    for code in REFUSAL_CODES:
        assert found["metarisk_client_refusals_total", (code,)] == 0
    assert ("metarisk_client_last_answer_seconds", ()) not in found
    assert [key for key, value in found.items() if key[0] == "metarisk_client_up" and value == 1]


def test_what_is_spent_is_what_the_ledger_says(server: MetricsServer, folder: Path, order: TrainOrder) -> None:
    bank = Bank(folder, simulation=True)
    try:
        for number in (1, 2):
            bank.release(replace(order, round=number))
            found = samples(server)  # while the bank has the ledger open
            assert own(found, "epsilon_spent") == bank.ledger.spent() > 0
            assert own(found, "ledger_entries") == bank.ledger.counter
    finally:
        bank.close()
    assert own(samples(server), "epsilon_spent") == own(found, "epsilon_spent")


def test_counters_are_told(server: MetricsServer, folder: Path) -> None:
    count_answer(folder, kind="report", run_id="run", round=3, seconds=0.5, now=NOW)
    count_answer(folder, kind="refusal", code="plan", run_id="run", round=4, seconds=0.25, now=NOW + 1)
    count_answer(folder, kind="bundle", now=NOW + 2)
    found = samples(server)
    assert found["metarisk_client_orders_total", ("report",)] == 1
    assert found["metarisk_client_orders_total", ("refusal",)] == 1
    assert found["metarisk_client_refusals_total", ("plan",)] == 1
    assert own(found, "bundles_refused_total") == 1
    assert (own(found, "last_answer_seconds"), own(found, "last_answer_timestamp_seconds")) == (0.25, NOW + 1)


def test_labels_are_constants_whatever_the_file_says(server: MetricsServer, folder: Path) -> None:
    content = {"refused": {"Ms Vantongeren": 2, "plan": 1}, "last_run": "Ms Vantongeren", "last_answer_time": NOW}
    (folder / STATUS_FILE).write_text(json.dumps(content))
    assert "Vantongeren" not in scrape(server)
    assert samples(server)["metarisk_client_refusals_total", ("other",)] == 2


def test_an_unlimited_budget_is_infinite(
    tmp_path: Path, make_bank: Callable[..., Path], plan: Plan, make_loans: Callable[..., pl.DataFrame]
) -> None:
    folder = make_bank(tmp_path / "bank", plan, make_loans(lenders=1), epsilon=math.inf)
    with serve_metrics(folder, 0) as server:
        assert own(samples(server), "epsilon_budget") == math.inf


def test_a_folder_without_a_ledger_has_spent_nothing(folder: Path) -> None:
    for path in folder.glob("ledger*"):
        path.unlink()
    with serve_metrics(folder, 0) as server:
        found = samples(server)
        assert (own(found, "ledger_ok"), own(found, "ledger_entries"), own(found, "epsilon_budget")) == (1, 0, 4)


def damage(folder: Path) -> None:
    (folder / "ledger.sqlite").write_bytes(b"garbage" * 1000)


def empty(folder: Path) -> None:
    (folder / "ledger.sqlite").write_bytes(b"")


def remove(folder: Path) -> None:
    assert head_path(folder / "ledger.sqlite").exists()
    (folder / "ledger.sqlite").unlink()


def misspell(folder: Path) -> None:
    (folder / "institution.toml").write_text("nme = 1")


@pytest.mark.parametrize("harm", [damage, empty, remove, misspell])
@pytest.mark.parametrize("scraped_before", [False, True])
def test_a_damaged_ledger_does_not_break_the_scrape(
    server: MetricsServer, folder: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture, *,
    scraped_before: bool,
) -> None:  # fmt: skip
    kept = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if scraped_before:
        assert own(samples(server), "ledger_ok") == 1
    count_answer(folder, kind="report", now=NOW)
    harm(folder)
    for _ in range(3):
        found = samples(server)
        assert own(found, "ledger_ok") == 0
        assert ("metarisk_client_epsilon_spent", ()) not in found  # a zero would be a lie
        assert found["metarisk_client_orders_total", ("report",)] == 1
    assert caplog.text.count("the ledger cannot be read") == 1
    for path, content in kept.items():
        path.write_bytes(content)
    assert own(samples(server), "ledger_ok") == 1


def test_a_scrape_is_cheap(
    server: MetricsServer, folder: Path, plan: Plan, order: TrainOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, accounted = [], []
    read, epsilon = Ledger.read, metarisk_common.privacy.epsilon

    def reading(path: Path) -> Ledger:
        opened.append(path)
        return read(path)

    def accounting(events: Sequence[PrivacyEvent], delta: float) -> float:
        accounted.append(delta)
        return epsilon(events, delta)

    monkeypatch.setattr(Ledger, "read", reading)
    monkeypatch.setattr(client.ledger, "epsilon", accounting)
    bank = Bank(folder, simulation=True)
    try:
        bank.release(order)
    finally:
        bank.close()
    accounted.clear()
    before = [samples(server), samples(server), samples(server)]
    assert (len(opened), len(accounted)) == (1, 1)
    approve(folder, plan, epsilon=2.0)  # An entry that charges nothing.
    accounted.clear()
    after = samples(server)
    assert (len(opened), len(accounted)) == (2, 0)
    assert own(after, "ledger_entries") == own(before[0], "ledger_entries") + 1
    assert own(after, "epsilon_spent") == own(before[0], "epsilon_spent") > 0


def test_reading_leaves_the_ledger_as_it_was(server: MetricsServer, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("ledger*") if not path.name.endswith("-shm")}
    samples(server)
    after = {path.name: path.read_bytes() for path in folder.glob("ledger*") if not path.name.endswith("-shm")}
    assert {name: content for name, content in after.items() if content or name in before} == before


def test_nothing_else_than_loopback_is_bound(server: MetricsServer) -> None:
    assert server._server.socket.getsockname() == ("127.0.0.1", server.port)
    for family, address in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as other, pytest.raises(OSError):
            other.connect((address, server.port))


def test_only_metrics_are_served_and_only_read(server: MetricsServer) -> None:
    for path in ("/", "/status.json", "/metrics/../status.json"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            scrape(server, path)
        assert refused.value.code == 404
        refused.value.close()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)  # noqa: S310 - of this test's own server
    assert refused.value.code == 405
    refused.value.close()


def test_a_port_in_use_is_said_with_the_way_out(server: MetricsServer, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"institution\.toml: key 'metrics\.port': port \d+ .* another process has it"
    ):
        serve_metrics(folder, server.port)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every port")
def test_a_port_that_is_not_for_this_user_is_said(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Permission denied"):
        serve_metrics(folder, 1)


def test_a_closed_server_frees_its_port(folder: Path) -> None:
    with serve_metrics(folder, 0) as server:
        port = server.port
    with serve_metrics(folder, port) as again:
        assert own(samples(again), "ledger_ok") == 1

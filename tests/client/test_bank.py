"""A bank's contract: judge, reserve on disk, only then read; store, only then reply; and say nothing else."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

import client.bank
from client.bank import Bank
from client.config import Institution
from client.dataset import Dataset, load_source
from client.ledger import Ledger, OrderKey
from client.training import meta_update
from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.schema import Schema
from metarisk_common.wire import (
    REPORT_FIELDS,
    Refusal,
    TrainOrder,
    TrainReport,
    decode_reply,
    encode_order,
    report_to_bytes,
)

MakeBank = Callable[..., Path]


@pytest.fixture
def own(make_loans: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    """One bank's records."""
    return make_loans(lenders=1)


@pytest.fixture
def folder(tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame) -> Path:
    return make_bank(tmp_path / "bank", plan, own)


@pytest.fixture
def bank(folder: Path) -> Iterator[Bank]:
    opened = Bank(folder, simulation=True)
    yield opened
    opened.close()


@pytest.fixture
def order(plan: Plan) -> TrainOrder:
    return TrainOrder("run", 1, plan.hash(), initial_params(plan, Encoder(plan.data).width))


def test_the_reservation_is_on_disk_before_the_table_is_read(
    bank: Bank, folder: Path, order: TrainOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def look(institution: Institution, schema: Schema, *, drop_unfit: bool) -> Dataset:
        seen.append(kinds(folder))
        return load_source(institution, schema, drop_unfit=drop_unfit)

    monkeypatch.setattr(client.bank, "load_source", look)
    report(bank, order)
    assert seen == [["create", "approve", "reserve"]]
    assert kinds(folder) == ["create", "approve", "reserve", "release"]


def test_the_report_is_stored_before_it_is_sent(bank: Bank, order: TrainOrder) -> None:
    sent = report(bank, order)
    stored = bank.ledger.released_report(OrderKey("run", 1, order.plan_hash, order.digest()))
    assert stored == report_to_bytes(sent)
    reserved, released = bank.ledger.entries()[2:]
    assert (sent.receipt, sent.counter) == (reserved.digest, reserved.seq)
    assert released.content["reserved"] == reserved.seq


def test_the_same_order_again_gives_the_same_report_and_costs_nothing(
    bank: Bank, folder: Path, order: TrainOrder
) -> None:
    first, spent = report(bank, order), bank.ledger.spent()
    assert report_to_bytes(report(bank, order)) == report_to_bytes(first)
    assert bank.ledger.spent() == spent
    bank.close()
    reopened = Bank(folder, simulation=True)
    assert report_to_bytes(report(reopened, order)) == report_to_bytes(first)
    assert kinds(folder) == ["create", "approve", "reserve", "release"]
    reopened.close()


def test_a_second_order_for_a_round_is_a_conflict(bank: Bank, folder: Path, order: TrainOrder) -> None:
    report(bank, order)
    other = replace(order, meta_params={name: value + 1 for name, value in order.meta_params.items()})
    assert refusal(bank, other).code == "conflict"
    assert kinds(folder) == ["create", "approve", "reserve", "release"]


def test_an_old_rounds_report_is_not_sent_again_once_a_newer_one_was(bank: Bank, order: TrainOrder) -> None:
    report(bank, order)
    report(bank, replace(order, round=2))
    assert refusal(bank, order).code == "replayed"


def test_a_crash_between_reserve_and_release_is_taken_up_under_the_same_reservation(
    bank: Bank, folder: Path, order: TrainOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(client.bank, "meta_update", _fail)
        assert refusal(bank, order).code == "error"
    assert kinds(folder) == ["create", "approve", "reserve"]
    spent = bank.ledger.spent()
    assert report(bank, order).counter == 2
    assert (kinds(folder), bank.ledger.spent()) == (["create", "approve", "reserve", "release"], spent)


def test_of_two_processes_under_one_reservation_the_one_that_is_overtaken_sends_the_others_report(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = make_bank(tmp_path / "twice", plan, own, seed=None)
    slow, fast, sent = Bank(folder), Bank(folder), []

    def overtaken(*arguments: Any, **public: Any) -> Params:
        monkeypatch.setattr(client.bank, "meta_update", meta_update)
        sent.append(report(fast, order))
        return meta_update(*arguments, **public)

    monkeypatch.setattr(client.bank, "meta_update", overtaken)
    assert report_to_bytes(report(slow, order)) == report_to_bytes(sent[0])
    assert kinds(folder) == ["create", "approve", "reserve", "release"]
    slow.close()
    fast.close()


def test_a_plan_that_is_not_approved_is_refused_unread(bank: Bank, folder: Path, order: TrainOrder) -> None:
    assert refusal(bank, replace(order, plan_hash="0" * 64)).code == "plan"
    for path in ("../approved/" + order.plan_hash, "..", "", "\u00e9" * 200):
        assert refusal(bank, replace(order, plan_hash=path)).code == "plan"
    assert kinds(folder) == ["create", "approve"]


@pytest.mark.parametrize("change", ["rounds", "syntax", "missing", "bytes"])
def test_an_approved_plan_that_was_changed_is_approved_no_more(
    bank: Bank, folder: Path, order: TrainOrder, plan: Plan, change: str
) -> None:
    path = folder / "approved" / f"{order.plan_hash}.json"
    values = json.loads(plan.to_json())
    values["outer"]["rounds"] += 1
    content = {
        "rounds": json.dumps(values).encode(), "syntax": b"{", "missing": b"{}", "bytes": b"\xff\xfe",
    }[change]  # fmt: skip
    path.write_bytes(content)
    assert refusal(bank, order).code == "plan"
    assert kinds(folder) == ["create", "approve"]


def test_an_order_past_the_budget_is_refused_and_spends_nothing(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder
) -> None:
    bank = Bank(make_bank(tmp_path / "bank", plan, own, epsilon=2.0), simulation=True)
    answers = [decode_reply(bank.answer(encode_order(replace(order, round=n)))) for n in range(1, 13)]
    done = sum(isinstance(answer, TrainReport) for answer in answers)
    assert 0 < done < 12
    assert [answer.code for answer in answers[done:] if isinstance(answer, Refusal)] == ["budget"] * (12 - done)
    assert bank.ledger.spent() <= 2.0
    assert len(bank.ledger.events()) == done
    bank.close()


def test_another_run_of_the_plan_spends_of_the_same_budget(bank: Bank, order: TrainOrder) -> None:
    for number in range(1, 13):
        report(bank, replace(order, round=number))
    assert 0.999 * 4.0 <= bank.ledger.spent() <= 4.0
    assert refusal(bank, replace(order, run_id="another")).code == "budget"


CANARY = "4242424242.4242"


def test_a_broken_table_is_a_constant_error_charged_once(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = make_bank(tmp_path / "bank", plan, own.drop("purpose"))
    bank = Bank(folder, simulation=True)
    with caplog.at_level(logging.DEBUG):
        reply = bank.answer(encode_order(order))
    assert decode_reply(reply) == Refusal("run", 1, plan.hash(), "Lender A", "error")
    assert kinds(folder) == ["create", "approve", "reserve", "abandon"]
    assert bank.ledger.spent() > 0
    assert "purpose" in caplog.text
    assert refusal(bank, order).code == "replayed"
    bank.close()


@pytest.mark.parametrize(("column", "value"), [("outcome", CANARY), ("age", f"x{CANARY}"), ("income", "inf")])
def test_whether_a_record_fits_decides_nothing_that_leaves(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder,
    caplog: pytest.LogCaptureFixture, column: str, value: str,
) -> None:  # fmt: skip
    others = pl.int_range(pl.len()) != 3
    cell = pl.when(others).then(pl.col(column).cast(pl.String)).otherwise(pl.lit(value))
    found = []
    for name, frame in (("broken", own.with_columns(cell.alias(column))), ("without", own.filter(others))):
        folder = make_bank(tmp_path / name, plan, frame)
        bank = Bank(folder, simulation=True)
        with caplog.at_level(logging.DEBUG):
            found.append(replace(report(bank, order), receipt=""))
        assert kinds(folder) == ["create", "approve", "reserve", "release"]
        bank.close()
    broken, without = found
    assert replace(broken, update={}) == replace(without, update={})
    assert all(np.array_equal(broken.update[name], value) for name, value in without.update.items())
    # The bank itself is told, in its own log and without the value.
    assert "1 of 220 records" in caplog.text
    assert CANARY not in caplog.text


def test_an_error_of_the_program_leaves_as_a_constant_too(
    bank: Bank, order: TrainOrder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client.bank, "meta_update", _fail)
    with caplog.at_level(logging.DEBUG):
        reply = bank.answer(encode_order(order))
    assert decode_reply(reply) == Refusal("run", 1, order.plan_hash, "Lender A", "error")
    assert CANARY not in caplog.text + repr(reply)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"head": ConfigRecord({"protocol": 2}), "arrays": ArrayRecord()}),
        RecordDict({"head": ConfigRecord({"protocol": 1, "kind": "order"}), "arrays": ArrayRecord()}),
    ],
)
def test_what_is_no_order_is_refused(bank: Bank, folder: Path, content: RecordDict) -> None:
    assert decode_reply(bank.answer(content)) == Refusal("", 0, "", "Lender A", "protocol")
    assert kinds(folder) == ["create", "approve"]


def test_a_changed_ledger_stops_the_bank(bank: Bank, folder: Path, order: TrainOrder) -> None:
    report(bank, order)
    data = bytearray((folder / "ledger.sqlite").read_bytes())
    bank.close()
    (folder / "ledger.sqlite").write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=r"ledger\.sqlite"):
        Bank(folder, simulation=True)


def test_a_folder_without_its_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"institution\.toml"):
        Bank(tmp_path, simulation=True)


def test_a_report_holds_the_published_fields_and_the_update_and_nothing_else(bank: Bank, order: TrainOrder) -> None:
    reply = bank.answer(encode_order(order))
    assert set(reply) == {"head", "arrays"}
    assert set(reply.config_records["head"]) == REPORT_FIELDS
    arrays = reply.array_records["arrays"]
    assert {name: array.numpy().shape for name, array in arrays.items()} == {
        name: value.shape for name, value in order.meta_params.items()
    }


def test_one_record_more_or_less_shows_in_the_noised_array_alone(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder
) -> None:
    found = []
    for name, frame in (("n", own), ("n+1", pl.concat([own, own.head(1)]))):
        bank = Bank(make_bank(tmp_path / name, plan, frame), simulation=True)
        found.append(report(bank, order))
        bank.close()
    few, more = found
    # A receipt is a digest over salt: it differs between any two ledgers.
    assert replace(few, update={}, receipt="") == replace(more, update={}, receipt="")
    assert any(not np.array_equal(few.update[name], more.update[name]) for name in few.update)
    assert {name: value.nbytes for name, value in few.update.items()} == {
        name: value.nbytes for name, value in more.update.items()
    }


def report(bank: Bank, order: TrainOrder) -> TrainReport:
    reply = decode_reply(bank.answer(encode_order(order)))
    assert isinstance(reply, TrainReport), reply
    return reply


def refusal(bank: Bank, order: TrainOrder) -> Refusal:
    reply = decode_reply(bank.answer(encode_order(order)))
    assert isinstance(reply, Refusal), reply
    return reply


def kinds(folder: Path) -> list[str]:
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        return [entry.kind for entry in ledger.entries()]


def _fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError(CANARY)

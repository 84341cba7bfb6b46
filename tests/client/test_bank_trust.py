"""What a bank answers to, besides the order: its approvals, its ledger's age, and who may seed its noise."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from client.app import FOLDER_KEY, SIMULATION_KEY, app
from client.approval import approve, revoke
from client.bank import Bank
from client.ledger import Ledger
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.features import Encoder
from metarisk_common.flower_compat import identify_process
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan, ScoreHistograms
from metarisk_common.wire import (
    EvaluateOrder,
    EvaluateReport,
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


def test_outside_simulations_a_seed_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"institution\.toml.*'simulation' seeds the noise"):
        Bank(folder)


@pytest.mark.parametrize("said", [{}, {SIMULATION_KEY: "no"}, {SIMULATION_KEY: True}])
def test_a_node_is_of_a_simulation_only_where_its_own_configuration_says_so(
    folder: Path, order: TrainOrder, said: dict[str, str | bool], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MetariskError, match="cannot answer"):
        ask_app(folder, order, **said)
    assert "seeds the noise" in caplog.text


@pytest.mark.parametrize("broken", ["institution.toml", "ledger.sqlite", "ledger.head", "ledger.key", "all of it"])
def test_why_a_bank_cannot_be_opened_stays_in_its_own_log(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder, broken: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = make_bank(tmp_path / "production", plan, own, seed=None)
    if broken == "all of it":
        folder = folder.with_name("nowhere")
    else:
        (folder / broken).write_bytes(b"epsilon = 3 of customer 4711")
    with pytest.raises(MetariskError) as raised:
        ask_app(folder, order)
    # Flower sends the exception's class and text to the server, whatever they are.
    assert (type(raised.value), str(raised.value)) == (MetariskError, "the bank cannot answer")
    assert raised.value.__suppress_context__
    assert str(folder) in caplog.text
    assert "4711" not in caplog.text


def test_a_plan_is_answered_while_it_is_approved_and_no_longer(bank: Bank, folder: Path, order: TrainOrder) -> None:
    report(bank, order)
    revoke(folder, order.plan_hash)
    assert refusal(bank, replace(order, round=2)).code == "plan"
    assert refusal(bank, order).code == "plan", "not even what left before is sent again"
    spent = bank.ledger.spent()
    approve(folder, bank.institution.approved_plan(order.plan_hash), epsilon=spent * 1.01)
    assert refusal(bank, replace(order, round=2)).code == "budget"
    approve(folder, bank.institution.approved_plan(order.plan_hash), until_seconds=1.0)
    assert refusal(bank, replace(order, round=2)).code == "plan"
    approve(folder, bank.institution.approved_plan(order.plan_hash))
    report(bank, replace(order, round=2))


def test_a_ledger_that_was_put_back_is_found_out_by_what_the_server_heard(
    bank: Bank, folder: Path, order: TrainOrder
) -> None:
    bank.close()
    old = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    first = Bank(folder, simulation=True)
    heard = report(first, order)
    first.close()
    for path in folder.iterdir():
        if path.is_file() and path not in old:
            path.unlink()
    for path, data in old.items():
        path.write_bytes(data)
    restored = Bank(folder, simulation=True)
    echoing = replace(order, round=2, ledger_counter=heard.counter, ledger_receipt=heard.receipt)
    assert refusal(restored, echoing).code == "integrity"
    assert kinds(folder) == ["create", "approve"]
    # Nor does it help to go on with the old copy and some other order first.
    report(restored, replace(order, run_id="another"))
    assert refusal(restored, echoing).code == "integrity"
    restored.close()


def test_score_histograms_are_charged_and_given_once(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder
) -> None:
    asking = plan.model_copy(update={"metrics": ScoreHistograms(bins=8, noise_multiplier=20.0)})
    bank = Bank(make_bank(tmp_path / "bank", asking, own, epsilon=8.0), simulation=True)
    question = EvaluateOrder("run", 12, asking.hash(), order.meta_params)
    train = replace(order, plan_hash=asking.hash(), round=12)
    update, answer = report(bank, train), report(bank, question)
    assert isinstance(answer, EvaluateReport)
    assert {name: value.shape for name, value in answer.update.items()} == {"positives": (8,), "negatives": (8,)}
    assert [event.mechanism for event in bank.ledger.events()] == ["poisson_gaussian", "gaussian_histograms"]
    assert report_to_bytes(report(bank, question)) == report_to_bytes(answer)
    assert report_to_bytes(report(bank, train)) == report_to_bytes(update)
    assert len(bank.ledger.events()) == 2
    assert refusal(bank, replace(question, round=11)).code == "round"
    bank.close()


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


def test_folders_of_two_consortia_spend_of_one_ledger(
    tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame, order: TrainOrder
) -> None:
    folders = [make_bank(tmp_path / name, plan, own, epsilon=3.0) for name in ("first", "second")]
    for folder in folders:
        config = folder / "institution.toml"
        text = config.read_text(encoding="utf-8")
        config.write_text(f'source = "the loans"\nledger = "../loans.sqlite"\n{text}', encoding="utf-8")
        approve(folder, plan)
    banks = [Bank(folder, simulation=True) for folder in folders]
    done = 0
    for number in range(1, 13):
        for bank, run in zip(banks, ("one", "other"), strict=True):
            reply = decode_reply(bank.answer(encode_order(replace(order, run_id=run, round=number))))
            assert isinstance(reply, TrainReport) or reply.code == "budget"
            done += isinstance(reply, TrainReport)
    assert [len(bank.ledger.events()) for bank in banks] == [done, done]
    assert 0 < done < 12
    assert banks[0].ledger.spent() == banks[1].ledger.spent() <= 3.0
    for bank in banks:
        bank.close()


def ask_app(folder: Path, order: TrainOrder, **said: str | bool) -> Message:
    """Ask the production app as Flower does; `said` stands in its node's configuration."""
    identify_process(1, 1)
    message = Message(encode_order(order), 2, MessageType.TRAIN, ttl=60.0)
    return app(message, Context(1, 2, {FOLDER_KEY: str(folder), **said}, RecordDict(), {}))

"""Every byte of a reply, for neighbouring data sets: only the noised array may tell them apart."""

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from flwr.app import ArrayRecord, Message, MessageType, RecordDict

import client.training
from client.bank import Bank
from client.dpsgd import private_gradients
from client.rng import SecureRandom
from metarisk_common.features import Encoder
from metarisk_common.flower_compat import identify_process, message_to_bytes
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan, ScoreHistograms
from metarisk_common.wire import EvaluateOrder, TrainOrder, decode_reply, encode_order

Change = Callable[[pl.DataFrame], pl.DataFrame]


def _cell(frame: pl.DataFrame, column: str, value: Any) -> pl.DataFrame:
    others = pl.int_range(pl.len()) != 7
    return frame.with_columns(pl.when(others).then(pl.col(column)).otherwise(pl.lit(value)).alias(column))


NEIGHBOURS: dict[str, Change] = {
    "one record less": lambda frame: pl.concat([frame[:7], frame[8:]]),
    "one record more": lambda frame: pl.concat([frame, frame[7:8]]),
    "another outcome": lambda frame: _cell(frame, "outcome", "bad" if frame["outcome"][7] == "good" else "good"),
    "a missing value": lambda frame: _cell(frame, "income", None),
    "not a number": lambda frame: _cell(frame, "income", float("nan")),
    "infinite": lambda frame: _cell(frame, "income", float("inf")),
    "an outcome that is none": lambda frame: _cell(frame, "outcome", "maybe"),
    "an unknown category": lambda frame: _cell(frame, "purpose", "yacht"),
    "one outcome only": lambda frame: frame.with_columns(pl.lit("good").alias("outcome")),
    "no record at all": lambda frame: frame.head(0),
}


@pytest.fixture
def asking(plan: Plan) -> Plan:
    sampled = plan.mechanism.model_copy(update={"sample_rate": 0.5})
    return plan.model_copy(update={"metrics": ScoreHistograms(noise_multiplier=30.0, every=1), "mechanism": sampled})


@pytest.fixture
def reply_of(
    tmp_path: Path, make_bank: Callable[..., Path], asking: Plan, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., RecordDict]]:
    """A bank's reply with all that chance and the clock put into it held still: salts, keys and times."""
    monkeypatch.setattr(secrets, "token_hex", lambda count=None: "5a" * (count or 32))
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    opened: list[Bank] = []

    def call(frame: pl.DataFrame, *, evaluate: bool) -> RecordDict:
        folder = make_bank(tmp_path / f"bank-{len(opened)}", asking, frame)
        if opened:
            # The ledgers start alike: one bank with other records.
            (folder / "ledger.key").write_bytes((tmp_path / "bank-0" / "ledger.key").read_bytes())
            for name in ("ledger.sqlite", "ledger.head"):
                (folder / name).write_bytes(untouched[name])
        else:
            untouched.update({name: (folder / name).read_bytes() for name in ("ledger.sqlite", "ledger.head")})
        opened.append(Bank(folder, simulation=True))
        kind = EvaluateOrder if evaluate else TrainOrder
        start = initial_params(asking, Encoder(asking.data).width)
        return opened[-1].answer(encode_order(kind("run", 1, asking.hash(), start)))

    untouched: dict[str, bytes] = {}
    yield call
    for bank in opened:
        bank.close()


def without_values(reply: RecordDict) -> bytes:
    """Every byte that would travel, the arrays' own entries aside: their names, shapes and types stay."""
    arrays = ArrayRecord(
        {name: type(array)(np.zeros_like(array.numpy())) for name, array in reply.array_records["arrays"].items()}
    )
    identify_process(1, 1)
    content = RecordDict({"head": reply.config_records["head"], "arrays": arrays})
    message = Message(content, 2, MessageType.TRAIN, ttl=60.0)
    message.metadata.__dict__["_created_at"] = 0.0
    return message_to_bytes(message)


@pytest.mark.parametrize("evaluate", [False, True], ids=["update", "histograms"])
def test_only_the_noised_array_tells_neighbours_apart(
    reply_of: Callable[..., RecordDict], make_loans: Callable[..., pl.DataFrame], *, evaluate: bool
) -> None:
    own = make_loans(lenders=1)
    first = reply_of(own, evaluate=evaluate)
    values = [array.numpy() for array in first.array_records["arrays"].values()]
    for name, change in NEIGHBOURS.items():
        other = reply_of(change(own), evaluate=evaluate)
        assert without_values(other) == without_values(first), name
        changed = [array.numpy() for array in other.array_records["arrays"].values()]
        # The seeds are the same, so what differs is the records' doing: the comparison would see it.
        differs = any(not np.array_equal(a, b) for a, b in zip(values, changed, strict=True))
        assert differs or (evaluate and name != "one record less"), name


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neither_the_charge_nor_the_steps_nor_the_noise_drawn_depend_on_a_record(
    reply_of: Callable[..., RecordDict], make_loans: Callable[..., pl.DataFrame], monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:  # fmt: skip
    own = make_loans(lenders=1)
    build = private_gradients
    work: list[list[Any]] = []

    def watched(*arguments: Any, **public: Any) -> Any:
        gradient = build(*arguments, **public)
        work[-1] += [public["mechanism"], public["expected_batch_size"]]

        def counted(params: Any, tasks: Any) -> Any:
            work[-1].append("step")
            return gradient(params, tasks)

        return counted

    draw = SecureRandom.normal

    def drawn(self: SecureRandom, size: Any, std: float) -> Any:
        work[-1].append((size, std))
        return draw(self, size, std)

    monkeypatch.setattr(client.training, "private_gradients", watched)
    monkeypatch.setattr(SecureRandom, "normal", drawn)
    events = []
    for frame in (own, NEIGHBOURS[name](own)):
        work.append([])
        events.append(decode_reply(reply_of(frame, evaluate=False)))
    assert work[0] == work[1]
    assert work[0].count("step") == 2
    assert events[0].event == events[1].event  # type: ignore[union-attr]


def test_a_reply_in_production_has_a_salt_that_no_other_has(
    tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], asking: Plan
) -> None:
    receipts = set()
    order = TrainOrder("run", 1, asking.hash(), initial_params(asking, Encoder(asking.data).width))
    for number in range(3):
        bank = Bank(make_bank(tmp_path / str(number), asking, make_loans(lenders=1), seed=None))
        receipts.add(decode_reply(bank.answer(encode_order(order))).receipt)  # type: ignore[union-attr]
        bank.close()
    assert len(receipts) == 3

"""A bank's worker that lies: started in the place of the installed one, on the bank's own node, key and ledger.

Run as `python lying_worker.py FOLDER PORT LIES`; `LIES` is JSON: for every run a list of lies, one a round.
"""

import json
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from client.bank import Bank
from client.config import load_institution
from metarisk_common.flower_deployment import ClientTask, TaskSource
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import EvaluateReport, TrainReport, decode_order, encode_reply

TEXT = "Mrs Kowalska owes 81,234.56"
"""What an honest client would never let out, and a liar may: it must not show up at the server."""


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[TrainReport], RecordDict]:
    """An honest report with every array of its update changed."""
    return lambda report: encode_reply(
        replace(report, update={name: change(np.asarray(value)) for name, value in report.update.items()})
    )


def with_field(name: str, value: str | float) -> Callable[[TrainReport], RecordDict]:
    def lie(report: TrainReport) -> RecordDict:
        content = encode_reply(report)
        head = content["head"]
        assert isinstance(head, ConfigRecord)
        head[name] = value
        return content

    return lie


def with_data(data: bytes) -> Callable[[TrainReport], RecordDict]:
    """An honest report whose arrays are other bytes than they say."""

    def lie(report: TrainReport) -> RecordDict:
        content = encode_reply(report)
        shapes = {name: np.shape(value) for name, value in report.update.items()}
        arrays = {name: Array("float32", shape, "numpy.ndarray", data) for name, shape in shapes.items()}
        content["arrays"] = ArrayRecord(arrays)
        return content

    return lie


def refusal_with_text(report: TrainReport) -> RecordDict:
    head = ConfigRecord({"protocol": 1, "kind": "refusal", "run_id": report.run_id, "round": report.round})
    head.update({"plan_hash": report.plan_hash, "institution": report.institution, "code": TEXT})
    return RecordDict({"head": head, "arrays": ArrayRecord()})


def cheaper(event: PrivacyEvent) -> PrivacyEvent:
    return replace(event, steps=event.steps + 1)


LIES: dict[str, Callable[[TrainReport], RecordDict]] = {
    "honest": encode_reply,
    "nan": changed(lambda value: np.full_like(value, np.nan)),
    "one infinity": changed(lambda value: np.where(np.arange(value.size).reshape(value.shape) == 0, np.inf, value)),
    "wrong shape": changed(lambda value: np.append(value.ravel(), value.ravel()[:1])),
    "wrong type": changed(lambda value: value.astype(np.float64)),
    "huge": changed(lambda value: np.full_like(value, 1e6)),
    "enormous": changed(lambda value: np.full_like(value, 3e38)),
    "large": changed(lambda _: np.zeros(5_000_000, np.float32)),
    "other arrays": lambda report: encode_reply(replace(report, update={"../../meta": np.zeros(3, np.float32)})),
    "no arrays": lambda report: encode_reply(replace(report, update={})),
    "old round": lambda report: encode_reply(replace(report, round=report.round - 1)),
    "other run": lambda report: encode_reply(replace(report, run_id="another")),
    "another's name": lambda report: encode_reply(replace(report, institution="Lender A")),
    "other event": lambda report: encode_reply(replace(report, event=cheaper(report.event))),
    "too large a size": lambda report: encode_reply(replace(report, declared_size=10**12)),
    "histograms": lambda report: encode_reply(EvaluateReport(**vars(report))),
    "unknown field": with_field("train_loss", 0.25),
    "other protocol": with_field("protocol", 2),
    "text for a number": with_field("round", TEXT),
    "garbage": with_data(b"\x00garbage\xff" * 100),
    "pickle": with_data(pickle.dumps({"a": 1})),
    "refusal with a text": refusal_with_text,
    "nothing": lambda _: RecordDict(),
}


class Liar:
    """Answers every order with the lie of its round."""

    def __init__(self, folder: Path, lies: list[list[str]]) -> None:
        self._bank, self._lies = Bank(folder), lies
        self._runs: list[str] = []
        self._first: dict[str, TrainReport] = {}

    def reply(self, message: Message) -> Message:
        order = decode_order(message.content)
        if order.run_id not in self._runs:
            self._runs.append(order.run_id)
        lie = self._lies[self._runs.index(order.run_id)][order.round - 1]
        if lie == "silence":
            signal.pause()
        if lie == "exception":
            return Message(Error(2, f"<class 'ValueError'>:<'{TEXT}'>"), reply_to=message)
        report = self._bank.release(order)
        first = self._first.setdefault(order.run_id, report)
        if lie == "replay":
            return Message(encode_reply(first), reply_to=message)
        if lie == "replay as of now":
            return Message(encode_reply(replace(first, round=order.round)), reply_to=message)
        if lie == "replay with a new receipt":
            return Message(encode_reply(replace(first, round=order.round, receipt="0" * 64)), reply_to=message)
        return Message(LIES[lie](report), reply_to=message)


def answered(task: ClientTask, liar: Liar) -> None:
    with task:
        task.answer(liar.reply(task.message))


def main(folder: Path, port: int, lies: list[list[str]]) -> None:
    secret = load_institution(folder).superexec_secret.read_bytes()
    source = TaskSource(f"127.0.0.1:{port}", kind="client", secret=secret)
    liar = Liar(folder, lies)
    while True:
        try:
            token = source.acquire()
        except OSError:
            token = None
        except Exception as error:
            if type(error).__name__ != "ConnectError":
                raise
            token = None  # its node is not there yet
        if token is None:
            time.sleep(0.05)
        else:
            answered(source.client_task(token, lambda: None), liar)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))

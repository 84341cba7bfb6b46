"""Messages that were once valid stay valid: banks and servers are not updated on the same day."""

from pathlib import Path

import numpy as np
from flwr.app import Message, MessageType

from metarisk_common import wire
from metarisk_common.flower_compat import identify_process, message_from_bytes, message_to_bytes
from metarisk_common.params import Params
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import Refusal, TrainOrder, TrainReport

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

PARAMS: Params = {
    "body.0.weight": np.array([[0.5, -0.25, 3e-8], [1.0, -0.0, 2.0]], np.float32),
    "head.bias": np.array([-1.5], np.float32),
}
EVENT = PrivacyEvent("poisson_gaussian", 1.5, 0.25, 4, "")
ORDER = TrainOrder("run-1", 3, "ab" * 32, PARAMS)
REPORT = TrainReport("run-1", 3, "ab" * 32, "Bank of Tests", 1200, EVENT, "cd" * 32, 17, PARAMS)
REFUSAL = Refusal("run-1", 3, "ab" * 32, "Bank of Tests", "budget")
MESSAGES = {
    "order-v1.message": wire.encode_order(ORDER),
    "report-v1.message": wire.encode_reply(REPORT),
    "refusal-v1.message": wire.encode_reply(REFUSAL),
}
STORED = "report-v1.safetensors"


def write_golden(folder: Path) -> None:
    """Write Flower's encoding of one message of each kind, and one report as the ledger's outbox keeps it.

    Run once for protocol 1, by hand; what it wrote stays in the repository unchanged, and a report in an outbox is
    read by whatever version runs after the next start. Another protocol gets files of its own beside these.
    """
    identify_process(1, 1)
    for name, content in MESSAGES.items():
        (folder / name).write_bytes(message_to_bytes(Message(content, 2, MessageType.TRAIN, ttl=600.0)))
    (folder / STORED).write_bytes(wire.report_to_bytes(REPORT))


def said(value: TrainOrder | TrainReport | Refusal) -> dict[str, object]:
    """Everything it says, arrays to the bit."""
    plain = dict(vars(value))
    for name in {"meta_params", "update"} & plain.keys():
        plain[name] = [(key, array.dtype, array.shape, array.tobytes()) for key, array in plain[name].items()]
    return plain


def check_golden(folder: Path) -> None:
    contents = {name: message_from_bytes((folder / name).read_bytes()).content for name in MESSAGES}
    order = wire.decode_order(contents["order-v1.message"])
    report = wire.decode_reply(contents["report-v1.message"])
    refusal = wire.decode_reply(contents["refusal-v1.message"])
    assert [said(order), said(report), said(refusal)] == [said(ORDER), said(REPORT), said(REFUSAL)]
    assert order.digest() == "5809040fed0176521a724c2dfc67830ad60ebdbd1e9345ed4182e33fa37f3358"
    assert [wire.encode_order(order), wire.encode_reply(report), wire.encode_reply(refusal)] == [*contents.values()]
    stored = wire.report_from_bytes((folder / STORED).read_bytes())
    assert stored.update.keys() == PARAMS.keys()
    assert all(np.array_equal(stored.update[name], value) for name, value in PARAMS.items())
    assert said(stored) | {"update": None} == said(REPORT) | {"update": None}
    assert wire.report_to_bytes(stored) == (folder / STORED).read_bytes()


def test_messages_of_every_version_are_read_and_written_as_ever() -> None:
    check_golden(GOLDEN)


def test_golden_files_are_what_their_function_writes(tmp_path: Path) -> None:
    write_golden(tmp_path)
    check_golden(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in GOLDEN.iterdir()}

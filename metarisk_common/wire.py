"""What travels: an order down, a report or a refusal up. Anything else is refused on either side.

The allow-list of what may leave a bank is `REPORT_FIELDS` plus the update's arrays. There is deliberately no
room for a count, a loss, a timing or a text: each would be a release that no ledger knows of.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from .errors import ProtocolError
from .params import Params
from .plan import PROTOCOL
from .privacy import PrivacyEvent

ORDER_FIELDS: Final = frozenset({"protocol", "kind", "run_id", "round", "plan_hash"})
ECHO_FIELDS: Final = frozenset({"ledger_counter", "ledger_receipt"})
"""What an order may carry besides: both, or neither while the server has not heard of the bank's ledger."""
REPORT_FIELDS: Final = frozenset(
    {
        "protocol", "kind", "run_id", "round", "plan_hash", "institution", "declared_size", "receipt", "counter",
        "mechanism", "noise_multiplier", "sample_rate", "steps", "segment",
    }
)  # fmt: skip
REFUSAL_FIELDS: Final = frozenset({"protocol", "kind", "run_id", "round", "plan_hash", "institution", "code"})
REFUSAL_CODES: Final = frozenset(
    {"policy", "plan", "round", "shape", "budget", "replayed", "conflict", "integrity", "error", "protocol"}
)
"""The only reasons that leave a bank: constants, so that no text can carry data."""

_LARGEST: Final = sys.float_info.max


@dataclass(frozen=True)
class TrainOrder:
    """One round's order to one bank. `meta_params`: arrays in the plan's dtype, shaped as the model's.

    `ledger_counter` and `ledger_receipt` echo what the server last heard of this bank's ledger: the counter and the
    receipt of a report that it admitted, or 0 and "". A ledger that does not hold that entry is an old copy.
    """

    run_id: str
    round: int
    plan_hash: str
    meta_params: Params
    ledger_counter: int = 0
    ledger_receipt: str = ""

    kind: ClassVar[str] = "order"

    def digest(self) -> str:
        """SHA-256 over what the order asks for, the echo left out: orders with one digest ask for one release."""
        asked = [] if self.kind == TrainOrder.kind else [self.kind]
        head = json.dumps([PROTOCOL, *asked, self.run_id, self.round, self.plan_hash])
        return hashlib.sha256(head.encode() + save_arrays(_contiguous(self.meta_params))).hexdigest()


@dataclass(frozen=True)
class EvaluateOrder(TrainOrder):
    """An order for two noised score histograms of the bank's records at `meta_params`, after a round."""

    kind: ClassVar[str] = "evaluate"


@dataclass(frozen=True)
class TrainReport:
    """A bank's answer: the noised meta-update, the privacy event it cost, the ledger's receipt. Nothing else.

    `declared_size` and `institution` are public constants of the bank's configuration, not read from records.
    """

    run_id: str
    round: int
    plan_hash: str
    institution: str
    declared_size: int
    event: PrivacyEvent
    receipt: str
    counter: int
    update: Params

    kind: ClassVar[str] = "report"


@dataclass(frozen=True)
class EvaluateReport(TrainReport):
    """A bank's answer to an `EvaluateOrder`. `update`: the noised histograms "positives" and "negatives", (bins,)."""

    kind: ClassVar[str] = "histograms"


@dataclass(frozen=True)
class Refusal:
    """A bank declines an order; `code` is one of `REFUSAL_CODES`."""

    run_id: str
    round: int
    plan_hash: str
    institution: str
    code: str

    def __post_init__(self) -> None:
        """Refuse a reason that is no constant."""
        if self.code not in REFUSAL_CODES:
            raise ProtocolError("a refusal's code must be one of the published constants")


_ORDERS: Final = {order.kind: order for order in (TrainOrder, EvaluateOrder)}
_REPORTS: Final = {report.kind: report for report in (TrainReport, EvaluateReport)}


def encode_order(order: TrainOrder) -> RecordDict:
    """Build the content of an order's message."""
    head: dict[str, Any] = {"run_id": order.run_id, "round": order.round, "plan_hash": order.plan_hash}
    if order.ledger_receipt:
        head |= {"ledger_counter": order.ledger_counter, "ledger_receipt": order.ledger_receipt}
    return _pack(order.kind, head, order.meta_params)


def decode_order(content: RecordDict) -> TrainOrder:
    """Read an order.

    Raises:
        ProtocolError: another protocol, a missing or unknown field, or arrays that cannot be read.

    """
    kind, head, arrays = _unpack(content)
    if kind not in _ORDERS:
        raise ProtocolError("expected an order")
    echo: tuple[int, str] = (0, "")
    if set(head) & ECHO_FIELDS:
        _exactly(head, ORDER_FIELDS | ECHO_FIELDS)
        echo = _integer(head, "ledger_counter"), _text(head, "ledger_receipt")
    else:
        _exactly(head, ORDER_FIELDS)
    asked = _text(head, "run_id"), _integer(head, "round"), _text(head, "plan_hash")
    return _ORDERS[kind](*asked, arrays, *echo)


def encode_reply(reply: TrainReport | Refusal) -> RecordDict:
    """Build the content of a reply's message from the allow-listed fields."""
    if isinstance(reply, Refusal):
        return _pack("refusal", asdict(reply), {})
    return _pack(reply.kind, _report_head(reply), reply.update)


def decode_reply(content: RecordDict) -> TrainReport | Refusal:
    """Read a reply.

    Raises:
        ProtocolError: another protocol, a missing field, or one that is not on the allow-list.

    """
    kind, head, arrays = _unpack(content)
    if kind == "refusal":
        _exactly(head, REFUSAL_FIELDS)
        if arrays:
            raise ProtocolError("a refusal carries no arrays")
        return Refusal(*_common(head), _text(head, "code"))
    if kind not in _REPORTS:
        raise ProtocolError("expected a report or a refusal")
    _exactly(head, REPORT_FIELDS)
    return _REPORTS[kind](*_common(head), *_report_tail(head), update=arrays)


def report_to_bytes(report: TrainReport) -> bytes:
    """Write a report as safetensors: what the ledger's outbox keeps until the next release."""
    return save_arrays(_contiguous(report.update), metadata={report.kind: json.dumps(_report_head(report))})


def report_from_bytes(data: bytes) -> TrainReport:
    """Read what `report_to_bytes` wrote.

    Raises:
        ProtocolError: the bytes are no report.

    """
    try:
        arrays = load_arrays(data)
        length = int.from_bytes(data[:8], "little")
        ((kind, said),) = json.loads(data[8 : 8 + length])["__metadata__"].items()
        head, report = dict(json.loads(said)), _REPORTS[kind]
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise ProtocolError("the stored report cannot be read") from None
    _exactly(head, REPORT_FIELDS - {"protocol", "kind"})
    return report(*_common(head), *_report_tail(head), update=dict(arrays))


def _report_head(report: TrainReport) -> dict[str, Any]:
    event = report.event
    return {
        "run_id": report.run_id, "round": report.round, "plan_hash": report.plan_hash,
        "institution": report.institution, "declared_size": report.declared_size,
        "receipt": report.receipt, "counter": report.counter,
        "mechanism": event.mechanism, "noise_multiplier": event.noise_multiplier,
        "sample_rate": event.sample_rate, "steps": event.steps, "segment": event.segment,
    }  # fmt: skip


def _common(head: Mapping[str, Any]) -> tuple[str, int, str, str]:
    return _text(head, "run_id"), _integer(head, "round"), _text(head, "plan_hash"), _text(head, "institution")


def _report_tail(head: Mapping[str, Any]) -> tuple[int, PrivacyEvent, str, int]:
    try:
        event = PrivacyEvent(
            mechanism=_text(head, "mechanism"),
            noise_multiplier=_number(head, "noise_multiplier"),
            sample_rate=_number(head, "sample_rate"),
            steps=_integer(head, "steps"),
            segment=_text(head, "segment"),
        )
    except ValueError:
        raise ProtocolError("the report's privacy event is not valid") from None
    return _integer(head, "declared_size"), event, _text(head, "receipt"), _integer(head, "counter")


def _pack(kind: str, head: Mapping[str, Any], arrays: Mapping[str, Any]) -> RecordDict:
    record = ArrayRecord({name: Array(value) for name, value in _contiguous(arrays).items()})
    return RecordDict({"head": ConfigRecord({"protocol": PROTOCOL, "kind": kind, **head}), "arrays": record})


def _unpack(content: RecordDict) -> tuple[str, dict[str, Any], Params]:
    if set(content) != {"head", "arrays"}:
        raise ProtocolError("a message holds exactly a head and arrays")
    head, record = content["head"], content["arrays"]
    if not isinstance(head, ConfigRecord) or not isinstance(record, ArrayRecord):
        raise ProtocolError("the message's records have the wrong types")
    fields: dict[str, Any] = dict(head)
    if fields.get("protocol") != PROTOCOL:
        raise ProtocolError(f"the message speaks another protocol; this side speaks {PROTOCOL}")
    try:
        arrays = {name: array.numpy() for name, array in record.items()}
    except Exception:  # noqa: BLE001 - whatever a hostile array makes NumPy raise, it is one thing: unreadable
        raise ProtocolError("the message's arrays cannot be read") from None
    if any(type(array) is not np.ndarray for array in arrays.values()):
        # NumPy reads a zip archive as well, into something that is no array.
        raise ProtocolError("the message's arrays cannot be read")
    return _text(fields, "kind"), fields, arrays


def _exactly(head: Mapping[str, Any], fields: frozenset[str]) -> None:
    if set(head) != fields:
        raise ProtocolError("the message's fields are not those of the protocol")


def _text(head: Mapping[str, Any], name: str) -> str:
    value = head.get(name)
    if not isinstance(value, str) or len(value) > 200:  # noqa: PLR2004 - longer than any name or digest
        raise ProtocolError(f"the message's field '{name}' must be a short text")
    return value


def _integer(head: Mapping[str, Any], name: str) -> int:
    value = head.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"the message's field '{name}' must be an integer")
    return value


def _number(head: Mapping[str, Any], name: str) -> float:
    value = head.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        raise ProtocolError(f"the message's field '{name}' must be a finite number")
    return float(value)


def _contiguous(arrays: Mapping[str, Any]) -> dict[str, Any]:
    # Not `np.ascontiguousarray`: that gives a single number a dimension.
    return {name: np.asarray(value, order="C") for name, value in arrays.items()}

"""What may travel, and that nothing else does: round trips, the allow-list, and messages that must never go through."""

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save

from metarisk_common import wire
from metarisk_common.errors import ProtocolError
from metarisk_common.flower_compat import identify_process, message_from_bytes, message_to_bytes
from metarisk_common.params import Params
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.wire import EvaluateOrder, EvaluateReport, Refusal, TrainOrder, TrainReport

EVENT = PrivacyEvent("poisson_gaussian", 1.5, 0.25, 4, "")
PARAMS: Params = {
    "body.0.weight": np.array([[0.5, -0.25, 3e-8], [1.0, -0.0, 2.0]], np.float32),
    "head.bias": np.array([-1.5], np.float32),
}
ORDER = TrainOrder("run-1", 3, "ab" * 32, PARAMS)
REPORT = TrainReport("run-1", 3, "ab" * 32, "Bank of Tests", 1200, EVENT, "cd" * 32, 17, PARAMS)
REFUSAL = Refusal("run-1", 3, "ab" * 32, "Bank of Tests", "budget")

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
tensors = arrays.arrays(
    st.sampled_from([np.float32, np.float64]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(width=32),
)
params = st.dictionaries(names, tensors, max_size=4)
texts = st.text(max_size=200)
integers = st.integers(-(2**63), 2**63 - 1)
events = st.builds(
    PrivacyEvent,
    mechanism=st.just("poisson_gaussian"),
    noise_multiplier=st.floats(0, 1e6),
    sample_rate=st.floats(0, 1, exclude_min=True),
    steps=st.integers(1, 2**62),
    segment=texts,
)
echoes = st.tuples(st.just(0), st.just("")) | st.tuples(integers, st.text(min_size=1, max_size=200))
asked = st.tuples(st.sampled_from([TrainOrder, EvaluateOrder]), texts, integers, texts, params, echoes)
orders = asked.map(lambda parts: parts[0](*parts[1:5], *parts[5]))
told = (texts, integers, texts, texts, integers, events, texts, integers, params)
reports = st.builds(TrainReport, *told) | st.builds(EvaluateReport, *told)
refusals = st.builds(Refusal, texts, integers, texts, texts, st.sampled_from(sorted(wire.REFUSAL_CODES)))


def travel(content: RecordDict) -> RecordDict:
    """Through Flower's own format, as between two machines."""
    identify_process(1, 1)
    message = Message(content, 2, MessageType.TRAIN, ttl=600.0)
    return message_from_bytes(message_to_bytes(message)).content


def same_params(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def same(a: TrainReport, b: TrainReport) -> bool:
    return replace(a, update={}) == replace(b, update={}) and same_params(a.update, b.update)


def head(content: RecordDict) -> ConfigRecord:
    record = content["head"]
    assert isinstance(record, ConfigRecord)
    return record


# What is sent arrives.


@given(order=orders)
def test_an_order_arrives(order: TrainOrder) -> None:
    found = wire.decode_order(travel(wire.encode_order(order)))
    assert replace(found, meta_params={}) == replace(order, meta_params={})
    assert same_params(found.meta_params, order.meta_params)
    assert found.digest() == order.digest()


@given(report=reports)
def test_a_report_arrives(report: TrainReport) -> None:
    found = wire.decode_reply(travel(wire.encode_reply(report)))
    assert isinstance(found, TrainReport)
    assert same(found, report)


@given(refusal=refusals)
def test_a_refusal_arrives(refusal: Refusal) -> None:
    assert wire.decode_reply(travel(wire.encode_reply(refusal))) == refusal


@given(report=reports)
def test_a_report_survives_the_outbox(report: TrainReport) -> None:
    assert same(wire.report_from_bytes(wire.report_to_bytes(report)), report)


def test_an_order_of_transposed_arrays_is_the_same_order() -> None:
    turned = {name: np.asfortranarray(value) for name, value in PARAMS.items()}
    found = wire.decode_order(travel(wire.encode_order(replace(ORDER, meta_params=turned))))
    assert same_params(found.meta_params, PARAMS)
    assert found.digest() == ORDER.digest()


@pytest.mark.parametrize(
    "other",
    [
        replace(ORDER, run_id="run-2"),
        replace(ORDER, round=4),
        replace(ORDER, plan_hash="ac" * 32),
        replace(ORDER, meta_params={**PARAMS, "head.bias": np.array([-1.5], np.float64)}),
        replace(ORDER, meta_params={**PARAMS, "head.bias": np.nextafter(PARAMS["head.bias"], np.float32(0))}),
        replace(ORDER, meta_params={**PARAMS, "body.0.weight": PARAMS["body.0.weight"].T}),
        replace(ORDER, meta_params={"renamed": PARAMS["body.0.weight"], "head.bias": PARAMS["head.bias"]}),
    ],
)
def test_another_order_has_another_digest(other: TrainOrder) -> None:
    assert other.digest() != ORDER.digest()


# What may leave a bank.


def test_the_allow_list_is_this_one() -> None:
    expected = {
        "protocol", "kind", "run_id", "round", "plan_hash", "institution", "declared_size", "receipt", "counter",
        "mechanism", "noise_multiplier", "sample_rate", "steps", "segment",
    }  # fmt: skip
    assert isinstance(wire.REPORT_FIELDS, frozenset)
    assert expected == wire.REPORT_FIELDS
    # `counter` counts the ledger's entries, which the server has caused; nothing else may count anything.
    telling = ("count", "loss", "auc", "metric", "time", "second", "duration", "rows", "examples", "text", "message")
    assert not [name for name in wire.REPORT_FIELDS - {"counter"} for word in telling if word in name]
    assert {"protocol", "kind", "run_id", "round", "plan_hash", "institution", "code"} == wire.REFUSAL_FIELDS


def test_a_report_has_no_field_beyond_the_allow_list() -> None:
    says = {field.name for field in fields(TrainReport)} - {"event", "update"}
    says |= {field.name for field in fields(PrivacyEvent)}
    assert says | {"protocol", "kind"} == wire.REPORT_FIELDS
    content = wire.encode_reply(REPORT)
    assert set(content) == {"head", "arrays"}
    assert set(head(content)) == wire.REPORT_FIELDS
    assert set(head(wire.encode_reply(REFUSAL))) == wire.REFUSAL_FIELDS
    assert set(head(wire.encode_order(ORDER))) == wire.ORDER_FIELDS


def test_a_refusal_takes_no_free_text() -> None:
    with pytest.raises(ProtocolError) as error:
        replace(REFUSAL, code="row 17 has income 40211")
    assert "40211" not in str(error.value)


# What must not go through.


def zipped() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(2))
    return stream.getvalue()


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


def hollow() -> bytes:
    """A header that promises a terabyte, and nothing after it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (2**38,)})
    return stream.getvalue()


def array_of(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(2,), stype=stype, data=data)


def put(key: str, value: Any) -> Callable[[RecordDict], None]:
    def edit(content: RecordDict) -> None:
        head(content)[key] = value

    return edit


def drop(key: str) -> Callable[[RecordDict], None]:
    def edit(content: RecordDict) -> None:
        del head(content)[key]

    return edit


def put_array(array: Array) -> Callable[[RecordDict], None]:
    def edit(content: RecordDict) -> None:
        content["arrays"] = ArrayRecord({"head.bias": array})

    return edit


def put_record(key: str, record: ConfigRecord | ArrayRecord) -> Callable[[RecordDict], None]:
    def edit(content: RecordDict) -> None:
        content[key] = record

    return edit


EVERYWHERE = {
    "an extra field": put("train_loss", 0.3),
    "an extra record": put_record("metrics", ConfigRecord({"auc": 0.7})),
    "another protocol": put("protocol", 2),
    "a protocol as text": put("protocol", "1"),
    "no protocol": drop("protocol"),
    "no kind": drop("kind"),
    "an unknown kind": put("kind", "gossip"),
    "no run": drop("run_id"),
    "a text too long": put("run_id", "x" * 201),
    "a number for a text": put("plan_hash", 7),
    "a text for a number": put("round", "3"),
    "a boolean for a number": put("round", value=True),
    "a list for a number": put("round", [3]),
    "arrays where the head should be": put_record("head", ArrayRecord()),
    "a head where the arrays should be": put_record("arrays", ConfigRecord()),
    "a pickled object": put_array(array_of(pickled())),
    "an archive of arrays": put_array(array_of(zipped())),
    "an array that is not there": put_array(array_of(hollow())),
    "a serialisation of somebody else's": put_array(array_of(pickled(), "cloudpickle")),
    "no array at all": put_array(array_of(b"")),
}
IN_REPORTS = {
    "NaN noise": put("noise_multiplier", float("nan")),
    "infinite noise": put("noise_multiplier", float("inf")),
    "negative noise": put("noise_multiplier", -1.0),
    "noise as text": put("noise_multiplier", "1.5"),
    "a number without end": put("noise_multiplier", 10**400),
    "a sample rate above 1": put("sample_rate", 1.5),
    "no steps": put("steps", 0),
    "another mechanism": put("mechanism", "trust_me"),
    "no receipt": drop("receipt"),
    "a long segment": put("segment", "x" * 201),
}


def refused(decode: Callable[[RecordDict], object], content: RecordDict, edit: Callable[[RecordDict], None]) -> None:
    edit(content)
    with pytest.raises(ProtocolError) as error:
        decode(content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("edit", EVERYWHERE.values(), ids=EVERYWHERE)
def test_no_order_with(edit: Callable[[RecordDict], None]) -> None:
    refused(wire.decode_order, wire.encode_order(ORDER), edit)


@pytest.mark.parametrize("edit", [*EVERYWHERE.values(), *IN_REPORTS.values()], ids=[*EVERYWHERE, *IN_REPORTS])
def test_no_report_with(edit: Callable[[RecordDict], None]) -> None:
    refused(wire.decode_reply, wire.encode_reply(REPORT), edit)


@pytest.mark.parametrize("edit", EVERYWHERE.values(), ids=EVERYWHERE)
def test_no_refusal_with(edit: Callable[[RecordDict], None]) -> None:
    refused(wire.decode_reply, wire.encode_reply(REFUSAL), edit)


def test_no_refusal_with_arrays() -> None:
    content = wire.encode_reply(REFUSAL)
    content["arrays"] = ArrayRecord({"a": Array(np.zeros(1))})
    with pytest.raises(ProtocolError, match="carries no arrays"):
        wire.decode_reply(content)


def test_no_refusal_with_a_reason_of_its_own() -> None:
    refused(wire.decode_reply, wire.encode_reply(REFUSAL), put("code", "because"))


def test_each_side_takes_only_what_is_for_it() -> None:
    for content in (wire.encode_reply(REPORT), wire.encode_reply(REFUSAL)):
        with pytest.raises(ProtocolError, match="expected an order"):
            wire.decode_order(content)
    with pytest.raises(ProtocolError, match="expected a report or a refusal"):
        wire.decode_reply(wire.encode_order(ORDER))


def outbox(report: object) -> bytes:
    return save({"a": np.zeros(1)}, metadata={"report": json.dumps(report)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no safetensors",
        wire.report_to_bytes(REPORT)[:-1],
        save({"a": np.zeros(1)}),
        outbox([]),
        outbox("text"),
        outbox(3),
        outbox({"run_id": "run-1"}),
        outbox({**dict(head(wire.encode_reply(REPORT))), "loss": 0.3}),
    ],
)
def test_a_stored_report_that_is_none(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.report_from_bytes(data)


def test_the_echo_is_no_part_of_what_is_asked_and_the_kind_is() -> None:
    echoing = replace(ORDER, ledger_counter=4, ledger_receipt="ef" * 32)
    assert echoing.digest() == ORDER.digest()
    question = EvaluateOrder(ORDER.run_id, ORDER.round, ORDER.plan_hash, ORDER.meta_params)
    assert question.digest() != ORDER.digest()
    assert type(wire.decode_order(travel(wire.encode_order(question)))) is EvaluateOrder


@pytest.mark.parametrize("missing", sorted(wire.ECHO_FIELDS))
def test_half_an_echo_is_refused(missing: str) -> None:
    content = wire.encode_order(replace(ORDER, ledger_counter=4, ledger_receipt="ef" * 32))
    del content.config_records["head"][missing]
    with pytest.raises(ProtocolError, match="fields"):
        wire.decode_order(content)

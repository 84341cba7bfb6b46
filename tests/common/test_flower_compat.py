"""The contract with the parts of Flower that it does not publish: whatever of it changes must fail here."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict

from metarisk_common import flower_compat
from metarisk_common.flower_compat import (
    Run,
    identify_process,
    message_from_bytes,
    message_to_bytes,
    node_infos,
    node_names,
    set_message_id,
)
from simulations.inprocess import InProcessGrid, Node


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    identify_process(7, 1)
    yield
    identify_process(1, 1)


def message() -> Message:
    arrays = ArrayRecord({"a": Array(np.arange(6.0).reshape(2, 3)), "empty": Array(np.zeros((0, 2), np.float32))})
    content = RecordDict({"head": ConfigRecord({"round": 3, "rate": 0.5, "who": "Köln", "on": True}), "arrays": arrays})
    made = Message(content, 42, MessageType.TRAIN, ttl=60.0, group_id="3")
    set_message_id(made, "id-1")
    return made


def test_a_message_crosses_unchanged() -> None:
    sent = message()
    found = message_from_bytes(message_to_bytes(sent))
    assert found.content == sent.content
    assert vars(found.metadata) == vars(sent.metadata)
    meta = found.metadata
    assert (meta.run_id, meta.src_node_id, meta.dst_node_id) == (7, 1, 42)
    assert (meta.message_id, meta.group_id, meta.message_type, meta.ttl) == ("id-1", "3", "train", 60.0)
    arrays = found.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    array = arrays["a"].numpy()
    assert array.dtype == np.float64
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_reply_knows_what_it_answers() -> None:
    sent = message()
    identify_process(7, 42)
    reply = message_from_bytes(
        message_to_bytes(Message(RecordDict(), reply_to=message_from_bytes(message_to_bytes(sent))))
    )
    assert reply.metadata.reply_to_message_id == "id-1"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (42, 1)
    assert not reply.has_error()


def test_a_failure_crosses_unchanged() -> None:
    reply = message_from_bytes(message_to_bytes(Message(Error(2, "ValueError"), reply_to=message())))
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (2, "ValueError")
    assert not reply.has_content()


def test_an_identity_can_change() -> None:
    identify_process(8, 9)
    made = Message(RecordDict(), 42, MessageType.QUERY)
    assert (made.metadata.run_id, made.metadata.src_node_id) == (8, 9)


def test_without_identity_there_is_no_message() -> None:
    """Why `identify_process` exists; and importing us leaves Flower's telemetry and update check off."""
    program = """
import os
from metarisk_common import flower_compat
from flwr.app import Message, RecordDict
print(os.environ["FLWR_TELEMETRY_ENABLED"], os.environ["FLWR_DISABLE_UPDATE_CHECK"])
try:
    Message(RecordDict(), 2, "train")
except RuntimeError as error:
    print("refused")
flower_compat.identify_process(5, 6)
print(Message(RecordDict(), 2, "train").metadata.src_node_id)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env={})
    assert done.stdout.split() == ["0", "1", "refused", "6"]


def test_nodes_have_ids_and_names() -> None:
    infos = node_infos([(1000, "Bank A"), (2**63, "Bank B")])
    assert [(info.node_id, info.name) for info in infos] == [(1000, "Bank A"), (2**63, "Bank B")]
    grid = InProcessGrid("client.app:app", [Node("Bank A", {}), Node("", {})])
    assert node_names(grid) == {1000: "Bank A", 1001: ""}


def test_a_run_can_be_empty() -> None:
    assert Run.create_empty(7).run_id == 7


def test_flowers_engine_is_where_it_was() -> None:
    """`run_on_ray` itself needs the extra; what it calls comes with Flower."""
    from flwr.simulation.run_simulation import _run_simulation  # noqa: PLC0415 - as late as `run_on_ray` does
    from flwr.supercore.telemetry import EventType  # noqa: PLC0415

    names = set(_run_simulation.__code__.co_varnames[: _run_simulation.__code__.co_argcount])
    used = {"num_supernodes", "client_app", "server_app", "server_app_context", "backend_config", "exit_event"}
    assert used <= names
    assert hasattr(EventType, "PYTHON_API_RUN_SIMULATION_LEAVE")


def test_everything_it_offers_is_listed() -> None:
    assert flower_compat.__all__ == sorted(flower_compat.__all__)
    assert all(hasattr(flower_compat, name) for name in flower_compat.__all__)

"""Names that Flower does not publish: here, and in `flower_deployment` for what only real servers need, nowhere else.

So two files change when Flower does; importing the other one takes a second and a half more.
`tests/common/test_flower_compat.py` is the contract: it fails where a newer Flower moves or alters one of them.
"""

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before the first import of Flower: it reads these once.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NodeInfo",
    "Run",
    "identify_process",
    "message_from_bytes",
    "message_to_bytes",
    "node_infos",
    "node_keys",
    "node_names",
    "run_on_ray",
    "set_message_id",
]


def identify_process(run_id: int, node_id: int) -> None:
    """Tell Flower which run and node this process speaks for; without it no `Message` can be built."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that Flower's SuperLink would have given it on arrival."""
    message.metadata.__dict__["_message_id"] = message_id


def message_to_bytes(message: Message) -> bytes:
    """Serialise a message as Flower does on the wire."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def message_from_bytes(data: bytes) -> Message:
    """Read what `message_to_bytes` wrote."""
    proto = ProtoMessage()
    proto.ParseFromString(data)
    return message_from_proto(proto)


def node_infos(names: Iterable[tuple[int, str]]) -> list[NodeInfo]:
    """Build Flower's description of nodes from `(node_id, name)` pairs."""
    return [NodeInfo(node_id=node_id, name=name) for node_id, name in names]


def run_on_ray(
    server_app: ServerApp, client_app: ClientApp, *, nodes: int, run_config: dict[str, Any], workers: int, home: Path
) -> None:
    """Run two apps on Flower's own simulation engine; it blocks until the server app has ended.

    `home` is the folder that Flower writes to, its workers even for a while after the end.
    `flwr.simulation.run_simulation` does the same without letting the caller set the run's configuration.

    Raises:
        ImportError: the extra that brings Ray is not installed.
        Exception: whatever the server app raised.

    """
    # Heavy and optional; Flower would end the process where it is missing.
    importlib.import_module("ray")
    from flwr.simulation.run_simulation import _run_simulation  # noqa: PLC0415
    from flwr.supercore.telemetry import EventType  # noqa: PLC0415

    with _own_home(home):
        context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
        _run_simulation(
            num_supernodes=nodes,
            client_app=client_app,
            server_app=server_app,
            server_app_context=context,
            backend_config={
                "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        )


@contextmanager
def _own_home(home: Path) -> Iterator[None]:
    """Give Flower a home of its own: it writes there even with telemetry off, and a person's home is not its place."""
    before = os.environ.get("FLWR_HOME")
    os.environ["FLWR_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLWR_HOME"]
        else:
            os.environ["FLWR_HOME"] = before


def node_names(grid: Grid) -> dict[int, str]:
    """Online nodes by id, with the name each registered under ("" where the engine keeps none)."""
    return {int(info.node_id): str(info.name) for info in grid.get_nodes()}


def node_keys(grid: Grid) -> dict[int, bytes]:
    """Online nodes by id, with the public key that each proved to hold (PEM)."""
    return {int(info.node_id): bytes(info.public_key) for info in grid.get_nodes()}

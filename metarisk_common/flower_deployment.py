"""Flower's deployment engine, as far as Flower does not publish it: SuperLink, SuperNode, tasks and control.

Like `flower_compat`, which is imported first: it sets what every Flower process must be told.
"""

import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Self

from flwr.app import Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from .flower_compat import identify_process
from .flower_grid import SteadyGrid

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor

__all__ = ["ClientTask", "Control", "RunStatus", "ServerTask", "TaskSource", "run_superlink", "run_supernode"]


_FIRST_BACKOFF_SECONDS: Final = 0.05
_LOCAL_BACKOFF_SECONDS: Final = 1.0


def _look_again_soon(module: types.ModuleType, name: str, **options: float) -> None:
    """Let a module of Flower's that pulls objects look again soon for one that is still on its way.

    A message is announced before its last piece has arrived, so who is quick finds one missing, three times a round.
    Flower then waits a second, and doubles it up to ten; this begins with a twentieth. `options` go to Flower too.
    """
    pull = vars(module)[name]
    if not isinstance(pull, functools.partial):
        vars(module)[name] = functools.partial(pull, initial_backoff=_FIRST_BACKOFF_SECONDS, **options)


def run_superlink(arguments: Sequence[str]) -> None:
    """Run Flower's SuperLink with command line arguments; it blocks until a signal ends it."""
    from flwr.superlink.cli import flower_superlink  # noqa: PLC0415 - SQLAlchemy and FastAPI, for this process alone

    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


def run_supernode(arguments: Sequence[str], sleep: Callable[[float], None]) -> None:
    """Run Flower's SuperNode; it asks `sleep(3)` where it had nothing to do, `sleep(0.5)` where a reply is awaited.

    Flower has these waits as constants, which alone would make a round take many seconds.
    """
    import flwr.supernode.start_client_internal as loop  # noqa: PLC0415 - for this process alone
    from flwr.supernode.cli import flower_supernode  # noqa: PLC0415
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState  # noqa: PLC0415

    _look_again_soon(loop, "pull_objects")
    _keep_durations_here(InMemoryNodeState)
    vars(loop)["time"] = types.SimpleNamespace(sleep=sleep)
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


def _keep_durations_here(state: type[Any]) -> None:
    """Have a node tell the hub 0 for how long an answer took.

    Flower sends the duration with every reply, to the microsecond. It grows with the number of records, and is on no
    allow-list.
    """
    measure = state.get_message_processing_duration

    def none(self: Any, message_id: str) -> float:  # noqa: ANN401 - Flower's state, which does not publish its type
        measure(self, message_id)  # It also forgets durations that nobody asked for.
        return 0.0

    state.get_message_processing_duration = none


class TaskSource:
    """Where a worker process asks for work: the Runtime API of a SuperLink or SuperNode on this machine.

    Flower's own SuperExec would start the code that came in a bundle; whoever asks here runs what is installed.
    Calls raise `httpx.HTTPError` where nobody answers.
    """

    def __init__(self, address: str, *, kind: str, secret: bytes, ca: bytes | None = None) -> None:
        """Connect lazily. `kind`: "client" or "server"; `ca`: PEM of who vouches for the address, none without TLS."""
        self._address, self._ca = address, ca
        self._kind = {"client": TaskType.CLIENT_APP, "server": TaskType.SERVER_APP}[kind].value
        methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        self._client = RuntimeHttpClient.from_server_address(
            address,
            ca is None,
            ca,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods),
            ],
        )

    def acquire(self) -> str | None:
        """Ask for a task; its token, or none if there is nothing to do."""
        found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._kind]))
        return str(found.token) if found.HasField("task") and found.token else None

    def client_task(self, token: str, waiting: Callable[[], None]) -> "ClientTask":
        """Open the client task of a token; `waiting` is called while its order is not here whole, and may raise."""
        return ClientTask(self._address, token, self._ca, waiting)

    def give_up(self, token: str, reason: str) -> None:
        """Tell that the task of a token has failed, for a process that can no longer say so itself."""
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            RuntimeTokenHttpInterceptor(token),
        ]
        client = RuntimeHttpClient.from_server_address(self._address, self._ca is None, self._ca, interceptors)
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=reason))
        finally:
            client.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _telling(
    pull: Callable[[PullObjectRequest], PullObjectResponse], waiting: Callable[[], None]
) -> Callable[[PullObjectRequest], PullObjectResponse]:
    """Pull objects as before, and call `waiting` with each look at one that is not there yet."""

    def pulled(request: PullObjectRequest) -> PullObjectResponse:
        response = pull(request)
        if response.object_found and not response.object_available:
            waiting()
        return response

    return pulled


class ClientTask:
    """One message for the bank: it is fetched with the app bundle that the server started, and answered once."""

    def __init__(self, address: str, token: str, ca: bytes | None, waiting: Callable[[], None]) -> None:
        """Connect; `with` starts the signs of life and fetches the input."""
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        ]
        self._client = RuntimeHttpClient.from_server_address(address, ca is None, ca, interceptors)
        self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(self._client))
        vars(self._client)["PullObject"] = _telling(self._client.PullObject, waiting)
        _look_again_soon(run_clientapp, "pull_and_inflate_object_from_tree", backoff_cap=_LOCAL_BACKOFF_SECONDS)

    def __enter__(self) -> Self:
        """Fetch the message, its context and the bundle's bytes."""
        self._heartbeat.start()
        try:
            self.message, self.context, _, fab = pull_task_input(self._client)
        except BaseException:
            # Else the node would miss this process in a minute, and take that for the answer to its order of then.
            push_task_output(self._client, None, SubStatus.FAILED, "the order did not come whole")
            self.__exit__()
            raise
        self.bundle = bytes(fab.content)
        return self

    def __exit__(self, *_: object) -> None:
        """End the signs of life."""
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._client.close()

    def answer(self, reply: Message) -> None:
        """Hand the reply to the SuperNode and end the task.

        Flower stamps a reply with the bank's clock, and with what is left of the order's time: both say to the
        microsecond how long the answer took. A reply carries the order's own stamps instead, and expires with it.
        """
        reply.metadata.created_at = self.message.metadata.created_at
        reply.metadata.ttl = self.message.metadata.ttl
        push_message(self._client, reply, self.context)
        push_task_output(self._client, self.context, SubStatus.COMPLETED, "")


class ServerTask:
    """A run, handed to this process: its configuration, and the grid that reaches the banks."""

    def __init__(self, address: str, token: str, ca: bytes) -> None:
        """Connect lazily; `with` starts the signs of life and fetches the run's configuration."""
        self.grid = SteadyGrid(address, ca, token)
        self._client = self.grid._runtime_client  # noqa: SLF001 - Flower's own process does so
        self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(self._client))

    def __enter__(self) -> Self:
        """Fetch what Flower says of the run."""
        self._heartbeat.start()
        found = self._client.PullTaskInput(PullTaskInputRequest())
        identify_process(found.run.run_id, found.context.node_id)
        TaskIdentity.task_id = found.task_id
        run = run_from_proto(found.run)
        self.grid.set_run(run)
        self.context = context_from_proto(found.context)
        self.context.run_config = dict(run.override_config)
        return self

    def __exit__(self, *_: object) -> None:
        """End the signs of life."""
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self.grid.close()

    def finish(self, failure: str | None) -> None:
        """Say how the run ended: none for well, else the reason, which `RunStatus.details` shows."""
        status = SubStatus.COMPLETED if failure is None else SubStatus.FAILED
        self.context.state = RecordDict()
        output = PushTaskOutputRequest(context=context_to_proto(self.context), sub_status=status, details=failure or "")
        self._client.PushTaskOutput(output)


@dataclass(frozen=True)
class RunStatus:
    """`status`: pending, starting, running or finished; `sub_status`: completed, failed or stopped once finished."""

    status: str
    sub_status: str
    details: str


class Control:
    """The SuperLink's Control API, on loopback. Calls raise `httpx.HTTPError` where nobody answers."""

    def __init__(self, address: str, ca: bytes | None) -> None:
        """Connect lazily; `ca`: PEM of who vouches for the address, none without TLS."""
        interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        self._client = ControlHttpClient.from_server_address(address, ca is None, ca, interceptors)

    def __enter__(self) -> Self:
        """Return this; leaving the block closes the connection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._client.close()

    def nodes(self) -> list[NodeInfo]:
        """Every node that is or was registered; `status`: registered, online, offline or unregistered."""
        return list(self._client.ListNodes(ListNodesRequest()).nodes_info)

    def register(self, public_key: bytes, name: str) -> int:
        """Let the holder of a key (PEM) in; returns the id of its node."""
        return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        """Keep a node out from now on."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(self, bundle: bytes, config: Mapping[str, str | int]) -> int:
        """Start a run of an app bundle; returns its id."""
        fab = Fab(sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        return int(self._client.StartRun(request).run_id)

    def run_status(self, run_id: int) -> RunStatus | None:
        """How a run stands, or none if there is no such run; where Flower's database was lost it raises a 404."""
        for found in self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict.values():
            return RunStatus(found.status.status, found.status.sub_status, found.status.details)
        return None

    def stop_run(self, run_id: int) -> None:
        """Stop a run."""
        self._client.StopRun(StopRunRequest(run_id=run_id))

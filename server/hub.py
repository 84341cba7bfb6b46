"""The hub: Flower's SuperLink behind two doors.

Flower serves everything on one port, and its Control and Runtime APIs ask nobody who they are: whoever reaches the
port can start runs. So the port is on loopback, and a second listener stands outside, with the same application
behind it but for the paths, of which it knows only those that a bank's node needs. There every request is signed with
the node's key; TLS on both.

Run as `python -m server.hub FOLDER`.
"""

import asyncio
import gc
import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

import uvicorn

from metarisk_common import logs
from metarisk_common.flower_deployment import run_superlink
from metarisk_common.supervise import end_with_parent

from .config import LOOPBACK, Server, load_server

FLEET_PATHS: Final = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab",
        "pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received",
    )
)  # fmt: skip
"""What a node that the operator has enrolled needs; nodes don't enrol themselves."""
HEALTH_PATH: Final = "/health"
LARGEST_REQUEST: Final = 32 * 2**20
"""Bytes. Flower cuts arrays into pieces of 5 MB; no request of a node is near this."""

_GRACE_SECONDS = 1

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class OutsideDoor:
    """An ASGI application that lets through what a bank's node needs, and answers 404 with no body to all else."""

    def __init__(self, inner: Application) -> None:
        """Stand before `inner`."""
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the fleet's paths and health, nothing else."""
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        allowed = (method == "POST" and path in FLEET_PATHS) or (method == "GET" and path == HEALTH_PATH)
        if not allowed:
            await _refuse(send, 404)
        elif _declared_length(scope) > LARGEST_REQUEST:
            await _refuse(send, 413)
        else:
            await self._inner(scope, _bounded(receive), send)


def _declared_length(scope: Scope) -> int:
    """Length that the request says it has; one that says none, or nonsense, is too long for a node's."""
    if scope["method"] == "GET":
        return 0
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else LARGEST_REQUEST + 1


def _bounded(receive: Receive) -> Receive:
    """Hang up on a request whose body is longer than any node's."""
    seen = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return message if seen <= LARGEST_REQUEST else {"type": "http.disconnect"}

    return bounded


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def arguments(server: Server) -> list[str]:
    """Command line of the SuperLink for an operator's folder."""
    folder = server.folder
    return [
        "--host", LOOPBACK, "--port", str(server.config.inside.port),
        "--ssl-ca-certfile", str(folder.ca_certificate),
        "--ssl-certfile", str(folder.certificate),
        "--ssl-keyfile", str(folder.certificate_key),
        "--database", str(folder.database),
        "--enable-supernode-auth",
        # Runs are processes of their own, which a crash of the hub leaves alone.
        "--isolation", "process", "--superexec-auth-secret-file", str(folder.superexec_secret),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def serve(server: Server) -> None:
    """Run the hub until a signal ends it."""
    outside = server.config.outside

    def listen_twice(app: Application, **options: Any) -> None:  # noqa: ANN401 - uvicorn's own options
        options |= {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
        # Nobody speaks WebSocket here: a request to change to it is answered as the request that it else is.
        options |= {"timeout_graceful_shutdown": _GRACE_SECONDS, "ws": "none"}
        same = {name: value for name, value in options.items() if name not in {"host", "port"}}
        inner = uvicorn.Server(uvicorn.Config(app, **options))
        config = uvicorn.Config(OutsideDoor(app), host=outside.host, port=outside.port, lifespan="off", **same)
        # What is loaded by now stays: the collector need not look at it again with every batch of requests.
        gc.freeze()
        with asyncio.Runner(loop_factory=inner.config.get_loop_factory()) as runner:
            runner.run(_serve_both(inner, uvicorn.Server(config)))

    vars(uvicorn)["run"] = listen_twice
    run_superlink(arguments(server))


async def _serve_both(inside: uvicorn.Server, outside: uvicorn.Server) -> None:
    """Serve at both doors from one event loop; when one closes, or cannot open, so does the other."""
    async with asyncio.TaskGroup() as both:
        first = both.create_task(inside.serve())
        second = both.create_task(outside.serve())
        await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
        inside.should_exit = outside.should_exit = True


if __name__ == "__main__":
    end_with_parent()
    logs.set_up("hub")
    # One line a request, and one a migration of its database: what happens to banks and runs, the daemon says.
    for chatty in ("flwr", "alembic", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    serve(load_server(Path(sys.argv[1])))

"""The hub's doors: outside the fleet's paths and health and nothing else, inside only this machine."""

import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from server.hub import FLEET_PATHS, LARGEST_REQUEST

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND")
PROTOBUF = {"content-type": "application/protobuf"}
UNSIGNED = (401, b'{"detail":"Invalid SuperNode authentication"}')
NOT_HTTP = (400, b"Invalid HTTP request received.")
"""What the server of HTTP says before the door is asked: the same to everyone."""
CONTROL = "/v1/control/list-nodes"
PULL = "/v1/fleet/pull-messages"


class Door:
    """The outside door, as anybody on the network sees it who has the consortium's certificate."""

    def __init__(self, port: int, ca: Path) -> None:
        self.port = port
        self._tls = ssl.create_default_context(cafile=str(ca))
        self.client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=self._tls, timeout=60)

    def says(self, request: bytes) -> list[tuple[int, bytes]]:
        """Send bytes as they are, and read until the hub closes; its answers, status and body."""
        with socket.create_connection(("127.0.0.1", self.port), 60) as plain:
            tls = self._tls.wrap_socket(plain, server_hostname="127.0.0.1")
            received = b""
            # A hub that has refused what it has read so far may reset the connection under the rest.
            with tls, suppress(ConnectionError, ssl.SSLEOFError):
                tls.sendall(request)
                while piece := tls.recv(65536):
                    received += piece
        return answers(received)

    def asked(self, target: str, *headers: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
        """Ask for a target just as it is written; a client library would tidy it up."""
        lines = [f"{method} {target} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}", *headers]
        if not any(line.startswith("Host:") for line in headers):
            lines.append("Host: 127.0.0.1")
        (answer,) = self.says("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return answer


def answers(received: bytes) -> list[tuple[int, bytes]]:
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
        status = int(head.split()[1])
        if status != 100:  # "go on" is no answer yet
            found.append((status, rest[:length]))
        received = rest[length:]
    return found


@pytest.fixture(scope="module")
def door(consortium: Any, make_loans: Any) -> Iterator[Door]:
    """A hub that is up, and a bank that is enrolled and does not run: the tests speak with its key."""
    for name in ("Lender A", "Lender B"):
        consortium.make_bank(name, make_loans(lenders=1, rows=20))
    consortium.start_hub()
    consortium.wait(lambda: consortium.up.saw("the hub answers"), 120, "the hub answers")
    made = Door(consortium.port, consortium.folder / "certificates" / "ca.pem")
    yield made
    made.client.close()


@pytest.fixture(scope="module")
def inside(consortium: Any) -> Iterator[httpx.Client]:
    tls = ssl.create_default_context(cafile=str(consortium.folder / "certificates" / "ca.pem"))
    with httpx.Client(base_url=f"https://127.0.0.1:{consortium.inside_port}", verify=tls, timeout=60) as client:
        yield client


# What is behind the door.


def test_every_route_that_flower_has_is_closed_outside(door: Door, inside: httpx.Client) -> None:
    routes = set(inside.get("/openapi.json").json()["paths"])
    assert {CONTROL, "/v1/control/start-run", "/v1/runtime/acquire-task", "/health"} | FLEET_PATHS <= routes
    assert inside.post(CONTROL, headers=PROTOBUF).status_code == 200  # inside, it asks nobody who he is
    more = {"/", "", "/docs", "/openapi.json", "/redoc", "/metrics", "/v1", "/v1/fleet", "/v1/fleet/", "/v2/fleet"}
    for path in sorted(routes | more):
        for method in METHODS:
            answer = door.client.request(method, path, headers=PROTOBUF)
            said = (answer.status_code, answer.content)
            if method == "POST" and path in FLEET_PATHS:
                assert said == UNSIGNED, path
            elif method == "GET" and path == "/health":
                assert said == (200, b"")
            else:
                assert said == (404, b""), (method, path)


def test_a_node_cannot_enrol_itself(door: Door, inside: httpx.Client) -> None:
    fleet = {path for path in inside.get("/openapi.json").json()["paths"] if path.startswith("/v1/fleet/")}
    assert fleet - FLEET_PATHS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}


@pytest.mark.parametrize(
    "target",
    [
        "//v1/control/list-nodes", "/v1//control/list-nodes", "/v1/control/list-nodes/", "/V1/CONTROL/LIST-NODES",
        "/v1/fleet/../control/list-nodes", "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes", "/v1/fleet/..%2fcontrol/list-nodes", "/v1/%63ontrol/list-nodes",
        "/v1%2fcontrol%2flist-nodes", "/health/../v1/control/list-nodes", "/health;/v1/control/list-nodes",
        "/v1/control/list-nodes?/health", "/v1/control/list-nodes?x=/v1/fleet/pull-messages",
        "https://127.0.0.1/v1/control/list-nodes", "http://inside:1/v1/control/list-nodes", "/./v1/control/list-nodes",
        "/v1/fleet/pull-messages%3f", "/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages/", "//v1/fleet/get-run",
        "/v1/fleet/PULL-MESSAGES", "/v1/fleet/get-run%20", "/health/", "/HEALTH", "/health%2f", "/healthz", "*",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_leads_elsewhere(door: Door, target: str) -> None:
    for method in ("GET", "POST"):
        assert door.asked(target, "Content-Type: application/protobuf", method=method) == (404, b"")


@pytest.mark.parametrize(
    "header",
    [
        "Host: localhost", "Host: evil.example", "Host: a/v1/control/list-nodes?", "Host: a#", "Host: @b/health?",
        "X-Original-URL: /v1/control/list-nodes", "X-Rewrite-URL: /v1/control/list-nodes",
        "X-Forwarded-Prefix: /v1/control", "X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1;proto=https",
        "X-HTTP-Method-Override: GET", "Expect: 100-continue", "Upgrade: h2c",
    ],
)  # fmt: skip
def test_no_header_opens_anything(door: Door, header: str) -> None:
    protobuf = "Content-Type: application/protobuf"
    assert door.asked(CONTROL, header, protobuf, method="POST")[0] == 404
    assert door.asked("/docs", header)[0] == 404
    # Flower's middleware decides by the path of the URL that it puts together from the header: it must still ask.
    assert door.asked(PULL, header, protobuf, method="POST")[0] == 401
    assert door.asked("/health", header) == (200, b"")


def test_other_protocols_get_nothing(door: Door) -> None:
    for target, status in (("/health", 200), ("/", 404), (CONTROL, 404), (PULL, 404)):
        websocket = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        assert door.asked(target, "Connection: Upgrade", *websocket) == (status, b"")
    assert door.says(b"GET /docs HTTP/1.0\r\n\r\n") == [(404, b"")]
    assert door.says(b"GET /health HTTP/1.0\r\n\r\n") == [(200, b"")]
    assert door.says(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") == [NOT_HTTP]
    assert door.says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == [NOT_HTTP]
    assert door.says(b"\0\1\2\3\r\n\r\n") == [NOT_HTTP]


def test_a_request_within_a_request_is_a_request_like_any(door: Door) -> None:
    inner = f"POST {CONTROL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    first = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    assert door.says(first + b"\r\n" + inner) == [(200, b""), (404, b"")]
    assert door.says(first + f"Content-Length: {len(inner)}\r\nConnection: close\r\n\r\n".encode() + inner) == [
        (200, b"")
    ]
    twice = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert door.says(twice.encode() + inner)[0] == NOT_HTTP
    two_lengths = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 4\r\n\r\n"
    assert door.says(two_lengths.encode() + inner)[0] == NOT_HTTP


def test_a_body_that_no_node_would_send_is_not_read(door: Door) -> None:
    head = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nConnection: close\r\n"
    too_long = (413, b"")
    assert door.says(f"{head}Content-Length: {LARGEST_REQUEST + 1}\r\n\r\n".encode() + b"x" * 1000) == [too_long]
    assert door.says(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"3\r\nabc\r\n0\r\n\r\n") == [too_long]
    # What is read is refused as well, for want of a signature or because it is no message.
    assert door.asked(PULL, "Content-Type: application/json", method="POST", body=b"{}")[0] == 415
    junk = door.asked(PULL, "Content-Type: application/protobuf", method="POST", body=b"\xff" * 1000)
    assert 400 <= junk[0] < 500
    assert b"Error parsing" not in junk[1]


# Who is at the door.


class Signer:
    """Signs as Flower's nodes do: a time, with the node's key; each part can be falsified."""

    def __init__(self, door: Door, key: ec.EllipticCurvePrivateKey) -> None:
        self.key, self.public, self._door = key, public_key_to_bytes(key.public_key()), door

    def headers(self, time: str = "", signed: str = "", public: bytes = b"") -> dict[str, str]:
        time = time or datetime.now(UTC).isoformat()
        return {
            **PROTOBUF,
            "flwr-public-key": b64encode(public or self.public).decode(),
            "flwr-timestamp": time,
            "flwr-signature": b64encode(sign_message(self.key, (signed or time).encode())).decode(),
        }

    def call(self, name: str, message: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        content = message.SerializeToString()
        return self._door.client.post(f"/v1/fleet/{name}", content=content, headers=headers or self.headers())

    def activate(self, public: bytes = b"") -> httpx.Response:
        return self.call("activate-node", ActivateNodeRequest(public_key=public or self.public, heartbeat_interval=30))


@pytest.fixture
def node(consortium: Any, door: Door) -> Iterator[tuple[Signer, int]]:
    """The node of Lender A, online."""
    with online(door, consortium.root / "lender-a") as found:
        yield found


class online:  # noqa: N801 - reads as a sentence
    """A bank's node by its own key: online while the block runs."""

    def __init__(self, door: Door, folder: Path) -> None:
        key = load_ssh_private_key((folder / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._signer = Signer(door, key)

    def __enter__(self) -> tuple[Signer, int]:
        answer = self._signer.activate()
        assert answer.status_code == 200, answer.text
        # The answer holds one number; a request with the same field reads it.
        self._id = int(DeactivateNodeRequest.FromString(answer.content).node_id)
        return self._signer, self._id

    def __exit__(self, *_: object) -> None:
        assert self._signer.call("deactivate-node", DeactivateNodeRequest(node_id=self._id)).status_code == 200


def test_a_call_without_the_right_signature_is_refused(node: tuple[Signer, int]) -> None:
    signer, number = node
    pull = PullMessagesRequest(node=Node(node_id=number))
    assert signer.call("pull-messages", pull).status_code == 200

    def refused(headers: dict[str, str]) -> None:
        answer = signer.call("pull-messages", pull, headers)
        assert (answer.status_code, answer.content) == UNSIGNED

    good = signer.headers()
    refused(PROTOBUF)
    for name in ("flwr-public-key", "flwr-timestamp", "flwr-signature"):
        refused({key: value for key, value in good.items() if key != name})
        refused({**good, name: ""})
        refused({**good, name: good["flwr-signature" if name != "flwr-signature" else "flwr-public-key"]})
    now = datetime.now(UTC)
    for shift in (timedelta(seconds=-310), timedelta(hours=-1), timedelta(days=-400), timedelta(seconds=60)):
        # To the byte what a node sent then, or a clock that is put forward would send.
        refused(signer.headers((now + shift).isoformat()))
    refused(signer.headers(now.replace(tzinfo=None).isoformat()))
    refused(signer.headers(now.isoformat(), signed=(now - timedelta(seconds=1)).isoformat()))
    stranger = Signer(signer._door, ec.generate_private_key(ec.SECP384R1()))
    refused(stranger.headers())
    refused(stranger.headers(public=signer.public))


def test_a_stranger_with_a_key_of_his_own_gets_in_nowhere(door: Door, node: tuple[Signer, int]) -> None:
    victim, number = node
    stranger = Signer(door, ec.generate_private_key(ec.SECP384R1()))
    assert stranger.activate().status_code == 412  # Flower: failed to activate
    assert stranger.activate(public=victim.public).status_code == 401
    register = ActivateNodeRequest(public_key=stranger.public)
    for name in ("register-node", "unregister-node"):
        answer = stranger.call(name, register)
        assert (answer.status_code, answer.content) == (404, b"")
    for path in FLEET_PATHS - {"/v1/fleet/activate-node", "/v1/fleet/deactivate-node"}:
        for wanted in (0, 1, number):
            message = PullMessagesRequest(node=Node(node_id=wanted))  # of every request the first field, or no request
            assert stranger.call(path.removeprefix("/v1/fleet/"), message).status_code in {400, 401}, path
    assert stranger.call("deactivate-node", DeactivateNodeRequest(node_id=number)).status_code == 401


def test_a_bank_cannot_speak_for_another(consortium: Any, door: Door, node: tuple[Signer, int]) -> None:
    _, victim = node
    with online(door, consortium.root / "lender-b") as (other, number):
        assert number != victim
        for wanted, status in ((victim, 401), (number, 200)):
            pull = PullMessagesRequest(node=Node(node_id=wanted))
            assert other.call("pull-messages", pull).status_code == status
        assert other.call("push-messages", PushMessagesRequest(node=Node(node_id=victim))).status_code == 401
        assert other.call("deactivate-node", DeactivateNodeRequest(node_id=victim)).status_code == 401


# Where the doors are.


def test_without_tls_nothing_is_said(consortium: Any, door: Door) -> None:
    for port in (consortium.port, consortium.inside_port):
        with socket.create_connection(("127.0.0.1", port), 60) as plain:
            received = b""
            with suppress(ConnectionError):
                plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                received = plain.recv(65536)
        assert b"HTTP" not in received
        assert len(received) < 16  # an alert of TLS at most


def test_nothing_listens_but_the_three_ports_on_loopback(consortium: Any, door: Door) -> None:
    pids = [consortium.up.pid, consortium.up.child("server.hub")]
    assert listening(pids) == {
        ("0100007F", consortium.port), ("0100007F", consortium.inside_port), ("0100007F", consortium.metrics_port),
    }  # fmt: skip


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Addresses (hexadecimal, as the kernel writes 127.0.0.1) and ports at which processes listen."""
    sockets = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                sockets.add(entry.readlink().name)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            address, _, port = words[1].partition(":")
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add((address, int(port, 16)))
    return found

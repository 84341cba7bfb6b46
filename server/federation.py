"""What the operator asks of the hub: who is in, who is online, start a run, stop it, how it stands.

The allow-list of `enrolment` is the truth; Flower's own list of nodes is made to agree with it.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from metarisk_common.bundle import RUN_KEY, app_bundle
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.files import write_atomically
from metarisk_common.flower_deployment import Control, RunStatus
from metarisk_common.plan import Plan

from .config import Server
from .enrolment import banks

_ONLINE = "online"
_GONE = "unregistered"
_CACHE_SECONDS = 2.0
PACKAGES = ("metarisk-federated", "flwr", "numpy")


class HubDownError(MetariskError):
    """The hub does not answer."""


@contextmanager
def control(server: Server) -> Iterator[Control]:
    """Speak to the hub.

    Raises:
        HubDownError: it does not answer.

    """
    try:
        with Control(server.inside_address, server.folder.ca_certificate.read_bytes()) as hub:
            yield hub
    except httpx.TransportError:
        raise HubDownError(
            f"the hub at {server.inside_address} does not answer; start it: metarisk-server up {server.folder.path}"
        ) from None
    except httpx.HTTPStatusError as error:
        raise MetariskError(f"the hub refused ({error.response.status_code}); its log says why") from None


def agree(server: Server) -> None:
    """Make Flower's list of nodes agree with the allow-list.

    Raises:
        httpx.HTTPError: the hub does not answer.

    """
    with Control(server.inside_address, server.folder.ca_certificate.read_bytes()) as hub:
        known = {bytes(node.public_key).hex(): node for node in hub.nodes() if node.status != _GONE}
        allowed = {bank.public_key: name for name, bank in banks(server.folder).items()}
        for key, name in allowed.items():
            if key not in known:
                hub.register(bytes.fromhex(key), name)
        for key, node in known.items():
            if key not in allowed:
                hub.unregister(node.node_id)


def online(server: Server) -> dict[str, bool]:
    """Tell of every enrolled bank whether its node is online.

    Raises:
        HubDownError: the hub does not answer.

    """
    with control(server) as hub:
        present = {bytes(node.public_key).hex() for node in hub.nodes() if node.status == _ONLINE}
    return {name: bank.public_key in present for name, bank in banks(server.folder).items()}


@dataclass
class CachedOnline:
    """`online` for metrics: asked at most every two seconds, and none while the hub is down."""

    server: Server
    clock: Callable[[], float]
    _asked: float | None = field(default=None, init=False)
    _answer: Mapping[str, bool] | None = field(default=None, init=False)

    def __call__(self) -> Mapping[str, bool] | None:
        """Tell which banks are online."""
        now = self.clock()
        if self._asked is None or now - self._asked > _CACHE_SECONDS:
            self._asked = now
            try:
                self._answer = online(self.server)
            except MetariskError:
                self._answer = None
        return self._answer


def prepare_run(server: Server, plan: Plan) -> Path:
    """Lay out the folder of a new run.

    Raises:
        ConfigError: fewer banks are enrolled than the plan's quorum, or the folder cannot be written.

    """
    enrolled = len(banks(server.folder))
    if enrolled < plan.outer.min_reports:
        raise ConfigError(
            f"the plan's quorum is {plan.outer.min_reports} and {enrolled} banks are enrolled; "
            "enroll more, or lower outer.min_reports"
        )
    info: dict[str, Any] = {
        "run_id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "consortium": server.config.name,
        "not_private": plan.mechanism.noise_multiplier == 0,
        "plan_hash": plan.hash(),
        "flower_runs": [],
        "versions": {package: version(package) for package in PACKAGES},
    }
    try:
        folder = _new_folder(server.folder.runs, re.sub(r"[^a-z0-9]+", "-", plan.name.lower()).strip("-") or "run")
        write_atomically(folder / "plan.json", plan.to_json().encode())
        write_atomically(folder / "run.json", json.dumps(info, indent=1).encode())
    except OSError as error:
        raise ConfigError(f"{server.folder.runs}: a run cannot be laid out here: {error.strerror}") from None
    return folder


def _new_folder(base: Path, name: str) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = base / f"{name}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def start(server: Server, folder: Path) -> int:
    """Have the hub start a run on its folder, anew or where it left off; returns Flower's number of it.

    Raises:
        HubDownError: the hub does not answer.
        MetariskError: the run goes on already.

    """
    standing = run_status(server, folder)
    if standing is not None and standing.status != "finished":
        raise MetariskError(f"{folder}: the run goes on already; see: metarisk-server status {folder.name}")
    with control(server) as hub:
        number = hub.start_run(app_bundle(), {RUN_KEY: folder.name})
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    info["flower_runs"].append(number)
    write_atomically(folder / "run.json", json.dumps(info, indent=1).encode())
    return number


def run_status(server: Server, folder: Path) -> RunStatus | None:
    """Tell how the newest start of a run stands; none if it was never started.

    Raises:
        HubDownError: the hub does not answer.

    """
    numbers = json.loads((folder / "run.json").read_text(encoding="utf-8"))["flower_runs"]
    if not numbers:
        return None
    with control(server) as hub:
        return status_of(hub, numbers[-1])


def status_of(hub: Control, number: int) -> RunStatus | None:
    """How a run stands; none where the hub has lost its database, and with it every earlier run.

    Raises:
        httpx.HTTPError: the hub does not answer.

    """
    try:
        return hub.run_status(number)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.NOT_FOUND:
            return None
        raise


def settle(server: Server) -> None:
    """Stop every run that the hub believes to go on: for a daemon that has just started, and so has none.

    Raises:
        httpx.HTTPError: the hub does not answer.

    """
    with Control(server.inside_address, server.folder.ca_certificate.read_bytes()) as hub:
        for path in server.folder.runs.glob("*/run.json"):
            with suppress(OSError, ValueError, KeyError, IndexError):  # What is no run's folder is none of ours.
                number = json.loads(path.read_text(encoding="utf-8"))["flower_runs"][-1]
                standing = status_of(hub, number)
                if standing is not None and standing.status == "running":
                    hub.stop_run(number)


def stop(server: Server, folder: Path) -> bool:
    """Stop a run; its finished rounds are kept. Returns whether it was going on.

    Raises:
        HubDownError: the hub does not answer.

    """
    standing = run_status(server, folder)
    if standing is None or standing.status == "finished":
        return False
    numbers = json.loads((folder / "run.json").read_text(encoding="utf-8"))["flower_runs"]
    with control(server) as hub:
        hub.stop_run(numbers[-1])
    return True

"""A bundle's code is never run, on either side: both run what is installed, and a bank says what it was sent."""

import io
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from metarisk_common.bundle import RUN_KEY, app_bundle, digest
from metarisk_common.flower_deployment import Control, RunStatus
from metarisk_common.plan import Plan
from server import federation
from server.config import load_server
from simulations.scenarios import load_scenario

NAMES = ("Lender A", "Lender B")
ROUNDS = 2


@pytest.fixture(scope="module")
def plan(make_scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    replace = {"rounds = 12": f"rounds = {ROUNDS}\nmin_reports = 2\ndeadline_seconds = 120"}
    return load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan()


@pytest.fixture(scope="module")
def banks(consortium: Any, plan: Plan, make_loans: Any) -> dict[str, Path]:
    """Two banks that are up, and the hub; folders by name."""
    frame: pl.DataFrame = make_loans(lenders=2)
    folders = {name: consortium.make_bank(name, frame.filter(pl.col("lender") == name)) for name in NAMES}
    consortium.approve(plan, *folders.values())
    consortium.start_hub()
    for folder in folders.values():
        consortium.start_bank(folder)
    consortium.wait_online(*NAMES)
    return folders


@pytest.fixture
def control(consortium: Any) -> Control:
    """What anybody on the operator's machine can do, past `metarisk-server run`."""
    server = load_server(consortium.folder)
    return Control(server.inside_address, server.folder.ca_certificate.read_bytes())


def bundle(files: Mapping[str, str], comment: bytes = b"") -> bytes:
    """The installed version's bundle, and more."""
    buffer = io.BytesIO(app_bundle())
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.comment = comment
    return buffer.getvalue()


def new_run(consortium: Any, plan: Plan) -> str:
    return str(federation.prepare_run(load_server(consortium.folder), plan).name)


def wait_end(consortium: Any, control: Control, number: int) -> RunStatus:
    def ended() -> RunStatus | None:
        with suppress(httpx.HTTPError):
            status = control.run_status(number)
            return status if status is not None and status.status == "finished" else None
        return None

    found = consortium.wait(ended, 180, "the end of the run")
    assert isinstance(found, RunStatus)
    return found


def counted(consortium: Any, folder: Path) -> tuple[int, int]:
    """Bundles that a bank has refused, and orders that it has answered."""
    told = json.loads(consortium.client("status", folder, "--json"))
    return told["bundles_refused"], told["answered"]


@pytest.mark.parametrize(
    "carried",
    [
        ("client/__init__.py", "client/app.py", "server/app.py"),
        ("metarisk_common/privacy.py", "server/app.py", "sitecustomize.py"),
        (),
    ],
    ids=["client", "common", "other bytes"],
)
def test_a_bank_refuses_a_bundle_that_is_not_the_installed_versions(
    consortium: Any,
    banks: dict[str, Path],
    control: Control,
    plan: Plan,
    tmp_path: Path,
    carried: tuple[str, ...],
) -> None:
    marker = tmp_path / "was-run"
    program = f"from pathlib import Path\nPath({str(marker)!r}).write_text(__file__)\n"
    evil = bundle(dict.fromkeys(carried, program), b"" if carried else b"a comment")
    said = f"it carries {', '.join(carried)};" if carried else "its SHA-256 is not approved;"
    before = {name: counted(consortium, banks[name]) for name in NAMES}
    run = new_run(consortium, plan)
    with control:
        wait_end(consortium, control, control.start_run(evil, {RUN_KEY: run}))
    assert len(consortium.journal(run)) == ROUNDS
    for record in consortium.journal(run):
        # Flower's code for a bundle that is not accepted.
        assert record["rejected"] == dict.fromkeys(NAMES, "flower-error-7")
        assert (record["admitted"], record["quorum"]) == ([], False)
    for name in NAMES:
        refused, answered = before[name]
        assert counted(consortium, banks[name]) == (refused + ROUNDS, answered)
        assert consortium.charges(banks[name], run) == []
        events = consortium.daemons[banks[name].name].events()
        lines = [event for event in events if str(event.get("event", "")).startswith(f"bundle refused: {said}")]
        assert [line["sha256"] for line in lines] == [digest(evil)] * ROUNDS
    assert not marker.exists()


def test_what_is_no_bundle_at_all_cannot_be_started(consortium: Any, banks: dict[str, Path], control: Control) -> None:
    with control, pytest.raises(httpx.HTTPStatusError):
        control.start_run(b"PK not an archive", {RUN_KEY: "loans-001"})
    assert consortium.online() == set(NAMES)


def test_a_run_plays_in_its_own_folder_and_nowhere_else(
    consortium: Any, banks: dict[str, Path], control: Control, plan: Plan, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    template = consortium.folder / "runs" / new_run(consortium, plan)
    for name in ("plan.json", "run.json"):
        (elsewhere / name).write_bytes((template / name).read_bytes())
    way_out = os.path.relpath(elsewhere, template.parent)
    answered = {name: counted(consortium, banks[name]) for name in NAMES}
    with control:
        numbers = [control.start_run(app_bundle(), {RUN_KEY: name}) for name in ("", "..", str(elsewhere), way_out)]
        for number in numbers:
            assert wait_end(consortium, control, number) == RunStatus(
                "finished",
                "failed",
                "the run's configuration names no run of this server; start runs with: metarisk-server run",
            )
    assert {path.name for path in elsewhere.iterdir()} == {"plan.json", "run.json"}
    assert {name: counted(consortium, banks[name]) for name in NAMES} == answered


def test_after_all_that_an_honest_run_completes(consortium: Any, banks: dict[str, Path], plan: Plan) -> None:
    before = {name: counted(consortium, banks[name]) for name in NAMES}
    run = consortium.start_run(plan)
    assert consortium.wait_end(run)["state"] == "completed"
    assert [record["admitted"] for record in consortium.journal(run)] == [list(NAMES)] * ROUNDS
    for name in NAMES:
        refused, answered = before[name]
        assert counted(consortium, banks[name]) == (refused, answered + ROUNDS)
        assert [charge.outcome for charge in consortium.charges(banks[name], run)] == ["released"] * ROUNDS

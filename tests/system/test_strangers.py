"""Who is not enrolled, or no longer, takes part in nothing."""

import signal
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.daemon import free_port
from metarisk_common.flower_deployment import Control
from metarisk_common.plan import Plan
from server.config import load_server
from server.enrolment import read_public_key
from simulations.scenarios import load_scenario

BIN = Path(sys.executable).parent
NAMES = ("Lender A", "Lender B")


@pytest.fixture(scope="module")
def plan(make_scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan that two banks suffice for."""
    replace = {"rounds = 12": "rounds = 2\nmin_reports = 2\ndeadline_seconds = 120"}
    return load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan()


def longer(plan: Plan, rounds: int) -> Plan:
    return plan.model_copy(update={"outer": plan.outer.model_copy(update={"rounds": rounds}), "name": "longer"})


@pytest.fixture(scope="module")
def banks(consortium: Any, plan: Plan, make_loans: Any) -> dict[str, Path]:
    """Two enrolled banks and one that is not, all of them up, and the hub."""
    frame: pl.DataFrame = make_loans()
    folders = {
        name: consortium.make_bank(name, frame.filter(pl.col("lender") == name), enrol=name in NAMES)
        for name in (*NAMES, "Lender C")
    }
    for each in (plan, longer(plan, 10)):
        consortium.approve(each, *folders.values())
    consortium.start_hub()
    for folder in folders.values():
        consortium.start_bank(folder)
    consortium.wait_online(*NAMES)
    return folders


def hub(consortium: Any) -> Control:
    server = load_server(consortium.folder)
    return Control(server.inside_address, server.folder.ca_certificate.read_bytes())


def nodes(consortium: Any) -> dict[str, str]:
    """What Flower knows of nodes: the state of each by its name, which is "" for one that has enrolled itself."""
    with hub(consortium) as control:
        return {node.name: node.status for node in control.nodes()}


def test_a_bank_that_is_not_enrolled_is_not_there(consortium: Any, banks: dict[str, Path], plan: Plan) -> None:
    stranger = consortium.daemons["lender-c"]
    consortium.wait(lambda: stranger.saw("the node ended with code"), 120, "the hub sends Lender C away")
    run = consortium.start_run(plan)
    assert consortium.wait_end(run)["state"] == "completed"
    assert [(record["cohort"], record["admitted"]) for record in consortium.journal(run)] == [(2, list(NAMES))] * 2
    assert consortium.online() == set(NAMES)
    assert set(nodes(consortium)) == set(NAMES)
    assert consortium.charges(banks["Lender C"], run) == []
    assert stranger.process.poll() is None  # it waits to be enrolled


def test_a_bank_that_is_enrolled_later_gets_in_and_once_revoked_is_out(
    consortium: Any, banks: dict[str, Path], plan: Plan
) -> None:
    """Its daemon runs all the time."""
    name, daemon = "Lender C", consortium.daemons["lender-c"]
    consortium.server("enroll", name, banks[name] / "node.pub", "--folder", consortium.folder)
    consortium.wait_online(name)
    run = consortium.start_run(longer(plan, 10))
    consortium.wait(lambda: any(name in record["admitted"] for record in consortium.journal(run)), 120, "a round of C")
    before = sum(event.get("event", "").startswith("the node ended") for event in daemon.events())
    consortium.server("revoke", name, "--folder", consortium.folder)
    revoked_in = len(consortium.journal(run)) + 1  # the round that may be on its way already
    assert consortium.wait_end(run)["state"] == "completed"
    after = consortium.journal(run)[revoked_in:]
    assert len(after) > 2
    for record in after:
        assert (record["cohort"], record["admitted"]) == (2, list(NAMES))
        assert name not in {*record["refused"], *record["rejected"], *record["absent"]}
    consortium.wait(
        lambda: sum(event.get("event", "").startswith("the node ended") for event in daemon.events()) > before,
        120,
        "the hub sends Lender C away again",
    )
    assert consortium.online() == set(NAMES)
    told = consortium.server("enroll", name, banks[name] / "node.pub", "--folder", consortium.folder, code=2)
    assert "revoked" in told
    assert daemon.end() == 0


def test_a_node_registered_behind_the_operators_back_is_in_no_cohort(
    consortium: Any, banks: dict[str, Path], plan: Plan, make_loans: Any
) -> None:
    """Whoever can speak to the hub on loopback can make Flower take a node, even under an enrolled bank's name; not us:
    the allow-list is asked in every round.
    """
    folder = consortium.make_bank("Lender E", make_loans(lenders=1), enrol=False)
    consortium.approve(plan, folder)
    with hub(consortium) as control:
        number = control.register(read_public_key(folder / "node.pub"), "Lender A")
        node = consortium.start_program("uninvited", sys.executable, "-m", "client.node", folder, free_port())
        consortium.wait(
            lambda: any(node.node_id == number and node.status == "online" for node in control.nodes()),
            120,
            "Flower takes the node",
        )
    run = consortium.start_run(plan)
    assert consortium.wait_end(run)["state"] == "completed"
    assert [(record["cohort"], record["admitted"]) for record in consortium.journal(run)] == [(2, list(NAMES))] * 2
    assert consortium.online() == set(NAMES)
    # Whatever command next changes the list puts Flower's right.
    consortium.server("enroll", NAMES[0], banks[NAMES[0]] / "node.pub", "--folder", consortium.folder)
    with hub(consortium) as control:
        assert {node.status for node in control.nodes() if node.node_id == number} <= {"unregistered"}
    node.end(signal.SIGKILL)


def test_flowers_own_node_without_a_key_gets_nowhere(consortium: Any, banks: dict[str, Path], tmp_path: Path) -> None:
    command = [BIN / "flower-supernode", "--superlink", f"127.0.0.1:{consortium.port}", "--isolation", "process"]
    command += ["--max-retries", 3, "--host", "127.0.0.1", "--port"]
    consortium.environment |= {"FLWR_HOME": str(tmp_path)}
    ca = consortium.folder / "certificates" / "ca.pem"
    keyless = consortium.start_program("keyless", *command, free_port(), "--root-certificates", ca)
    insecure = consortium.start_program("insecure", *command, free_port(), "--insecure")
    known = nodes(consortium)
    for node in (keyless, insecure):
        consortium.wait(lambda node=node: node.process.poll() is not None, 120, f"{node.log.stem} gives up")
        assert node.process.returncode != 0
    assert nodes(consortium) == known
    assert "404" in keyless.log.read_text()


def test_a_bank_with_another_consortiums_certificate_does_not_talk_to_the_hub(
    consortium: Any, banks: dict[str, Path], plan: Plan, make_loans: Any, tmp_path: Path
) -> None:
    folder = consortium.make_bank("Lender D", make_loans(lenders=1))
    consortium.server("init", tmp_path / "other", "--name", "other", "--host", "127.0.0.1")
    (folder / "ca.pem").write_bytes((tmp_path / "other" / "certificates" / "ca.pem").read_bytes())
    node = consortium.start_program("wrong-ca", sys.executable, "-m", "client.node", folder, free_port())
    consortium.wait(lambda: node.process.poll() is not None, 120, "the bank's node ends; its daemon would try it again")
    assert node.process.returncode != 0
    assert node.saw("SSL/TLS handshake error")
    assert nodes(consortium)["Lender D"] == "registered"  # and never online

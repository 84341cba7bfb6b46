"""Twenty banks for twenty rounds: no reply is lost, and the server's processes do not grow."""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from metarisk_common.plan import Plan
from simulations.scenarios import load_scenario

BANKS = 20
ROUNDS = 20
SETTLED = 8
"""Rounds until everything that is loaded late, is loaded, and every cache is full."""
GROWTH_BYTES = 12_000_000
"""Over 11 rounds, and so 220 replies. What allocators and SQLite's cache keep is below it."""
LIGHT_BANK = Path(__file__).with_name("light_bank.py")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def plan(make_scenario: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    replace = {"rounds = 12": f"rounds = {ROUNDS}\nmin_reports = {BANKS}\ndeadline_seconds = 120"}
    return load_scenario(make_scenario(tmp_path_factory.mktemp("plan"), replace=replace)).plan()


@pytest.mark.soak
def test_twenty_banks_for_twenty_rounds(consortium: Any, plan: Plan) -> None:
    path = consortium.root / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    names = [f"Bank {number:02d}" for number in range(1, BANKS + 1)]
    hub = consortium.start_hub()
    for name in names:
        key = generate_private_key(SECP256R1())
        private, public = (consortium.root / f"{name}.{end}" for end in ("key", "pub"))
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        consortium.server("enroll", name, public, "--folder", consortium.folder)
    consortium.wait(lambda: hub.saw("the hub answers"), 120, "the hub knows the allow-list")
    authority = consortium.folder / "certificates" / "ca.pem"
    for name in names:
        place = f"127.0.0.1:{consortium.port}"
        key_file = consortium.root / f"{name}.key"
        consortium.start_program(name, sys.executable, LIGHT_BANK, place, authority, key_file, name, path)
    consortium.wait_online(*names)

    run = consortium.start_run(plan)
    consortium.wait_round(run, SETTLED)
    watched = {name: hub.child(name) for name in ("server.hub", "server.run_process")}
    before = {name: resident_bytes(pid) for name, pid in watched.items()}
    worked = cpu_seconds(watched["server.hub"])
    consortium.wait_round(run, ROUNDS - 1)
    after = {name: resident_bytes(pid) for name, pid in watched.items()}
    worked = (cpu_seconds(watched["server.hub"]) - worked) / (ROUNDS - 1 - SETTLED)
    assert consortium.wait_end(run)["state"] == "completed"

    journal = consortium.journal(run)
    assert [record["admitted"] for record in journal] == [names] * ROUNDS
    assert all(not (record["refused"] or record["rejected"] or record["absent"]) for record in journal)
    median = statistics.median(record["seconds"] for record in journal[SETTLED:])
    kept = sum(path.stat().st_size for path in consortium.folder.glob("superlink.sqlite*"))
    print(f"{BANKS} banks: {median:.1f} s a round, the hub's core busy for {worked:.1f} s of it")  # noqa: T201 - for docs
    print(f"bytes in memory, after round {SETTLED} and {ROUNDS - 1}: {before}, {after}; database {kept}")  # noqa: T201
    grown = {name: after[name] - before[name] for name in watched}
    assert all(growth < GROWTH_BYTES for growth in grown.values()), grown

"""The bank's SuperNode waits as long as is wise, drains, and is started with what the bank has decided."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.config import load_institution
from client.node import LINGER_SECONDS, LONGEST_POLL_SECONDS, SHORTEST_POLL_SECONDS, Patience, arguments
from client.turns import patience
from metarisk_common.errors import ConfigError


class World:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.drained = 0

    def patience(self) -> Patience:
        return Patience(lambda: self.now, self.sleep, self.drain)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def drain(self) -> None:
        self.drained += 1


def test_waiting_adds_a_tenth_at_most_and_an_idle_bank_hardly_asks() -> None:
    world = World()
    wait = world.patience()
    while world.now < 600:
        before = world.now
        wait(3.0)
        assert world.now - before <= max(SHORTEST_POLL_SECONDS, 0.1 * before) + 1e-9
        assert world.now - before <= LONGEST_POLL_SECONDS + 1e-9
    assert world.slept[0] == SHORTEST_POLL_SECONDS
    assert world.slept[-1] == LONGEST_POLL_SECONDS


def test_work_makes_it_look_often_again() -> None:
    world = World()
    wait = world.patience()
    while world.now < 100:
        wait(3.0)
    wait(0.5)
    assert world.slept[-1] <= SHORTEST_POLL_SECONDS
    wait(3.0)
    assert world.slept[-1] == SHORTEST_POLL_SECONDS


def test_it_drains_only_with_nothing_in_hand() -> None:
    world = World()
    wait = world.patience()
    wait.draining = True
    wait(0.5)
    assert world.drained == 0
    wait(3.0)
    assert world.drained == 1


def test_a_drained_node_leaves_its_answer_time_to_be_fetched_and_takes_no_order_meanwhile() -> None:
    world = World()
    left: list[float] = []
    wait = Patience(lambda: world.now, world.sleep, lambda: left.append(world.now))
    for _ in range(10):
        wait(0.5)
    delivered = world.now
    wait.draining = True
    wait(3.0)
    assert left == [delivered + LINGER_SECONDS]


def test_a_node_that_was_idle_anyway_leaves_at_once() -> None:
    world = World()
    wait = world.patience()
    while world.now < 2 * LINGER_SECONDS:
        wait(3.0)
    wait.draining, before = True, len(world.slept)
    wait(3.0)
    assert world.slept[before] == 0
    assert world.drained == 1


def test_a_node_of_which_a_thread_has_failed_ends() -> None:
    program = """
import threading
from client.node import end_with_any_thread
end_with_any_thread()
threading.Thread(target=lambda: 1 / 0).start()
threading.Event().wait(60)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM
    assert "ZeroDivisionError" in ended.stderr


@pytest.mark.parametrize(("idle", "expected"), [(0.0, 1.0), (20.0, 2.0), (1e9, 5.0)])
def test_patience(idle: float, expected: float) -> None:
    assert patience(idle, 1.0, 5.0) == expected


def test_a_bank_without_a_server_is_told_what_is_missing(
    tmp_path: Path, make_bank: Any, plan: Any, make_loans: Any
) -> None:
    folder = make_bank(tmp_path / "bank", plan, make_loans().filter(lender="Lender A"))
    with pytest.raises(ConfigError, match=r"\[server\]"):
        arguments(load_institution(folder), 1)


def test_the_key_the_authority_and_the_secret_are_the_banks_own(
    tmp_path: Path, make_bank: Any, plan: Any, make_loans: Any
) -> None:
    folder = make_bank(tmp_path / "bank", plan, make_loans().filter(lender="Lender A"))
    config = folder / "institution.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text + '\n[server]\naddress = "hub.example.org:9092"\n', encoding="utf-8")
    given = arguments(load_institution(folder), 4711)
    said = dict(zip(given[::2], given[1::2], strict=True))
    assert said["--superlink"] == "hub.example.org:9092"
    assert said["--root-certificates"] == str(folder / "ca.pem")
    assert said["--auth-supernode-private-key"] == str(folder / "node.key")
    assert said["--superexec-auth-secret-file"] == str(folder / "superexec.secret")
    assert (said["--host"], said["--port"]) == ("127.0.0.1", "4711")
    assert "--insecure" not in given

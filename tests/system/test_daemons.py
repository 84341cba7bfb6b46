"""Daemons start or say in one line why not, are alone on their folder, and end without leaving anything behind."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def bank(consortium: Any, make_loans: Any) -> Path:
    """A bank that is up, and the hub."""
    folder: Path = consortium.make_bank("Lender A", make_loans(lenders=1))
    consortium.start_hub()
    consortium.start_bank(folder)
    consortium.wait_online("Lender A")
    return folder


def refusal(consortium: Any, *command: object) -> tuple[int, str]:
    """Run a command that ends by itself; its exit code, and the one line that is for people."""
    environment = dict(consortium.environment)
    words = [str(BIN / str(command[0])), *map(str, command[1:])]
    done = subprocess.run(words, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == ""
    said = []
    for line in done.stderr.splitlines():
        try:
            assert isinstance(json.loads(line), dict)
        except ValueError:
            said.append(line)
    assert len(said) == 1, done.stderr
    return done.returncode, said[0].removeprefix("error: ")


def edited(old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "institution.toml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return edit


def damage_ledger(folder: Path) -> None:
    path = folder / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "code", "said"),
    [
        (edited("declared_size = 220", "declared_size = many"), 2, "institution.toml"),
        (edited("declared_size = 220", "declared_size = -1"), 2, "declared_size"),
        (edited("[server]", "[serwer]"), 2, "serwer"),
        (lambda folder: (folder / "institution.toml").unlink(), 2, "institution.toml"),
        (damage_ledger, 5, "ledger"),
    ],
    ids=["no toml", "nonsense", "unknown section", "no configuration", "damaged ledger"],
)
def test_a_bank_that_cannot_serve_says_why_in_one_line(
    consortium: Any, bank: Path, tmp_path: Path, harm: Callable[[Path], object], code: int, said: str
) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(bank, folder, ignore=shutil.ignore_patterns("home", "*.lock"))
    harm(folder)
    got, line = refusal(consortium, "metarisk-client", "up", folder)
    assert got == code
    assert said in line


def test_a_bank_without_a_server_serves_nobody(consortium: Any, bank: Path, tmp_path: Path, make_loans: Any) -> None:
    make_loans(lenders=1).write_csv(tmp_path / "loans.csv")
    consortium.client(
        "init", tmp_path / "bank", "--name", "Lender Z", "--data", tmp_path / "loans.csv", "--declared-size", 220,
        "--delta", "1e-4", "--epsilon", 1, "--yes",
    )  # fmt: skip
    code, line = refusal(consortium, "metarisk-client", "up", tmp_path / "bank")
    assert code == 2
    assert "[server]" in line


def test_a_bank_whose_noise_is_seeded_does_not_serve(consortium: Any, bank: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(bank, folder, ignore=shutil.ignore_patterns("home", "*.lock"))
    edited("[metrics]", "[simulation]\nseed = 1\n[metrics]")(folder)
    command = [BIN / "metarisk-client", "up", folder]
    done = subprocess.run(
        [*map(str, command)], env=consortium.environment, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in {1, 2}
    assert "seeds the noise" in done.stderr
    assert "Traceback" not in done.stderr
    assert consortium.online() == {"Lender A"}


def test_a_port_that_is_taken_is_named(consortium: Any, bank: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        folder = tmp_path / "bank"
        shutil.copytree(bank, folder, ignore=shutil.ignore_patterns("home", "*.lock"))
        edited("port = 0", f"port = {port}")(folder)
        code, line = refusal(consortium, "metarisk-client", "up", folder)
        assert (code, f"port {port} of 127.0.0.1" in line) == (2, True)
        consortium.server("init", tmp_path / "server", "--name", "s", "--host", "127.0.0.1", "--metrics-port", port)
        code, line = refusal(consortium, "metarisk-server", "up", tmp_path / "server")
        assert (code, f"port {port} of 127.0.0.1" in line) == (2, True)


def test_a_folder_has_one_daemon(consortium: Any, bank: Path) -> None:
    for command, folder in (("metarisk-client", bank), ("metarisk-server", consortium.folder)):
        code, line = refusal(consortium, command, "up", folder)
        assert code == 1
        assert "another daemon serves this" in line
    assert consortium.online() == {"Lender A"}


def test_sigterm_ends_a_daemon_and_all_that_it_started(consortium: Any, bank: Path) -> None:
    daemon = consortium.daemons[bank.name]
    assert daemon.child("client.node")
    assert daemon.child("client.worker")
    assert daemon.end() == 0  # and its children are gone
    assert not json.loads(consortium.client("status", bank, "--json"))["served"]
    assert consortium.online() == set()
    # Nothing of it holds the folder: it can be served again, and once the hub is gone it ends as well.
    again = consortium.start_bank(bank)
    consortium.wait_online("Lender A")
    assert consortium.up.child("server.hub")
    assert consortium.up.end() == 0
    assert again.end() == 0
    for log in (again.log, consortium.up.log):
        assert "Traceback" not in log.read_text()

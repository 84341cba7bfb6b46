"""What an operator and a bank deploy and read: units, images, and documents whose commands the programs take."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from client import daemon as client_daemon
from client.cli import app as client_app
from client.counters import count_answer
from client.metrics import BankCollector
from metarisk_common.errors import BudgetExhaustedError, ConfigError, IntegrityError, RefusedError
from metarisk_common.plan import OuterLoop, Plan
from metarisk_common.wire import REFUSAL_CODES
from server import daemon as server_daemon
from server.cli import app as server_app
from server.metrics import ServerCollector
from simulations.cli import app as simulate_app

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DEPLOY = ROOT / "docs" / "deploy"
DOCUMENTS = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
APPS = {"metarisk-server": server_app, "metarisk-client": client_app, "metarisk-simulate": simulate_app}

UNITS = {"metarisk-server.service": server_daemon, "metarisk-client@.service": client_daemon}
IMAGES = {"server.Dockerfile": "metarisk-server", "client.Dockerfile": "metarisk-client"}
HARDENING = {
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "LimitCORE": "0",
    "UMask": "0077", "CapabilityBoundingSet": "", "KillMode": "mixed", "Restart": "on-failure",
}  # fmt: skip
VERDICTS = (
    "protocol", "name", "node", "order", "event", "duplicate", "ledger", "size", "shape", "not-finite", "norm",
    *(f"flower-error-{code}" for code in (2, 3, 4, 5, 7, 8)),
)  # fmt: skip


def accept(words: list[str]) -> None:
    """Parse a command line as its program would, and run nothing; raises click.UsageError for what it does not know."""
    command: click.Command = typer.main.get_command(APPS[words[0]])
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.commands.get(rest[0]) if rest else None
        if found is None:
            raise click.UsageError(f"{words[0]} has no such command: {rest[:1]}")
        command, rest = found, rest[1:]
    command.make_context(words[0], rest)


def commands_of(document: Path) -> Iterator[list[str]]:
    """The lines in a document's blocks, or in a file's comments, that call our programs."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.split(" 2> ")[0].split(" > ")[0], comments=True) if "metarisk-" in line else []
        if words and words[0] in APPS:
            yield words


def test_what_the_programs_do_not_know_is_noticed() -> None:
    accept(["metarisk-client", "ledger", "show", "bank"])
    for wrong in (
        "metarisk-server upp",
        "metarisk-server up --port 1",
        "metarisk-client ledger",
        "metarisk-server run a b",
    ):
        with pytest.raises(click.UsageError):
            accept(wrong.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_the_documents_are_taken(document: Path) -> None:
    found = list(commands_of(document))
    assert found or document.name == "threat-model.md"
    for words in found:
        try:
            accept(words)
        except click.UsageError as error:
            pytest.fail(f"{document.name}: {shlex.join(words)}: {error.message}")


# systemd.


def unit(name: str) -> dict[str, list[str]]:
    """Every setting of a unit, in any section, with its values in order."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_starts_an_installed_command_with_flags_that_it_takes(name: str) -> None:
    (start,) = unit(name)["ExecStart"]
    program, *arguments = start.split()
    assert (Path(program).parent.as_posix(), Path(program).name in SCRIPTS) == ("/opt/metarisk/bin", True)
    accept([Path(program).name, *arguments])


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_confined(name: str) -> None:
    found = unit(name)
    assert {key: found.get(key) for key in HARDENING} == {key: [value] for key, value in HARDENING.items()}
    assert found["User"] == ["metarisk"]
    (writable,), (start,) = found["ReadWritePaths"], found["ExecStart"]
    assert start.split()[-1].startswith(writable)


@pytest.mark.parametrize("name", UNITS)
def test_what_only_a_person_can_mend_is_not_started_again(name: str) -> None:
    (codes,) = unit(name)["RestartPreventExitStatus"]
    assert set(map(int, codes.split())) == {ConfigError.exit_code, RefusedError.exit_code, IntegrityError.exit_code}
    assert BudgetExhaustedError.exit_code not in map(int, codes.split())


def test_a_stop_waits_for_the_answer_in_hand() -> None:
    (bank,), (hub,) = (unit(name)["TimeoutStopSec"] for name in ("metarisk-client@.service", "metarisk-server.service"))
    assert int(bank) > client_daemon._ANSWER_SECONDS + 2 * client_daemon._DRAIN_SECONDS
    assert int(hub) > server_daemon._HUB_END_SECONDS + 2 * server_daemon._RUN_END_SECONDS


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this system has no systemd")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_a_unit_as_it_is(name: str, tmp_path: Path) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    rendered = tmp_path / name.replace("@", "@first")
    # Programs and users must exist where a unit is verified: this environment's, and no user of its own.
    rendered.write_text(
        re.sub(r"^(User|Group)=.*\n", "", text.replace("/opt/metarisk/bin", str(BIN)), flags=re.MULTILINE)
    )
    command = ["systemd-analyze", "verify", "--recursive-errors=no", str(rendered)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    said = [line for line in result.stderr.splitlines() if rendered.name in line]
    assert (result.returncode, said) == (0, [])


# Images.


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile in order; comments left out, continued lines joined."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", plain).splitlines()
    return [(words[0], words[1]) for line in lines if len(words := line.split(None, 1)) == 2]


def last_stage(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in instructions(name):
        if key == "FROM":
            found = {}
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_of_a_version_that_is_named(name: str) -> None:
    bases = [value.split()[0] for key, value in instructions(name) if key == "FROM"]
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+-slim", base) for base in bases)


@pytest.mark.parametrize("name", IMAGES)
def test_only_what_the_distribution_is_made_of_enters_an_image(name: str) -> None:
    ignored = (DEPLOY / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = [value.split() for key, value in instructions(name) if key in {"COPY", "ADD"} and "--from=" not in value]
    sources = {source for words in copied for source in words[:-1]}
    assert sources == let_in
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert sources >= {"metarisk_common", "server", "client", "simulations", "requirements.lock", "pyproject.toml"}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_no_secret(name: str) -> None:
    for key, value in instructions(name):
        if key in {"ENV", "ARG", "LABEL"}:
            assert not re.search("secret|passw|token|key", value, flags=re.IGNORECASE), value


@pytest.mark.parametrize(("name", "program"), IMAGES.items())
def test_an_image_runs_its_daemon_as_nobody_in_particular(name: str, program: str) -> None:
    stage = last_stage(name)
    assert [user for user in stage["USER"] if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)] == []
    (command,) = stage["CMD"]
    words = json.loads(command)
    assert (words[0], words[1]) == (program, "up")
    accept(words)
    assert "ENTRYPOINT" not in stage
    assert stage["STOPSIGNAL"] == ["SIGTERM"]
    assert stage.get("EXPOSE", []) == (["9092"] if program == "metarisk-server" else [])


@pytest.mark.parametrize("name", IMAGES)
def test_the_health_of_an_image_is_asked_by_a_program_that_parses(name: str) -> None:
    (health,) = last_stage(name)["HEALTHCHECK"]
    words = json.loads(health.partition(" CMD ")[2])
    assert words[:2] == ["python", "-c"]
    ast.parse(words[2])


@pytest.mark.parametrize("name", [*IMAGES, *UNITS])
def test_the_commands_in_a_files_head_are_taken(name: str) -> None:
    head = "\n".join(line[1:] for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    joined = re.sub(r"\\\n\s*", " ", head)
    ours = r"(?:^ +|[\w.-]+ )(metarisk-(?:server|client) (?:init|status|up|check|approve)\b[^.\n]*)"
    found = [shlex.split(words) for line in joined.splitlines() for words in re.findall(ours, line)]
    assert found
    for words in found:
        accept([word for word in words if word != "..."])


# The documents say all there is.


def section(document: str, heading: str) -> str:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    assert heading in text
    return text[text.index(heading) :]


def test_every_reason_to_refuse_and_every_verdict_is_explained() -> None:
    refused, rejected = section("operator.md", "**What a bank refused**").split("**What admission turned away**")
    assert [code for code in REFUSAL_CODES if f"| `{code}` |" not in refused] == []
    assert [code for code in VERDICTS if f"`{code}`" not in rejected] == []


def test_every_metric_is_explained(tmp_path: Path, make_bank: Any, make_loans: Any, plan: Plan) -> None:
    bank = make_bank(tmp_path / "bank", plan, make_loans().head(220))
    count_answer(bank, kind="report", now=1.0)
    (tmp_path / "runs").mkdir()
    for document, collector in (
        ("operator.md", ServerCollector(tmp_path / "runs", dict)),
        ("bank.md", BankCollector(bank)),
    ):
        text = section(document, "**Metrics**")
        names = [f"{found.name}_total" if found.type == "counter" else found.name for found in collector.collect()]
        assert len(names) > 4
        assert [name for name in names if f"`{name}`" not in text] == []


def test_the_plan_of_the_operators_page_is_one_and_names_every_key_of_the_outer_loop() -> None:
    page = section("operator.md", "## 3. The plan")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    plan = Plan.model_validate(tomllib.loads(text))
    assert plan.metrics is not None
    outer = text[text.index("[outer]") : text.index("[metrics]")]
    assert [key for key in OuterLoop.model_fields if not re.search(rf"^(# )?{key} = ", outer, re.MULTILINE)] == []

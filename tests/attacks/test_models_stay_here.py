"""What a bank adapts, scores and explains has no way out: no import leads there from an answer, or from there out."""

import ast
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.adapt import Choice, Start, adapt_model
from client.artifacts import Origin
from client.bank import Bank
from client.cli import app
from client.config import load_institution
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan
from metarisk_common.wire import TrainOrder, TrainReport, decode_reply, encode_order, report_to_bytes

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("metarisk_common", "server", "client", "simulations")

MODELS = frozenset(
    f"client.{name}"
    for name in (
        "adapt", "artifacts", "explain", "explanation", "explanation_page", "model_cli", "points", "reasons", "score",
        "stream",
    )
)  # fmt: skip
"""Everything that holds or makes an adapted model."""
ANSWERING = tuple(
    f"client.{name}" for name in ("app", "bank", "worker", "node", "daemon", "training", "scoring", "run_cli", "turns")
)
"""Everything that has a hand in what a bank sends."""
NETWORK = frozenset({
    "asyncio", "fastapi", "flwr", "ftplib", "grpc", "http", "httpx", "imaplib", "multiprocessing", "poplib",
    "prometheus_client", "requests", "smtplib", "socket", "socketserver", "sqlalchemy", "ssl", "subprocess",
    "telnetlib", "urllib", "urllib3", "uvicorn", "websockets", "xmlrpc",
})  # fmt: skip
"""Whatever opens a connection, or starts a program that could; our own wire besides."""
DATABASE = "client.source_sql"
"""The one door: a bank's labels may lie in its own database, which this module reads. It is held to more below."""


BY_CALL = "imported by a call"


def imports_of(name: str, path: Path) -> set[str]:
    """What a module imports, wherever in it: our own modules by their full names, others by their roots."""
    package = name.split(".", maxsplit=1)[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            found.add(f"{BY_CALL}: {ast.unparse(node)}")
    return {
        module if module.split(".")[0] in PACKAGES or module.startswith(BY_CALL) else module.split(".")[0]
        for module in found
    }


def graph() -> dict[str, set[str]]:
    paths = {f"{package}.{path.stem}": path for package in PACKAGES for path in (ROOT / package).glob("*.py")}
    return {name: imports_of(name, path) for name, path in paths.items()}


def reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    """Every module that importing `start` may load."""
    found, waiting = set[str](), [start]
    while waiting:
        for name in edges.get(waiting.pop(), set()) - found:
            found.add(name)
            waiting.append(name)
    return found


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return graph()


def test_the_walk_finds_a_way_where_there_is_one(edges: dict[str, set[str]], tmp_path: Path) -> None:
    assert "metarisk_common.wire" in reached("client.app", edges)
    assert "flwr" in reached("client.bank", edges)
    assert reached("client.cli", edges) >= MODELS
    planted = tmp_path / "planted.py"
    planted.write_text(
        "def late():\n    from . import adapt\n    import importlib\n    importlib.import_module('flwr')\n"
    )
    assert {"client.adapt", "importlib", "imported by a call: importlib.import_module('flwr')"} <= imports_of(
        "client.planted", planted
    )


@pytest.mark.parametrize("start", ANSWERING)
def test_nothing_that_answers_an_order_reaches_a_model(edges: dict[str, set[str]], start: str) -> None:
    assert start in edges
    assert reached(start, edges) & MODELS == set()
    by_call = {name for name in reached(start, edges) if name.startswith(BY_CALL)}
    assert by_call <= {f"{BY_CALL}: importlib.import_module('ray')"}, "what a call imports, this walk cannot follow"


@pytest.mark.parametrize("start", sorted(MODELS))
def test_nothing_that_holds_a_model_reaches_the_network(edges: dict[str, set[str]], start: str) -> None:
    assert start in edges
    found = reached(start, {**edges, DATABASE: set()})
    # The ledger's own text is all that a command line shares with an answer: it signs and stores, and sends nothing.
    assert {name for name in found if name.split(".")[0] in NETWORK or name in ANSWERING} == set()
    assert {"metarisk_common.wire", "metarisk_common.bundle"} & found == set()
    assert {name for name in found if name.startswith(("metarisk_common.flower", "server", "simulations"))} == set()
    assert [name for name in found if name.startswith(BY_CALL)] == []


def test_the_door_to_the_database_lets_nothing_of_a_model_out(edges: dict[str, set[str]]) -> None:
    """It alone knows of databases, one module alone asks it, and what it is told is a configuration and names."""
    assert {name for name, used in edges.items() if "sqlalchemy" in used} == {DATABASE}
    assert {name for name, used in edges.items() if {DATABASE, f"{DATABASE}.database_batches"} & used} == {
        "client.sources"
    }
    assert reached(DATABASE, edges) & MODELS == set()
    assert {name for name in reached(DATABASE, edges) if name.split(".")[0] in NETWORK} == {"sqlalchemy"}
    asked = ast.parse((ROOT / "client" / "source_sql.py").read_text(encoding="utf-8"))
    (door,) = [node for node in asked.body if isinstance(node, ast.FunctionDef) and node.name == "database_batches"]
    assert [argument.arg for argument in door.args.args] == ["folder", "table", "own", "where"]
    called = {ast.unparse(node.func) for node in ast.walk(asked) if isinstance(node, ast.Call)}
    assert not {name for name in called if name.split(".")[-1] in {"insert", "update", "delete", "commit", "begin"}}


def test_only_the_command_line_knows_of_models(edges: dict[str, set[str]]) -> None:
    users = {name for name, used in edges.items() if used & MODELS} - MODELS
    assert users == {"client.cli"}


def adapted(bank: Path, plan: Plan) -> Path:
    origin = Origin(sha256="ab" * 32, run_id="run", plan_hash=plan.hash(), signed_by=None, not_private=False)
    start = Start(initial_params(plan, Encoder(plan.data).width), plan, origin, None)
    return adapt_model(load_institution(bank), start, Choice(50, "prox", seed=1)).folder


def test_a_reply_is_the_same_bytes_whatever_models_the_bank_has(
    tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], plan: Plan
) -> None:
    order = TrainOrder("run", 1, plan.hash(), initial_params(plan, Encoder(plan.data).width))
    replies: list[bytes] = []
    fields: list[list[tuple[str, list[str]]]] = []
    for has_models in (False, True):
        bank = make_bank(tmp_path / f"bank-{has_models}", plan, make_loans(lenders=1))
        if has_models:
            adapted(bank, plan)
        opened = Bank(bank, simulation=True)
        try:
            content = opened.answer(encode_order(order))
        finally:
            opened.close()
        report = decode_reply(content)
        assert isinstance(report, TrainReport)
        # The receipt signs the entry's time with the ledger's own key, so it differs between any two ledgers.
        replies.append(report_to_bytes(replace(report, receipt="0" * len(report.receipt))))
        fields.append([(name, sorted(map(str, record))) for name, record in sorted(content.items())])
    assert replies[0] == replies[1]
    assert fields[0] == fields[1]
    assert (tmp_path / "bank-True" / "models").is_dir()


def test_no_command_on_a_model_opens_a_connection(
    tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], plan: Plan,
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bank = make_bank(tmp_path / "bank", plan, make_loans(lenders=1), seed=None)
    ledger = (bank / "ledger.sqlite").read_bytes()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex", "bind", "sendto", "sendmsg"):
        monkeypatch.setattr(socket.socket, name, refuse)
    model = adapted(bank, plan)
    for arguments in (
        ("score", model, bank / "loans.csv", "--out", tmp_path / "scores.csv"),
        ("explain", model, bank / "loans.csv", "--row", 1, "--html", tmp_path / "page.html"),
        ("explain", model, bank / "loans.csv", "--out", tmp_path / "reasons.csv"),
    ):
        code, _, err = call(app, *arguments)
        assert (code, err) == (0, "")
    assert (bank / "ledger.sqlite").read_bytes() == ledger, "what stays here costs nothing and is not charged"

"""A small synthetic consortium, unlike the built-in loans in every name: what the tests of whole systems run on."""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import typer

from client.approval import approve
from client.charges import charges_of
from client.cli import app as client_app
from client.ledger import Ledger
from metarisk_common.commands import run_app
from metarisk_common.plan import Plan
from simulations.scenarios import load_scenario

SCENARIO = """\
name = "consumer"
title = "Consumer loans"
seed = 7

[data]
file = "loans.csv"

[schema]
institution = "lender"
segment = "purpose"
segments = ["car", "home", "travel"]
label = { name = "outcome", positive = "bad", negative = "good" }

[[schema.columns]]
kind = "numeric"
name = "income"
lower = 5_000
upper = 200_000
scale = "log"
bins = [20_000, 40_000, 80_000]

[[schema.columns]]
kind = "numeric"
name = "age"
lower = 18
upper = 90
bins = [30, 45, 60]

[[schema.columns]]
kind = "categorical"
name = "purpose"
categories = ["car", "home", "travel"]

[model]
kind = "scorecard"
base_rate = 0.3

[training]
algorithm = "reptile"
local_steps = 2
learning_rate = 2.0

[server]
rounds = 12
learning_rate = 1.0
momentum = 0.5

[privacy]
epsilon = 4.0
delta = 1e-4
max_grad_norm = 0.7

[splits]
unseen = 2

[evaluation]
k = [0, 10]
draws = 2
baselines = false
"""


def loans(lenders: int = 6, rows: int = 220, seed: int = 1) -> pl.DataFrame:
    """Records of `Lender A` and so on, whose outcome depends on all three inputs."""
    random = np.random.default_rng(seed)
    tables = []
    for index in range(lenders):
        income = np.exp(random.normal(10.5, 0.6, rows)).round(2)
        age = random.integers(18, 80, rows)
        purpose = random.choice(["car", "home", "travel"], rows)
        logit = -0.8 - 1.2 * (np.log(income) - 10.5) - 0.02 * (age - 45) + 0.8 * (purpose == "travel")
        bad = random.random(rows) < 1 / (1 + np.exp(-logit - random.normal(0, 0.3)))
        columns = {"income": income, "age": age, "purpose": purpose, "outcome": np.where(bad, "bad", "good")}
        tables.append(pl.DataFrame({"lender": [f"Lender {chr(65 + index)}"] * rows, **columns}))
    return pl.concat(tables)


def write_scenario(
    folder: Path, *, frame: pl.DataFrame | None = None, replace: Mapping[str, str] | None = None
) -> Path:
    """Write `scenario.toml` and `loans.csv`; `replace` changes the scenario's text, each key of which must occur."""
    text = SCENARIO
    for old, new in (replace or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (loans() if frame is None else frame).write_csv(folder / "loans.csv")
    path = folder / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return path


def call_app(app: typer.Typer, *arguments: object) -> tuple[int, str, str]:
    """Run a command line in this process, as its entry point does; returns exit code, standard output and error."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["command", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            run_app(app)
    finally:
        sys.argv = before
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def write_bank(folder: Path, plan: Plan, frame: pl.DataFrame, *, epsilon: float = 4.0, seed: int | None = 7) -> Path:
    """Write a bank's folder whose plan is approved; `seed` makes its noise repeatable."""
    folder.mkdir(parents=True)
    frame.write_csv(folder / "loans.csv")
    text = f'name = "Lender A"\ndata = "loans.csv"\ndeclared_size = 220\n[policy]\nepsilon = {epsilon}\ndelta = 1e-4\n'
    simulation = "" if seed is None else f"[simulation]\nseed = {seed}\n"
    (folder / "institution.toml").write_text(text + simulation, encoding="utf-8")
    approve(folder, plan)
    return folder


def check_ledgers(journal: Sequence[Mapping[str, Any]], run_id: str, folders: Mapping[str, Path]) -> None:
    """Every ledger is whole, and right about a run: what was admitted was charged, and nothing was charged twice.

    What was lost on the way is charged all the same, so a bank may have paid for more than was admitted. What it
    refused, for its plan or its budget, it has not paid for.
    """
    assert [record["round"] for record in journal] == list(range(1, len(journal) + 1))
    for name, folder in folders.items():
        code, _, err = call_app(client_app, "ledger", "verify", folder)
        assert (code, err) == (0, ""), name
        with Ledger.read(folder / "ledger.sqlite") as ledger:
            charges = [charge for charge in charges_of(ledger.entries()) if charge.key.run_id == run_id]
        outcomes = {charge.key.round: charge.outcome for charge in charges if charge.key.kind == "train"}
        assert len({charge.key.turn for charge in charges}) == len(charges), (name, charges)
        for record in journal:
            if name in record["admitted"]:
                assert outcomes.get(record["round"]) == "released", (name, record["round"], outcomes)
            if record["refused"].get(name) in {"plan", "budget"}:
                assert record["round"] not in outcomes, (name, record["round"], outcomes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put real processes first: files of minutes, begun last, would leave one of two workers idle at the end."""
    items.sort(key=lambda item: "system" not in item.path.parts)


@pytest.fixture(scope="session")
def assert_ledgers() -> Callable[..., None]:
    return check_ledgers


@pytest.fixture(scope="session")
def make_loans() -> Callable[..., pl.DataFrame]:
    return loans


@pytest.fixture(scope="session")
def make_scenario() -> Callable[..., Path]:
    return write_scenario


@pytest.fixture(scope="session")
def make_bank() -> Callable[..., Path]:
    return write_bank


@pytest.fixture(scope="session")
def call() -> Callable[..., tuple[int, str, str]]:
    return call_app


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan that the synthetic scenario makes."""
    return load_scenario(write_scenario(tmp_path_factory.mktemp("plan"))).plan()


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One thread a process, however many the machine has."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from beginning to end, undisturbed; tests only read it."""
    from simulations.cli import app  # noqa: PLC0415 - whoever asks for no run need not load it

    folder = tmp_path_factory.mktemp("finished")
    out = folder / "run"
    code, _, err = call_app(app, "run", write_scenario(folder), "--out", out, "--workers", 0, "--json")
    assert (code, err) == (0, "")
    return out

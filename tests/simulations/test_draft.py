"""A draft of a scenario: it runs as it stands, and says at each constant that it was read off the table."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from metarisk_common.config import validate
from simulations.cli import app
from simulations.draft import draft
from simulations.scenarios import Scenario

Call = Callable[..., tuple[int, str, str]]
CANARY = "zq7canary"


def table(rows: int = 600) -> pl.DataFrame:
    random = np.random.default_rng(1)
    debt = random.exponential(20_000, rows).round(2)
    bad = random.random(rows) < 0.1 + 0.3 * (debt > 20_000)
    return pl.DataFrame(
        {
            "Lender": [f"Lender {'ABC'[row % 3]}" for row in range(rows)],
            "Defaulted": np.where(bad, "yes", "no"),
            "Debt": debt,
            "Balance": random.normal(0, 40, rows),
            "Purpose": np.where(random.random(rows) < 0.5, "car", "home"),
            "Remark": [f"{CANARY}{row}" for row in range(rows)],
        }
    )


def test_a_newcomers_table_becomes_a_run_in_two_commands(tmp_path: Path, call: Call) -> None:
    table().write_csv(tmp_path / "loans.csv")
    scenario = tmp_path / "loans.toml"
    asked = ("draft", tmp_path / "loans.csv", "--institution", "Lender", "--label", "Defaulted", "--out", scenario)
    code, out, err = call(app, *asked)
    assert (code, err) == (0, "")
    assert "CONFIRM" in out
    code, out, err = call(app, "run", scenario, "--out", tmp_path / "run", "--workers", 0, "--seed", 1, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["summary"]
    assert (tmp_path / "run" / "report.html").exists()
    assert call(app, *asked)[0] == 2  # Nothing is overwritten.


def test_columns_are_drafted_by_their_kind_and_a_free_text_is_left_out(tmp_path: Path) -> None:
    table().with_columns(Country=pl.lit("NL")).write_csv(tmp_path / "loans.csv")
    text = draft(tmp_path / "loans.csv", institution="Lender", label="Defaulted", name="x")
    found = validate(tomllib.loads(text), Scenario, where="draft")
    kinds = {column.name: column.kind for column in found.columns.columns}
    assert kinds == {"Debt": "numeric", "Balance": "numeric", "Purpose": "categorical"}
    debt, balance = found.columns.columns[:2]
    assert (debt.lower, debt.upper, debt.scale) == (0, 1_000_000, "log1p")  # type: ignore[union-attr]
    assert balance.lower == -1000  # type: ignore[union-attr]
    assert found.columns.outcome.positive == "yes"
    assert "one value alone: Remark, Country" in text
    assert CANARY not in text
    assert text.count("CONFIRM") == 6  # the header, label, base rate, two numeric columns, one of categories


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Bank", "Defaulted"), "no such column"),
        (("Lender", "Debt"), "distinct values"),
        (("Lender", "Bad"), "--label"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    tmp_path: Path, call: Call, arguments: tuple[str, str], message: str
) -> None:
    table().write_csv(tmp_path / "loans.csv")
    institution, label = arguments
    code, out, err = call(app, "draft", tmp_path / "loans.csv", "--institution", institution, "--label", label)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1

"""Bins and shares from a bank's own records: charged before anything is read, with noise for all a unit can move."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from client import constants as module
from client.cli import app
from client.config import Institution, InstitutionConfig, PolicyConfig
from client.constants import Request, category_shares, noised_counts, quantile_bins, release, request_for, toml_lines
from client.ledger import Ledger
from client.rng import SecureRandom
from metarisk_common.config import validate
from metarisk_common.errors import BudgetExhaustedError, ConfigError, DataError, RefusedError
from metarisk_common.privacy import epsilon
from metarisk_common.schema import NumericColumn, Schema

Call = Callable[..., tuple[int, str, str]]
SCHEMA: dict[str, Any] = {
    "label": {"name": "bad"},
    "institution": "bank",
    "privacy_unit": "customer",
    "max_records_per_unit": 3,
    "columns": [
        {"kind": "numeric", "name": "income", "lower": 1_000, "upper": 1_000_000, "scale": "log"},
        {"kind": "numeric", "name": "age", "lower": 0, "upper": 100},
        {"kind": "categorical", "name": "purpose", "categories": ["car", "home"]},
    ],
}


def schema(**update: Any) -> Schema:
    return validate(SCHEMA | update, Schema, where="test")


def table(rows: int = 6000) -> pl.DataFrame:
    number = np.arange(rows)
    return pl.DataFrame(
        {
            "customer": [f"C{row // 2}" for row in number],
            "bad": number % 2,
            "income": np.exp(np.linspace(np.log(10_000), np.log(100_000), rows)),
            "age": number % 100,
            "purpose": np.where(number % 4 == 0, "home", "car"),
        }
    )


def institution(folder: Path, frame: pl.DataFrame, *, budget: float = 3.0, least: float = 0.5) -> Institution:
    frame.write_csv(folder / "loans.csv")
    policy = PolicyConfig(epsilon=budget, delta=1e-6, min_noise_multiplier=least)
    config = InstitutionConfig(name="A", data="loans.csv", declared_size=3000, policy=policy)
    (folder / "institution.toml").write_text(
        'name = "A"\ndata = "loans.csv"\ndeclared_size = 3000\n'
        f"[policy]\nepsilon = {budget}\ndelta = 1e-6\nmin_noise_multiplier = {least}\n"
    )
    return Institution(folder, config)


def test_one_unit_moves_the_counts_by_no_more_than_the_noise_is_made_for() -> None:
    """All records of one customer in one cell of each column: the very most, and the noise counts with it."""
    request = request_for(schema(), (), epsilon=1.0, delta=1e-6)
    quiet = request.model_copy(update={"noise_multiplier": 1e-300})
    one = table(3).with_columns(pl.lit("C0").alias("customer"), pl.lit(5).alias("age"), pl.lit("car").alias("purpose"))
    one = one.with_columns(pl.lit(20_000.0).alias("income"))
    counts = noised_counts(one, quiet, SecureRandom.seeded(1))
    moved = np.sqrt(sum(float(np.square(count).sum()) for count in counts.values()))
    assert moved == pytest.approx(3 * np.sqrt(3))
    assert request.std == pytest.approx(request.noise_multiplier * moved)


def test_of_a_customer_with_more_records_only_as_many_are_counted_as_are_paid_for(tmp_path: Path) -> None:
    crowd = table(200).with_columns(pl.lit("one").alias("customer"))
    bank = institution(tmp_path, crowd)
    request = request_for(schema(), ("purpose",), epsilon=1.0, delta=1e-6)
    records = module._records(bank, schema(), request)
    assert records.height == 3


def test_the_noise_is_as_wide_as_said() -> None:
    request = Request(columns=schema().columns[:1], noise_multiplier=7.0, max_records_per_unit=3, grid=4000)
    noise = noised_counts(table(0), request, SecureRandom.seeded(2))["income"]
    assert np.std(noise) == pytest.approx(21.0, rel=0.05)
    assert abs(noise.mean()) < 21.0 * 4 / np.sqrt(4000)


def test_it_is_charged_before_the_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = institution(tmp_path, table())
    request = request_for(schema(), (), epsilon=0.5, delta=1e-6)
    seen = []

    def reading(*_: object) -> pl.DataFrame:
        with Ledger.read(bank.ledger_path) as ledger:
            seen.append(ledger.spent())
        raise DataError("loans.csv: was cut short")

    monkeypatch.setattr(module, "_records", reading)
    with pytest.raises(DataError):
        release(bank, schema(), request)
    assert seen == [pytest.approx(0.5, rel=2e-3)]
    with Ledger.read(bank.ledger_path) as ledger:
        assert ledger.spent() == seen[0]


def test_the_same_request_is_answered_with_the_same_counts_at_no_cost_and_another_adds_up(tmp_path: Path) -> None:
    bank = institution(tmp_path, table())
    request = request_for(schema(), ("age",), epsilon=0.5, delta=1e-6)
    first, again = release(bank, schema(), request), release(bank, schema(), request)
    assert (first.repeated, again.repeated) == (False, True)
    assert np.array_equal(first.counts["age"], again.counts["age"])
    assert first.epsilon == again.epsilon == pytest.approx(0.5, rel=2e-3)
    other = request_for(schema(), ("purpose",), epsilon=0.5, delta=1e-6)
    assert release(bank, schema(), other).epsilon == pytest.approx(epsilon([request.event, other.event], 1e-6))


def test_a_budget_and_the_policy_are_held_to(tmp_path: Path) -> None:
    bank = institution(tmp_path, table(), budget=0.4)
    with pytest.raises(BudgetExhaustedError):
        release(bank, schema(), request_for(schema(), (), epsilon=0.5, delta=1e-6))
    (tmp_path / "second").mkdir()
    strict = institution(tmp_path / "second", table(), least=100.0)
    with pytest.raises(RefusedError, match="min_noise_multiplier"):
        release(strict, schema(), request_for(schema(), (), epsilon=0.5, delta=1e-6))


@pytest.mark.parametrize("cell", ["much", "inf", ""])
def test_what_one_record_holds_never_makes_it_fail(tmp_path: Path, cell: str) -> None:
    """Whether a release fails may not tell whether one record fits."""
    frame = table(60).with_columns(pl.col("age").cast(pl.String), pl.col("customer"))
    worst = frame[:1].with_columns(pl.lit(cell).alias("age"), pl.lit(None).cast(pl.String).alias("customer"))
    bank = institution(tmp_path, pl.concat([frame, worst]))
    for names in (("age",), ("purpose",)):
        assert set(release(bank, schema(), request_for(schema(), names, epsilon=1.0, delta=1e-6)).counts) == set(names)


def test_bins_are_near_the_quantiles_and_their_lines_are_a_schemas(tmp_path: Path) -> None:
    found = release(institution(tmp_path, table()), schema(), request_for(schema(), (), epsilon=2.0, delta=1e-6))
    income = schema().columns[0]
    assert isinstance(income, NumericColumn)
    edges, shares = quantile_bins(income, np.maximum(found.counts["income"], 0), 4)
    assert len(edges) == 3
    assert abs(np.log(edges[1]) - np.log(31_600)) < 0.7
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    import tomllib  # noqa: PLC0415 - here alone

    lines = tomllib.loads(toml_lines(schema(), found, bins=4))
    read = validate({**SCHEMA, "columns": lines["schema"]["columns"]}, Schema, where="printed")
    assert [column.name for column in read.columns] == ["income", "age", "purpose"]


def test_noise_alone_still_gives_lines_that_are_a_schemas() -> None:
    assert category_shares(np.array([-5.0, 3.0, 1.0]))[0] > 0
    assert sum(category_shares(np.array([10.0, 20.0, 0.0]))) <= 1
    assert quantile_bins(schema().columns[1], np.full(16, -1.0), 5) == ((), ())  # type: ignore[arg-type]


def test_the_command_asks_and_prints_what_may_be_published(tmp_path: Path, call: Call) -> None:
    bank = institution(tmp_path, table())
    plan = {"name": "p", "data": SCHEMA, "mechanism": {"noise_multiplier": 4.0}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = ("constants", tmp_path, "--plan", tmp_path / "plan.json", "--epsilon", "1", "--column", "age")
    code, _, err = call(app, *command)
    assert (code, bank.ledger_path.exists()) == (2, False)
    assert "--yes" in err
    code, out, err = call(app, *command, "--yes", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["repeated"] is False
    code, out, _ = call(app, *command, "--yes")
    assert "given again" in out
    assert "bins = [" in out
    code, _, err = call(app, *command[:-1], "wage", "--yes")
    assert code == 2
    assert "wage" in err
    code, out, _ = call(app, "ledger", "show", tmp_path)
    assert "bins and shares" in out


def test_a_request_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="--epsilon"):
        request_for(schema(), (), epsilon=float("inf"), delta=1e-6)


def test_the_upper_bound_itself_is_in_the_last_cell() -> None:
    request = Request(columns=schema().columns[1:2], noise_multiplier=1e-300, grid=8)
    one = pl.DataFrame({"age": [100, 100, 0, 5_000]})
    found = noised_counts(one, request, SecureRandom.seeded(1))["age"]
    assert found.round(6).tolist() == [1, 0, 0, 0, 0, 0, 0, 3]


def test_the_shares_of_bins_on_a_logarithmic_scale_are_those_of_their_records() -> None:
    income = schema().columns[0]
    assert isinstance(income, NumericColumn)
    edges, shares = quantile_bins(income, np.full(300, 10.0), 3)
    assert edges == (10_000, 100_000)
    assert shares == pytest.approx((1 / 3, 1 / 3, 1 / 3), abs=2e-4)

"""`metarisk-client check`: what is told of a table is what an order would make of it, and never one of its values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.approval import approve, open_ledger
from client.checking import NO_KEY, NO_NUMBER, NO_OUTCOME, REFUSED, SegmentCounts, Unfit, check_cost, check_data
from client.cli import app
from client.config import Institution, InstitutionConfig, PolicyConfig, load_institution
from client.dataset import load_dataset
from client.ledger import OrderKey
from client.training import tasks_for
from metarisk_common.errors import DataError
from metarisk_common.plan import Plan
from metarisk_common.privacy import epsilon

Call = Callable[..., tuple[int, str, str]]
CANARY = "zq7canary"

SCHEMA: dict[str, Any] = {
    "label": {"name": "outcome", "positive": "bad", "negative": "good"},
    "institution": "bank",
    "segment": "sector",
    "segments": ["retail", "trade"],
    "identifier": "loan",
    "privacy_unit": "customer",
    "max_records_per_unit": 2,
    "columns": [
        {"kind": "numeric", "name": "amount", "lower": 0, "upper": 100, "missing": "refuse"},
        {"kind": "numeric", "name": "share", "source": "part", "divide_by": "whole", "lower": 0, "upper": 1},
        {"kind": "categorical", "name": "code", "categories": ["a", "b"]},
    ],
}


def make_plan(task: str = "segment", **schema: Any) -> Plan:
    values = {
        "name": "test",
        "data": SCHEMA | schema,
        "inner": {"task": task, "local_steps": 1},
        "mechanism": {"noise_multiplier": 4.0, "delta": 1e-5},
        "outer": {"rounds": 3},
    }
    return Plan.model_validate(values)


def table(rows: int = 40) -> pl.DataFrame:
    """Twenty customers with two loans each, in one sector each."""
    number = np.arange(rows)
    return pl.DataFrame(
        {
            "loan": [f"L{row}" for row in number],
            "customer": [f"C{row // 2}" for row in number],
            "sector": np.where(number // 2 % 2 == 0, "retail", "trade"),
            "amount": number.astype(str),
            "part": ["1"] * rows,
            "whole": ["2"] * rows,
            "code": ["a"] * rows,
            "outcome": np.where(number % 4 == 0, "bad", "good"),
        }
    )


def with_cells(frame: pl.DataFrame, **cells: dict[int, str | None]) -> pl.DataFrame:
    for name, changes in cells.items():
        values = frame[name].to_list()
        for row, value in changes.items():
            values[row] = value
        frame = frame.with_columns(pl.Series(name, values))
    return frame


def institution(
    folder: Path, frame: pl.DataFrame, *, size: int = 20, epsilon: float = 3.0, delta: float = 1e-5
) -> Institution:
    frame.write_csv(folder / "loans.csv")
    policy = PolicyConfig(epsilon=epsilon, delta=delta)
    return Institution(folder, InstitutionConfig(name="A", data="loans.csv", declared_size=size, policy=policy))


def test_a_table_that_fits_is_used_whole(tmp_path: Path) -> None:
    found = check_data(institution(tmp_path, table()), make_plan())
    assert (found.rows, found.used, found.units, found.positives) == (40, 40, 20, 10)
    assert (found.unfit, found.unfit_rows, found.over_limit_rows, found.unlisted_rows) == ((), 0, 0, 0)
    assert found.segments == (SegmentCounts("retail", 20, 10, 10), SegmentCounts("trade", 20, 10, 0))
    assert found.problems == ()
    assert [warning for warning in found.warnings if "both outcomes" not in warning] == []


def test_each_column_that_does_not_fit_is_named_with_its_rows(tmp_path: Path) -> None:
    frame = with_cells(
        table(),
        amount={0: CANARY, 1: "inf", 2: None, 3: "200"},
        part={4: CANARY},
        whole={4: CANARY, 5: "0"},
        outcome={0: CANARY, 6: None},
        loan={7: None},
        customer={8: " "},
        code={9: CANARY},
    )
    found = check_data(institution(tmp_path, frame), make_plan())
    assert set(found.unfit) == {
        Unfit("amount", NO_NUMBER, 2),
        Unfit("amount", REFUSED, 1),
        Unfit("part", NO_NUMBER, 1),
        Unfit("whole", NO_NUMBER, 1),
        Unfit("outcome", NO_OUTCOME, 2),
        Unfit("loan", NO_KEY, 1),
        Unfit("customer", NO_KEY, 1),
    }
    assert (found.unfit_rows, found.used) == (7, 33)
    assert (found.columns["amount"].clipped_above, found.columns["share"].missing) == (1, 1)
    assert found.columns["code"].unknown_categories == 1
    assert "7 of 40 rows do not fit" in " ".join(found.warnings)


@settings(max_examples=25)
@given(data=st.data())
def test_what_is_told_is_what_an_order_would_make_of_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def column(*values: str | None) -> pl.Series:
        return pl.Series(data.draw(st.lists(st.sampled_from(values), min_size=12, max_size=12)), dtype=pl.String)

    frame = pl.DataFrame(
        {
            "loan": [f"L{row}" for row in range(12)],
            "customer": column("C1", "C2", "C3", None, ""),
            "sector": column("retail", "trade", "boats", None),
            "amount": column("1", "101", "x", "inf", "nan", None, "true"),
            "part": column("1", "y", None),
            "whole": column("2", "0", "z", None),
            "code": column("a", "q", None),
            "outcome": column("bad", "good", "maybe", None),
        }
    )
    task = data.draw(st.sampled_from(["segment", "institution"]))
    plan = make_plan(task, identifier=data.draw(st.sampled_from(["loan", None])))
    bank = institution(tmp_path_factory.mktemp("bank"), frame)
    found = check_data(bank, plan)
    dataset = load_dataset(bank.data_path, plan.data, "A", drop_unfit=True)
    tasks = tasks_for(plan, dataset)
    assert found.used == sum(len(task.y) for task in tasks)
    assert found.positives == sum(int(task.y.sum()) for task in tasks)
    assert found.units == sum(0 if task.unit is None else len(np.unique(task.unit)) for task in tasks)
    assert found.unfit_rows + found.over_limit_rows == dataset.dropped
    assert found.columns == dataset.counts.columns
    unlisted = found.unlisted_rows if task == "segment" else 0
    assert found.rows == found.used + found.unfit_rows + found.over_limit_rows + unlisted
    # Every row that is left out has a column to blame, and no column is blamed for more rows than are left out.
    assert sum(one.rows for one in found.unfit) >= found.unfit_rows
    assert max([one.rows for one in found.unfit], default=0) <= found.unfit_rows
    if task == "segment":
        assert [(part.rows, part.positives) for part in found.segments] == [
            (len(task.y), int(task.y.sum())) for task in tasks
        ]


def test_records_beyond_the_limit_and_outside_the_segments_are_counted(tmp_path: Path) -> None:
    frame = with_cells(
        table(),
        customer={2: "C0", 4: "C0", 8: "C5", 9: "C5"},  # C0 has four, C5 four of which two are in another sector.
        sector={20: "boats", 21: "boats"},
    )
    bank = institution(tmp_path, frame)
    found = check_data(bank, make_plan())
    assert (found.unfit_rows, found.over_limit_rows, found.unlisted_rows, found.used) == (0, 4, 2, 34)
    assert "at most 2 of each 'customer'" in " ".join(found.warnings)
    assert "2 rows are of no segment that the plan lists, and would be left out" in " ".join(found.warnings)
    whole = check_data(bank, make_plan("institution"))
    assert (whole.unlisted_rows, whole.used) == (2, 36)
    assert sum(part.rows for part in whole.segments) == 34


BAD: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "no rows": (lambda frame: frame.clear(), "holds no rows"),
    "none that fits": (lambda frame: frame.with_columns(amount=pl.lit(CANARY)), "not one of its 40 rows fits"),
    "no segment": (lambda frame: frame.with_columns(sector=pl.lit(CANARY)), "none of its rows is of a segment"),
    "one class": (lambda frame: frame.with_columns(outcome=pl.lit("good")), "the same label"),
    "repeated": (lambda frame: with_cells(frame, loan={3: CANARY, 4: CANARY}), "'loan' repeats in 1 of 40 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_told_and_is_exit_code_2(call: Call, tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    write_folder(tmp_path, change(table()))
    code, out, err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert "PROBLEM: " in out
    code, out, again = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--json")
    assert (code, again) == (2, err)
    assert any(message in problem for problem in json.loads(out)["problems"])
    assert CANARY not in out + err
    assert call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--strict")[:2] == (2, "")


def write_folder(folder: Path, frame: pl.DataFrame, policy: str = "", plan: Plan | None = None) -> None:
    frame.write_csv(folder / "loans.csv")
    text = 'name = "A"\ndata = "loans.csv"\ndeclared_size = 20\n[policy]\nepsilon = 3.0\ndelta = 1e-5\n'
    (folder / "institution.toml").write_text(text + policy, encoding="utf-8")
    (folder / "plan.json").write_text((plan or make_plan()).to_json(), encoding="utf-8")


def test_rows_that_do_not_fit_are_a_warning_and_with_strict_an_error(call: Call, tmp_path: Path) -> None:
    write_folder(tmp_path, with_cells(table(), amount={5: CANARY}))
    code, out, err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    assert "40 rows, 39 would be used of 20 customer, 10 with outcome = bad" in out
    assert "WARNING: 1 of 40 rows do not fit" in out
    assert NO_NUMBER in out
    assert "For this bank's eyes only" in out
    code, strict_out, strict_err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--strict")
    assert (code, strict_out, strict_err.count("\n")) == (2, "", 1)
    assert "column 'amount' must hold numbers, but 1 of 40 cells" in strict_err
    assert CANARY not in out + strict_err
    (tmp_path / "loans.csv").write_text(table().write_csv(), encoding="utf-8")
    assert call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--strict")[0] == 0


def test_a_missing_column_is_still_an_error_of_one_line(call: Call, tmp_path: Path) -> None:
    write_folder(tmp_path, table().drop("whole"))
    code, out, err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "column 'whole' is missing" in err


def test_a_plan_that_the_policy_does_not_take_is_exit_code_3_after_all_is_told(call: Call, tmp_path: Path) -> None:
    write_folder(tmp_path, table(), "min_noise_multiplier = 5.0\n")
    code, out, err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json")
    assert (code, err.count("\n")) == (3, 1)
    assert "min_noise_multiplier" in err
    assert "does not take the plan" in out
    answer = json.loads(call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--json")[1])
    assert "min_noise_multiplier" in answer["refusal"]
    assert answer["used"] == 40


@pytest.mark.parametrize(
    ("size", "delta", "told"),
    [
        (20, 1e-5, []),
        (24, 1e-5, []),
        (26, 1e-5, ["declared_size = 26"]),
        (15, 1e-5, ["declared_size = 15"]),
        (20, 6e-3, ["policy.delta = 0.006"]),
        (10, 9e-3, ["declared_size = 10", "policy.delta = 0.009"]),
    ],
)
def test_a_declared_size_far_from_the_truth_is_told(tmp_path: Path, size: int, delta: float, told: list[str]) -> None:
    """There are twenty customers with forty loans: customers count, and a delta above 1/200 is too large for them."""
    found = check_data(institution(tmp_path, table(), size=size, delta=delta), make_plan("institution"))
    assert len(found.warnings) == len(told)
    assert all(any(part in warning for warning in found.warnings) for part in told)


def test_what_a_plan_needs_is_held_against_what_is_left(call: Call, tmp_path: Path) -> None:
    plan = make_plan()
    write_folder(tmp_path, table())
    bank = load_institution(tmp_path)
    event, cost = plan.train_event(), epsilon(plan.events(), 1e-5)
    before = check_cost(bank, plan)
    assert not bank.ledger_path.exists()
    assert (before.cost.plan, before.cost.spent, before.cost.rounds_within) == (cost, 0.0, 3)
    assert (before.standing, before.refusal) == (None, "")
    approve(tmp_path, plan, epsilon=epsilon([event] * 2, 1e-5) + 1e-6)
    with open_ledger(bank) as ledger:
        ledger.reserve(OrderKey("run-1", 1, plan.hash(), "ab" * 32), event)
    answer = json.loads(call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--json")[1])
    assert answer["approved"] is True
    assert answer["cost"]["spent"] == epsilon([event], 1e-5)
    assert answer["cost"]["after"] == epsilon([event] * 4, 1e-5)
    # Approved with a cap that two rounds fill, of which one is spent.
    assert (answer["cost"]["rounds_within"], answer["cost"]["stopped_by"]) == (1, "cap")
    assert any("passes the cap" in warning for warning in answer["warnings"])
    with open_ledger(bank) as ledger:
        assert ledger.counter == 3  # Looking has recorded nothing.


def test_a_budget_without_limit_is_told_as_such(call: Call, tmp_path: Path) -> None:
    plan = make_plan().model_copy(
        update={"mechanism": make_plan().mechanism.model_copy(update={"noise_multiplier": 0.0})}
    )
    write_folder(tmp_path, table(), plan=plan)
    text = (tmp_path / "institution.toml").read_text(encoding="utf-8").replace("3.0", "inf")
    (tmp_path / "institution.toml").write_text(f"{text}[simulation]\nseed = 1\n", encoding="utf-8")
    code, out, err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    for part in ("no bound of no limit", "Nothing is protected", "NOT PRIVATE"):
        assert part in out
    answer = json.loads(call(app, "check", tmp_path, "--plan", tmp_path / "plan.json", "--json")[1])
    assert (answer["cost"]["cost"], answer["cost"]["epsilon"]) == (None, None)


def test_a_strict_check_raises_for_the_first_thing(tmp_path: Path) -> None:
    bank = institution(tmp_path, with_cells(table(), outcome={1: CANARY}))
    with pytest.raises(DataError, match="1 distinct values") as caught:
        check_data(bank, make_plan(), strict=True)
    assert CANARY not in str(caught.value)

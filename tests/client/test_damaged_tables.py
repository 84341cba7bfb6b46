"""Damaged tables, each as a bank may hand it to `metarisk-client check`: told in one line, or counted and shown.

No message and no answer repeats a cell. `REFUSED` are damages of the whole table: exit code 2, one line that names the
file, and the column or line at fault. `COUNTED` are damages of single cells: the rows are left out, or the cells are
clipped or taken for missing or unknown, and the counts are shown.
"""

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.cli import app
from metarisk_common.plan import Plan

Call = Callable[..., tuple[int, str, str]]
CANARY = "9137"
HEADER = "loan,amount,rate,code,outcome"
ROWS = [f"L{number},{number}.5,1.5,{'ab'[number % 2]},{'good' if number % 3 else 'bad'}" for number in range(30)]
PLAN: dict[str, Any] = {
    "name": "test",
    "data": {
        "label": {"name": "outcome", "positive": "bad", "negative": "good"},
        "institution": "bank",
        "identifier": "loan",
        "columns": [
            {"kind": "numeric", "name": "amount", "lower": 0, "upper": 100},
            {"kind": "numeric", "name": "rate", "lower": 1, "upper": 10, "scale": "log"},
            {"kind": "categorical", "name": "code", "categories": ["a", "b"]},
        ],
    },
    "inner": {"task": "institution", "local_steps": 1},
    "mechanism": {"noise_multiplier": 4.0, "delta": 1e-5},
    "outer": {"rounds": 2},
}


def text(*rows: str, header: str = HEADER) -> bytes:
    return ("\n".join([header, *rows]) + "\n").encode()


def first(row: str) -> bytes:
    """Put one row in the place of the first."""
    return text(row, *ROWS[1:])


def parquet(frame: pl.DataFrame, folder: Path) -> bytes:
    frame.write_parquet(folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


def frame() -> pl.DataFrame:
    return pl.read_csv(text(*ROWS))


REFUSED: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty file": ("t.csv", lambda _: b"", "is empty"),
    "a byte-order mark and nothing else": ("t.csv", lambda _: b"\xef\xbb\xbf", "is empty"),
    "header only": ("t.csv", lambda _: text(), "holds no rows"),
    "Latin-1": ("t.csv", lambda _: text(*ROWS, f"L{CANARY},1,1,é,good").decode().encode("latin-1"), "not UTF-8"),
    "UTF-16": ("t.csv", lambda _: text(*ROWS).decode().encode("utf-16"), "t.csv"),
    "NUL bytes": ("t.csv", lambda _: text(*ROWS) + b"\0" * 512, "NUL bytes (near line 32)"),
    "NUL bytes within": ("t.csv", lambda _: first(f"L{CANARY},1\0,1,a,bad"), "NUL bytes (near line 2)"),
    "semicolons": ("t.csv", lambda _: text(*ROWS).replace(b",", b";"), "is missing"),
    "short row": ("t.csv", lambda _: first(f"L{CANARY},1"), "line 2 has 2 cells"),
    "long row": ("t.csv", lambda _: first(f"L0,1,1,a,good,{CANARY}"), "line 2 has 6 cells"),
    "decimal comma": ("t.csv", lambda _: first(f"L0,{CANARY},5,1,a,good"), "line 2 has 6 cells"),
    "quote never closed": ("t.csv", lambda _: first(f'L0,1,1,"{CANARY},good'), "quote is never closed"),
    "duplicate header": (
        "t.csv",
        lambda _: text(*(f"{r},{CANARY}" for r in ROWS), header=HEADER + ",amount"),
        "amount",
    ),
    "missing column": ("t.csv", lambda _: text(*ROWS, header="loan,amount,x,code,outcome"), "column 'rate' is missing"),
    "misspelt column": ("t.csv", lambda _: text(*ROWS, header="loan,amont,rate,code,outcome"), "column 'amount'"),
    "blanks in names": ("t.csv", lambda _: text(*ROWS, header="loan, amount,rate,code,outcome"), "column 'amount'"),
    "other case": ("t.csv", lambda _: text(*ROWS, header="loan,Amount,rate,code,outcome"), "column 'amount'"),
    "no header": ("t.csv", lambda _: text(*ROWS[1:], header=ROWS[0].replace("L0", CANARY)), "is missing"),
    "one class only": ("t.csv", lambda _: text(*(r for r in ROWS if r.endswith("good"))), "t.csv"),
    "one row": ("t.csv", lambda _: text(ROWS[0]), "t.csv"),
    "labels of another code": ("t.csv", lambda _: text(*ROWS).replace(b"good", b"0"), "t.csv"),
    "duplicate identifiers": ("t.csv", lambda _: text(*ROWS, f"L3,{CANARY},1,a,good"), "'loan'"),
    "cut Parquet": ("t.parquet", lambda folder: parquet(frame(), folder)[:-40], "can't be read as Parquet"),
    "CSV called Parquet": ("t.parquet", lambda _: text(*ROWS), "can't be read as Parquet"),
    "Parquet called CSV": ("t.csv", lambda folder: parquet(frame(), folder), "t.csv"),
    "nested Parquet": (
        "t.parquet",
        lambda folder: parquet(frame().with_columns(pl.struct("amount").alias("amount")), folder),
        "column 'amount'",
    ),
    "dates for numbers in Parquet": (
        "t.parquet",
        lambda folder: parquet(frame().with_columns(pl.lit("2020-12-31").str.to_date().alias("amount")), folder),
        "column 'amount'",
    ),
    "Excel": ("t.xlsx", lambda _: b"PK\x03\x04", "only .csv and .parquet"),
}

COUNTED: dict[str, tuple[bytes, dict[str, Any]]] = {
    "text in a number": (first(f"L0,x{CANARY},1,a,bad"), {"unfit_rows": 1, "unfit": "amount"}),
    "infinite": (first("L0,inf,1,a,bad"), {"unfit_rows": 1, "unfit": "amount"}),
    "1e400": (first("L0,1e400,1,a,bad"), {"unfit_rows": 1, "unfit": "amount"}),
    "date in a number": (first("L0,2020-12-31,1,a,bad"), {"unfit_rows": 1, "unfit": "amount"}),
    "quoted decimal comma": (first(f'L0,"{CANARY},5",1,a,bad'), {"unfit_rows": 1, "unfit": "amount"}),
    "third outcome": (first(f"L0,1,1,a,{CANARY}"), {"unfit_rows": 1, "unfit": "outcome"}),
    "no outcome": (first("L0,1,1,a,"), {"unfit_rows": 1, "unfit": "outcome"}),
    "no identifier": (first(",1,1,a,bad"), {"unfit_rows": 1, "unfit": "loan"}),
    "not a number": (first("L0,NaN,1,a,bad"), {"amount": {"missing": 1}}),
    "an integer too large": (first(f"L0,{CANARY * 8},1,a,bad"), {"amount": {"clipped_above": 1}}),
    "negative under a logarithm": (first(f"L0,1,-{CANARY},a,bad"), {"rate": {"clipped_below": 1}}),
    "unknown category": (first(f"L0,1,1,{CANARY},bad"), {"code": {"unknown_categories": 1}}),
    "category in other case": (first("L0,1,1,A,bad"), {"code": {"unknown_categories": 1}}),
    "empty column": (
        text(*(",".join([*r.split(",")[:3], "", r.split(",")[4]]) for r in ROWS)),
        {"code": {"missing": 30}},
    ),
    "constant column": (text(*ROWS), {"rate": {"missing": 0, "clipped_below": 0}}),
    "category with blanks after it": (first("L0,1,1,a  ,bad"), {"code": {"unknown_categories": 0}}),
    "byte-order mark": (b"\xef\xbb\xbf" + text(*ROWS), {"unfit_rows": 0}),
    "returns before newlines": (text(*ROWS).replace(b"\n", b"\r\n"), {"unfit_rows": 0}),
    "blank lines at the end": (text(*ROWS) + b"\n\n", {"rows": 32, "unfit_rows": 2}),
}


def bank(folder: Path, file: str, content: bytes) -> tuple[Path, Path]:
    (folder / file).write_bytes(content)
    (folder / "institution.toml").write_text(
        f'name = "A"\ndata = "{file}"\ndeclared_size = 30\n[policy]\nepsilon = 3.0\ndelta = 1e-5\n', encoding="utf-8"
    )
    (folder / "plan.json").write_text(Plan.model_validate(PLAN).to_json(), encoding="utf-8")
    return folder, folder / "plan.json"


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_table_is_told_in_one_line(call: Call, tmp_path: Path, kind: str) -> None:
    file, content, told = REFUSED[kind]
    folder, plan = bank(tmp_path, file, content(tmp_path))
    code, out, err = call(app, "check", folder, "--plan", plan)
    assert (code, err.count("\n")) == (2, 1), err
    assert file in err
    assert told in err
    assert CANARY not in out + err


@pytest.mark.parametrize("kind", COUNTED)
def test_a_damaged_cell_is_counted_and_shown(call: Call, tmp_path: Path, kind: str) -> None:
    content, expected = COUNTED[kind]
    folder, plan = bank(tmp_path, "t.csv", content)
    code, out, err = call(app, "check", folder, "--plan", plan, "--json")
    assert (code, err) == (0, "")
    assert CANARY not in out
    answer = json.loads(out)
    for key, value in expected.items():
        if key == "unfit":
            assert [(one["column"], one["rows"]) for one in answer["unfit"]] == [(value, 1)]
        elif isinstance(value, dict):
            assert {name: answer["columns"][key][name] for name in value} == value
        else:
            assert answer[key] == value


@pytest.mark.parametrize(
    ("file", "closed"),
    [
        *((file, closed) for file in ("t.csv", "t.parquet", "parts") for closed in (file, ".")),
        ("parts", "parts/year=2015"),
    ],
)
def test_a_table_that_this_user_may_not_read_is_told(call: Call, tmp_path: Path, file: str, closed: str) -> None:
    exports = tmp_path / "exports"
    (exports / "parts" / "year=2015").mkdir(parents=True)
    (exports / "t.csv").write_bytes(text(*ROWS))
    frame().write_parquet(exports / "t.parquet")
    frame().write_parquet(exports / "parts" / "0.parquet")
    frame().write_parquet(exports / "parts" / "year=2015" / "0.parquet")
    folder, plan = bank(tmp_path, "t.csv", text(*ROWS))
    own = f'name = "A"\ndeclared_size = 30\n[policy]\nepsilon = 3.0\ndelta = 1e-5\n[table]\nfile = "exports/{file}"\n'
    (folder / "institution.toml").write_text(own, encoding="utf-8")
    shut = exports / closed
    above = {path: path.stat().st_mode for path in (tmp_path, *tmp_path.parents[:3])}
    is_root = os.geteuid() == 0
    try:
        if is_root:  # who may read everything: be nobody, to whom the way there is open
            for path, mode in above.items():
                path.chmod(mode | 0o055)
            shut.chmod(0)
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
        else:
            shut.chmod(0)
        checked = call(app, "check", folder, "--plan", plan)
        proposed = call(app, "init", tmp_path / "new", "--from", exports / file, "--plan", plan, "--yes")
    finally:
        os.seteuid(os.getuid())
        shut.chmod(0o755)
        for path, mode in above.items() if is_root else ():
            path.chmod(mode)
    for code, _, err in (checked, proposed):
        assert (code, err.count("\n")) == (2, 1), err
        assert "may not be read by this user" in err


def test_a_folder_in_the_place_of_a_file_is_named(call: Call, tmp_path: Path) -> None:
    folder, plan = bank(tmp_path, "t.csv", b"")
    (folder / "t.csv").unlink()
    (folder / "t.csv").mkdir()
    code, out, err = call(app, "check", folder, "--plan", plan)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "t.csv" in err


def test_check_reads_by_the_mapping_and_tells_the_own_names(call: Call, tmp_path: Path) -> None:
    folder, plan = bank(tmp_path, "t.csv", text(*ROWS, header="loan,AMT_EUR,rate,code,outcome"))
    (folder / "institution.toml").write_text(
        'name = "A"\ndeclared_size = 30\n[policy]\nepsilon = 3.0\ndelta = 1e-5\n'
        '[table]\nfile = "t.csv"\n[table.columns]\namount = "AMT_EUR"\n',
        encoding="utf-8",
    )
    code, out, _ = call(app, "check", folder, "--plan", plan, "--json")
    assert code == 0
    assert json.loads(out)["found"]["amount"] == {"own": ["AMT_EUR"], "kinds": ["number"]}
    _, out, _ = call(app, "check", folder, "--plan", plan)
    assert out.startswith("For this bank's eyes only")

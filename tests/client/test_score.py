"""Scoring: every row its score, in order, whatever the file's size and format; and rows that do not fit."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from client.artifacts import Labels, Method, Model, ModelManifest, Origin, write_model
from client.cli import app
from client.dataset import read_table
from client.points import PointScale
from client.score import score_file
from client.stream import BATCH_ROWS, Source
from metarisk_common.adapters import predict
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan

Call = Callable[..., tuple[int, str, str]]
PLANTED = "9173.55-SECRET"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Model:
    random = np.random.default_rng(3)
    params = {
        name: np.asarray(value, np.float64) + random.normal(size=np.shape(value))
        for name, value in initial_params(plan, Encoder(plan.data).width).items()
    }
    manifest = ModelManifest(
        name="loans", institution="Lender A", created="2026-11-23T10:00:00+00:00",
        origin=Origin(sha256="ab" * 32, run_id="run", plan_hash=plan.hash(), signed_by=None, not_private=False),
        labels=Labels(fingerprint="cd" * 32, k=2, positives=1, available=9, left_out=0, segment=None, seed=1),
        method=Method(asked="auto", used="prox", strength=3.0, folds_log_loss={}, prior="constant", prior_variance=0.3),
        points=PointScale(), draws=0, versions={},
    )  # fmt: skip
    return write_model(tmp_path_factory.mktemp("bank"), "loans", manifest, plan, params, ())


@pytest.fixture
def frame(make_loans: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    """New applications: without an outcome, with a number of their own."""
    found = make_loans(lenders=2).drop("outcome", "lender")
    return found.with_columns(number=pl.format("{}", pl.int_range(pl.len()).cast(pl.String).str.zfill(6)))


def peak_resident(work: Callable[[], object]) -> float:
    """Run something, and tell by how many MB the process's largest resident size exceeded what it had before."""

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # starts the record of the peak anew
    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) / 1024


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("out_suffix", [".csv", ".parquet"])
def test_a_score_is_the_models_own_whatever_the_formats(
    call: Call, model: Model, frame: pl.DataFrame, tmp_path: Path, suffix: str, out_suffix: str
) -> None:
    path, out = tmp_path / f"new{suffix}", tmp_path / f"scores{out_suffix}"
    frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path)
    code, said, err = call(app, "score", model.folder, path, "--out", out, "--id", "number")
    assert (code, err) == (0, "")
    assert "440 of 440 rows scored" in said
    found = pl.read_csv(out, schema_overrides={"number": pl.String}) if out_suffix == ".csv" else pl.read_parquet(out)
    assert found.columns == ["number", "probability", "points"]
    assert found["number"].to_list() == frame["number"].to_list(), "the order, and leading zeros"
    expected = predict(model.plan.model, model.params, Encoder(model.plan.data).encode(frame)[0])
    np.testing.assert_allclose(found["probability"], expected, rtol=1e-12)
    np.testing.assert_array_equal(found["points"], PointScale().points(np.log(expected / (1 - expected))))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [other.name for other in tmp_path.iterdir() if other.name.startswith(".")] == []


@pytest.mark.parametrize("batch_rows", [31, 439, 440])
def test_no_score_depends_on_the_batch(model: Model, frame: pl.DataFrame, tmp_path: Path, batch_rows: int) -> None:
    frame.write_parquet(tmp_path / "new.parquet")
    seen: list[tuple[int, int]] = []
    for name, size in (("a", batch_rows), ("b", BATCH_ROWS)):
        score_file(model, tmp_path / "new.parquet", tmp_path / f"{name}.parquet", batch_rows=size,
                   on_rows=lambda done, total: seen.append((done, total)))  # fmt: skip
    a, b = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in "ab")
    np.testing.assert_allclose(a["probability"], b["probability"], rtol=1e-6)  # sums are rounded by the batch's shape
    assert (a["points"] - b["points"]).abs().max() == 0
    assert len(seen) == -(-440 // batch_rows) + 1
    assert seen[-1] == (440, 440)


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_batches_hold_what_the_whole_table_does(tmp_path: Path, batch_rows: int) -> None:
    text = '\ufeffid,note,age\r\n007,"a ""quoted"", comma\r\nand line",1\r\n,,\r\n8,\u00e4\u00f6\u00fc,\n"9","",3'
    (tmp_path / "odd.csv").write_bytes(text.encode())
    whole = read_table(tmp_path / "odd.csv")
    assert whole.shape == (4, 3)
    batches = list(Source(tmp_path / "odd.csv", ("id", "note", "age")).batches(batch_rows))
    assert max(frame.height for frame in batches) <= batch_rows
    assert pl.concat(batches).equals(whole)
    # A line with nothing on it is no record, wherever it stands.
    (tmp_path / "blank.csv").write_bytes(text.replace("\r\n8", "\r\n\r\n\n8").encode() + b"\n\n\n")
    assert pl.concat(Source(tmp_path / "blank.csv", ("id", "note", "age")).batches(batch_rows)).equals(whole)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_memory_stays_that_of_a_batch(model: Model, frame: pl.DataFrame, tmp_path: Path) -> None:
    rows = 300_000
    big = pl.concat([frame] * (rows // frame.height + 1)).head(rows)
    big.with_columns(pl.lit("x" * 250).alias("note")).write_csv(tmp_path / "big.csv")
    del big
    assert (tmp_path / "big.csv").stat().st_size > 75e6
    out = tmp_path / "scores.parquet"
    used = peak_resident(lambda: score_file(model, tmp_path / "big.csv", out, kept=("number",)))
    assert used < 100, f"{used:.0f} MB for a file of 80 MB"
    assert pl.scan_parquet(out).select(pl.len()).collect().item() == rows


def test_rows_that_do_not_fit_are_counted_to_the_last_and_refused(
    call: Call, model: Model, frame: pl.DataFrame, tmp_path: Path
) -> None:
    income = [PLANTED if row in {3, 400} else str(value) for row, value in enumerate(frame["income"])]
    age = ["inf" if row == 400 else str(value) for row, value in enumerate(frame["age"])]
    path, out = tmp_path / "new.csv", tmp_path / "scores.csv"
    frame.with_columns(pl.Series("income", income), pl.Series("age", age)).write_csv(path)
    code, said, err = call(app, "score", model.folder, path, "--out", out)
    assert (code, said) == (2, "")
    assert "2 of 440 rows do not fit the model's schema (column 'income' in 2, column 'age' in 1)" in err
    assert "--keep-going" in err
    assert PLANTED not in err
    assert [other.name for other in tmp_path.iterdir()] == ["new.csv"], "nothing is left of what was begun"
    code, said, err = call(app, "score", model.folder, path, "--out", out, "--keep-going", "--json")
    assert (code, err) == (0, "")
    assert json.loads(said) == {
        "out": str(out), "rows": 440, "scored": 438, "unfit_by_column": {"income": 2, "age": 1},
    }  # fmt: skip
    found = pl.read_csv(out)
    assert found.with_row_index().filter(pl.col("points").is_null())["index"].to_list() == [3, 400]
    assert found["probability"].null_count() == 2


def test_a_file_without_one_row_that_fits_keeps_going_too(model: Model, frame: pl.DataFrame, tmp_path: Path) -> None:
    frame.with_columns(pl.lit("x").alias("income")).write_csv(tmp_path / "new.csv")
    found = score_file(model, tmp_path / "new.csv", tmp_path / "out.parquet", keep_going=True)
    assert (found.rows, found.scored) == (440, 0)
    assert pl.read_parquet(tmp_path / "out.parquet")["points"].null_count() == 440


def test_points_are_scaled_as_asked(call: Call, model: Model, frame: pl.DataFrame, tmp_path: Path) -> None:
    frame.write_parquet(tmp_path / "new.parquet")
    for out, flags in (("a", []), ("b", ["--base-score", 1000, "--base-odds", 1, "--pdo", 40])):
        code, _, err = call(
            app, "score", model.folder, tmp_path / "new.parquet", "--out", tmp_path / f"{out}.csv", *flags
        )
        assert (code, err) == (0, "")
    found = pl.read_csv(tmp_path / "b.csv")
    odds = (1 - found["probability"].to_numpy()) / found["probability"].to_numpy()
    np.testing.assert_array_equal(found["points"], np.rint(1000 + 40 * np.log2(odds)))
    assert found["points"].to_list() != pl.read_csv(tmp_path / "a.csv")["points"].to_list()


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (lambda path: path.write_text("income,age,purpose,number\n"), [], "holds no rows"),
        (
            lambda path: path.write_text(f"income,age,purpose\n1,{PLANTED}\n", encoding="utf-8"),
            [],
            "fewer cells than the header",
        ),
        (lambda path: path.write_bytes(b"income,age\xff"), [], "not UTF-8"),
        (lambda path: path.unlink(), [], "there is no such file"),
        (
            lambda path: path.write_text("incomes,age,purpose\n1,2,car\n", encoding="utf-8"),
            [],
            "did you mean 'incomes'?",
        ),
        (lambda _: None, ["--id", "nummer"], "did you mean 'number'?"),
        (lambda _: None, ["--keep", "points"], "column 'points' cannot be kept"),
        (lambda _: None, ["--pdo", "-1"], "--pdo: must be"),
    ],
)
def test_a_mistake_is_told_without_a_value(
    call: Call, model: Model, frame: pl.DataFrame, tmp_path: Path,
    change: Callable[[Path], object], arguments: list[str], said: str,
) -> None:  # fmt: skip
    path = tmp_path / "new.csv"
    frame.with_columns(pl.lit(1).alias("points")).write_csv(path)
    change(path)
    code, out, err = call(app, "score", model.folder, path, "--out", tmp_path / "scores.csv", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert str(path) in err or arguments
    assert PLANTED not in err
    assert not (tmp_path / "scores.csv").exists()


def test_nothing_is_overwritten(call: Call, model: Model, frame: pl.DataFrame, tmp_path: Path) -> None:
    frame.write_csv(tmp_path / "new.csv")
    before = (tmp_path / "new.csv").read_bytes()
    for out, said in (
        ("new.csv", "exists already"),
        ("scores.xlsx", "only .csv and .parquet"),
        ("no/a.csv", "no such folder"),
    ):
        code, _, err = call(app, "score", model.folder, tmp_path / "new.csv", "--out", tmp_path / out)
        assert (code, said in err) == (2, True), err
    assert (tmp_path / "new.csv").read_bytes() == before
    code, _, err = call(app, "score", tmp_path, tmp_path / "new.csv", "--out", tmp_path / "a.csv")
    assert (code, "is no adapted model" in err) == (2, True)

"""Explanations: parts that add up, reasons in plain words, and how far each can be trusted."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from client.artifacts import Labels, Method, Model, ModelManifest, Origin, write_model
from client.cli import app
from client.explain import Facts, attribute, explain_rows, top_reasons
from client.explanation import explain_file, explain_record
from client.points import PointScale
from client.reasons import fact_names, fact_titles, number_text
from metarisk_common.adapters import predict
from metarisk_common.features import Encoder
from metarisk_common.initialisation import param_shapes
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec, Plan
from simulations.scenarios import load_scenario

Call = Callable[..., tuple[int, str, str]]
MLP = ModelSpec(kind="mlp", hidden=(6, 4))
PLANTED = "77,777 <b>SECRET</b>"


def random_params(spec: ModelSpec, width: int, seed: int, size: float = 1.0) -> Params:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) * size for name, shape in param_shapes(spec, width).items()}


@pytest.fixture(scope="module")
def titled(plan: Plan) -> Plan:
    """The synthetic plan with a title, a unit, and the age a second time, as a category."""
    columns = [column.model_dump(mode="json") for column in plan.data.columns]
    columns[0] |= {"title": "Yearly income", "unit": "crowns"}
    columns += [{"kind": "categorical", "name": "age_twice", "categories": ["20", "30"]}]
    columns[-1]["name"] = "income_known"
    values = json.loads(plan.to_json())
    values["data"]["columns"] = columns
    return Plan.model_validate(values)


@pytest.fixture
def model(tmp_path: Path, titled: Plan) -> Callable[..., Model]:
    def write(spec: ModelSpec = titled.model, draws: int = 5, *, alike: bool = False, trees: int = 0) -> Model:
        values = json.loads(titled.to_json()) | {"model": spec.model_dump(mode="json")}
        if trees:
            values["data"]["encoding"]["interactions"] = {"trees": trees, "depth": 2}
        plan = Plan.model_validate(values)
        width = Encoder(plan.data).width
        manifest = ModelManifest(
            name="loans", institution="Lender A", created="2026-11-23T10:00:00+00:00",
            origin=Origin(sha256="ab" * 32, run_id="run", plan_hash=plan.hash(), signed_by=None, not_private=False),
            labels=Labels(fingerprint="cd" * 32, k=2, positives=1, available=9, left_out=0, segment=None, seed=1),
            method=Method(
                asked="auto", used="prox", strength=3.0, folds_log_loss={}, prior="constant", prior_variance=0.3
            ),
            points=PointScale(), draws=draws, versions={},
        )  # fmt: skip
        params = random_params(spec, width, 0)
        others = tuple(params if alike else random_params(spec, width, seed) for seed in range(1, draws + 1))
        return write_model(tmp_path, "loans", manifest, plan, params, others)

    return write


@pytest.fixture
def frame(make_loans: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    found = make_loans(lenders=1).drop("outcome", "lender").head(60)
    return found.with_columns(number=pl.int_range(pl.len()) + 500, income_known=pl.lit("20"))


@pytest.mark.parametrize("spec", [ModelSpec(), MLP], ids=["scorecard", "mlp"])
def test_contributions_sum_to_the_difference_from_the_reference(
    model: Callable[..., Model], frame: pl.DataFrame, spec: ModelSpec
) -> None:
    adapted = model(spec)
    encoder = Encoder(adapted.plan.data)
    facts = Facts.of(adapted.plan.data, encoder)
    x, _ = encoder.encode(frame)
    explained = explain_rows(adapted, facts, x)
    probability = predict(spec, adapted.params, x)
    logits = np.log(probability / (1 - probability))
    still = np.zeros((1, encoder.width))
    still[0, -1] = x[0, -1]
    base = predict(spec, adapted.params, still)
    np.testing.assert_allclose(explained.reference, np.log(base / (1 - base))[0], atol=1e-10)
    within = 1e-10 if spec.kind == "scorecard" else 1e-5
    np.testing.assert_allclose(explained.contributions.sum(axis=1), logits - explained.reference, atol=within)
    np.testing.assert_allclose(explained.probabilities, probability, atol=within)


@pytest.mark.parametrize("trees", [0, 8])
def test_a_scorecards_contributions_are_weight_times_input(
    model: Callable[..., Model], frame: pl.DataFrame, trees: int
) -> None:
    adapted = model(trees=trees)
    encoder = Encoder(adapted.plan.data)
    facts = Facts.of(adapted.plan.data, encoder)
    x, _ = encoder.encode(frame)
    found = attribute(adapted.plan.model, adapted.params, facts, x)[1]
    terms = x.astype(np.float64) * adapted.params["points.weight"]
    for place, name in enumerate(fact_names(adapted.plan.data, facts)):
        mine = [position for position, group in enumerate(encoder.groups) if group == name]
        np.testing.assert_allclose(found[:, place], terms[:, mine].sum(axis=1), atol=1e-12)


def test_an_mlps_contributions_are_the_integral_of_its_gradient(
    model: Callable[..., Model], frame: pl.DataFrame
) -> None:
    """Equation 3 of the paper by the midpoint rule, with the gradient by hand: nothing of Torch or Captum."""
    adapted = model(MLP)
    encoder = Encoder(adapted.plan.data)
    facts = Facts.of(adapted.plan.data, encoder)
    x = encoder.encode(frame)[0][:5].astype(np.float64)
    params = adapted.params
    total = np.zeros_like(x)
    steps = 4000
    for step in range(steps):
        at = facts.reference + (step + 0.5) / steps * (x - facts.reference)
        first = np.tanh(at @ params["body.0.weight"].T + params["body.0.bias"])
        second = np.tanh(first @ params["body.1.weight"].T + params["body.1.bias"])
        back = (1 - second**2) * params["head.weight"]
        total += ((1 - first**2) * (back @ params["body.1.weight"])) @ params["body.0.weight"] / steps
    terms = total * (x - facts.reference)
    expected = np.stack([terms[:, facts.of_input == fact].sum(axis=1) for fact in range(len(facts.columns))], axis=1)
    np.testing.assert_allclose(attribute(MLP, params, facts, x)[1], expected, atol=1e-5)


def test_reasons_are_what_raises_the_risk_most() -> None:
    found = top_reasons(np.array([[0.5, -3.0, 0.2, 0.9, 0.3, 0.1], [-1.0, -1.0, 0.001, -1.0, 0.4, -1.0]]))
    assert found.tolist() == [[3, 0, 4, 2], [4, -1, -1, -1]]
    assert top_reasons(np.array([[0.1, 0.2]])).tolist() == [[1, 0, -1, -1]]


def test_stability_is_the_share_of_draws_that_agree(model: Callable[..., Model], frame: pl.DataFrame) -> None:
    adapted = model(draws=40)
    encoder = Encoder(adapted.plan.data)
    facts = Facts.of(adapted.plan.data, encoder)
    x, _ = encoder.encode(frame)
    found = explain_rows(adapted, facts, x)
    one = found.reasons[7]
    draws = [top_reasons(attribute(adapted.plan.model, draw, facts, x[7:8])[1])[0] for draw in adapted.draws]
    for rank, fact in enumerate(one):
        share = np.mean([fact in draw for draw in draws])
        assert found.stability[7, rank] == pytest.approx(share) if fact >= 0 else np.isnan(found.stability[7, rank])
    assert 0.2 < np.nanmean(found.stability) < 0.8, "draws that have nothing in common agree by chance"
    alike = explain_rows(model(draws=3, alike=True), facts, x)
    assert np.nanmin(alike.stability) == 1
    assert np.isnan(explain_rows(model(draws=0), facts, x).stability).all()


def test_inputs_of_one_column_of_the_table_make_one_reason() -> None:
    schema = load_scenario(Path(__file__).resolve().parents[2] / "simulations" / "sba.toml").plan().data
    facts = Facts.of(schema, Encoder(schema))
    titles = fact_titles(schema, facts)
    assert len(titles) == len(schema.columns) - 1
    assert ("Time of approval" in titles, "Fiscal year of approval" in titles) == (True, False)
    assert "Share guaranteed by the government" in titles, "a quotient is a fact of its own"


def test_a_record_is_explained_in_plain_words(
    call: Call, model: Callable[..., Model], frame: pl.DataFrame, tmp_path: Path
) -> None:
    folder = model().folder
    odd = frame.with_columns(pl.when(pl.col("number") == 502).then(1.0).otherwise(pl.col("income")).alias("income"))
    odd.write_csv(tmp_path / "new.csv")
    code, out, err = call(app, "explain", folder, tmp_path / "new.csv", "--row", 3, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    by_name = {part["column"]: part for part in said["columns"]}
    assert by_name["income"]["value"] == "1 crowns, counted as 5000"
    assert by_name["income"]["title"] == "Yearly income"
    assert sum(part["logit"] for part in said["columns"]) == pytest.approx(said["logit"] - said["reference"]["logit"])
    assert said["points"] == round(PointScale().offset - PointScale().factor * said["logit"])
    raising = [part["column"] for part in said["columns"] if part["logit"] >= 0.01]
    assert [part["column"] for part in said["reasons"]] == raising[:4]
    assert raising, "this record must have a reason for the test to say anything"
    for part in said["reasons"]:
        assert part["text"] == f"{part['title']}: {part['value']} (raises the risk)"
        assert 0 <= part["stability"] <= 1
    keyed = call(app, "explain", folder, tmp_path / "new.csv", "--id", 502, "--id-column", "number", "--json")
    assert (keyed[0], json.loads(keyed[1])) == (0, said)
    code, out, _ = call(app, "explain", folder, tmp_path / "new.csv", "--row", 3)
    assert code == 0
    assert f"row 3: {said['points']} points" in out
    assert said["reasons"][0]["text"] in out


@pytest.mark.parametrize("spec", [ModelSpec(), MLP], ids=["scorecard", "mlp"])
def test_what_columns_do_together_is_a_reason_of_its_own(
    model: Callable[..., Model], frame: pl.DataFrame, tmp_path: Path, spec: ModelSpec
) -> None:
    adapted = model(spec, trees=8)
    table, out = tmp_path / "some.csv", tmp_path / "out.csv"
    frame.write_csv(table)
    found = explain_record(adapted, table, row=3)
    (together,) = [part for part in found.columns if part.name == "interactions"]
    assert together.text.startswith("Several columns together: as they are combined here (")
    assert sum(part.logit for part in found.columns) == pytest.approx(found.logit - found.reference_logit, abs=1e-5)
    explain_file(adapted, table, out)
    reasons = pl.read_csv(out).select(pl.col("^reason_.*$").str.contains("Several columns together")).sum().row(0)
    assert sum(count or 0 for count in reasons) > 0


def test_numbers_read_as_people_write_them() -> None:
    assert [number_text(value) for value in (0.0, 2006.0, 0.81372, 35000.0, 1234567.8, -0.5)] == [
        "0", "2006", "0.8137", "35,000", "1,234,568", "-0.5",
    ]  # fmt: skip


def test_the_page_escapes_what_the_data_hold(
    call: Call, model: Callable[..., Model], frame: pl.DataFrame, tmp_path: Path
) -> None:
    frame.with_columns(purpose=pl.lit(PLANTED)).write_csv(tmp_path / "new.csv")
    page = tmp_path / "page.html"
    code, _, err = call(app, "explain", model().folder, tmp_path / "new.csv", "--row", 1, "--html", page)
    assert (code, err) == (0, "")
    text = page.read_text(encoding="utf-8")
    assert PLANTED not in text
    assert "77,777 &lt;b&gt;SECRET&lt;/b&gt;, counted as other" in text
    assert "no DP claim" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    code, _, err = call(app, "explain", model().folder, tmp_path / "new.csv", "--row", 1, "--html", page)
    assert (code, "exists already" in err) == (2, True)


@pytest.mark.parametrize("spec", [ModelSpec(), MLP], ids=["scorecard", "mlp"])
def test_a_batch_says_the_same_as_each_record_by_itself(
    call: Call, model: Callable[..., Model], frame: pl.DataFrame, tmp_path: Path, spec: ModelSpec
) -> None:
    folder = model(spec).folder
    odd = pl.Series("income", [str(value) if row != 11 else "none" for row, value in enumerate(frame["income"])])
    frame.with_columns(odd).write_csv(tmp_path / "new.csv")
    out = tmp_path / "reasons.parquet"
    arguments = (folder, tmp_path / "new.csv", "--out", out, "--id-column", "number", "--keep-going")
    code, said, err = call(app, "explain", *arguments)
    assert (code, err) == (0, "")
    assert "59 of 60 rows scored" in said
    found = pl.read_parquet(out)
    assert found.columns[:3] == ["number", "probability", "points"]
    assert found.row(11)[1:] == (None,) * 10
    for row in (0, 25, 59):
        one = json.loads(call(app, "explain", folder, tmp_path / "new.csv", "--row", row + 1, "--json")[1])
        texts = [found[f"reason_{rank}"][row] for rank in range(1, 5)]
        shares = [found[f"stability_{rank}"][row] for rank in range(1, 5)]
        assert [text for text in texts if text is not None] == [part["text"] for part in one["reasons"]]
        assert [share for share in shares if share is not None] == [part["stability"] for part in one["reasons"]]
        assert found["points"][row] == one["points"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say which record"),
        (["--row", "1", "--id", "5"], "--id: the plan names no identifier"),
        (["--row", "1", "--id", "5", "--id-column", "number"], "say which record"),
        (["--row", "61"], "has rows 1 to 60"),
        (["--id", "SECRET", "--id-column", "number"], "no row has that value in column 'number'"),
        (["--id", "20", "--id-column", "income_known"], "60 rows have that value"),
        (["--row", "2"], "row 2: does not fit the model's schema (column 'income' in 1)"),
        (["--row", "1", "--keep", "age"], "are for --out"),
        (["--row", "1", "--out", "a.csv"], "--out explains every row"),
    ],
)
def test_a_mistake_is_told_without_a_value(
    call: Call, model: Callable[..., Model], frame: pl.DataFrame, tmp_path: Path, arguments: list[str], said: str
) -> None:
    odd = pl.Series("income", ["SECRET" if row == 1 else str(value) for row, value in enumerate(frame["income"])])
    frame.with_columns(odd).write_csv(tmp_path / "new.csv")
    code, out, err = call(app, "explain", model().folder, tmp_path / "new.csv", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "SECRET" not in err

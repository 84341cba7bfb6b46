"""`metarisk-client adapt`: from what an operator sends to a model in the bank's folder, and what stops it."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from safetensors.numpy import save_file

from client.adapt import _shuffled
from client.artifacts import load_model
from client.cli import app
from client.dataset import load_dataset
from client.verify import verify_export
from metarisk_common.adapters import adapt_params
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.manifest import signed_bytes
from metarisk_common.plan import Plan, read_plan
from metarisk_common.prior import LearnedPrior
from server.config import Server, load_server
from server.manifest import export_bundle, export_file
from server.setup import init

Call = Callable[..., tuple[int, str, str]]
ROWS = 220


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return load_server(init(tmp_path_factory.mktemp("operator") / "consortium", name="Verbund").path)


@pytest.fixture(scope="module")
def key(server: Server) -> Path:
    return server.folder.signing_public_key


@pytest.fixture(scope="module")
def exported(finished_run: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "export"
    export_bundle(finished_run, out, server)
    return out


@pytest.fixture(scope="module")
def run_plan(finished_run: Path) -> Plan:
    return read_plan(finished_run / "plan.json")


@pytest.fixture
def bank(tmp_path: Path, make_bank: Callable[..., Path], make_loans: Callable[..., pl.DataFrame], plan: Plan) -> Path:
    return make_bank(tmp_path / "bank", plan, make_loans(lenders=1), seed=None)


@pytest.fixture
def adapt(call: Call, exported: Path, key: Path, bank: Path) -> Callable[..., dict[str, Any]]:
    def adapted(*arguments: object) -> dict[str, Any]:
        code, out, err = call(app, "adapt", exported, "--key", key, "--folder", bank, "--json", *arguments)
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    return adapted


def sign_again(export: Path, server: Server) -> None:
    """Sign whatever the files hold now, as a careful operator would have."""
    said = json.loads((export / "manifest.json").read_bytes())
    for name in said["files"]:
        data = (export / name).read_bytes()
        said["files"][name] = {"size_bytes": len(data), "sha256": sha256(data).hexdigest()}
    private = load_pem_private_key(server.folder.signing_key.read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    content = json.dumps(said).encode()
    (export / "manifest.json").write_bytes(content)
    (export / "manifest.sig").write_bytes(private.sign(signed_bytes(content)))


def test_a_model_says_what_it_was_made_of(
    adapt: Callable[..., dict[str, Any]], exported: Path, finished_run: Path, bank: Path, run_plan: Plan
) -> None:
    said = adapt("--k", 40, "--method", "prox", "--seed", 5, "--pdo", 30)
    assert said["claim"] == "no DP claim"
    assert said["origin"]["sha256"] == sha256((exported / "initialization.safetensors").read_bytes()).hexdigest()
    assert said["origin"]["plan_hash"] == run_plan.hash()
    assert said["origin"]["run_id"] == json.loads((exported / "manifest.json").read_bytes())["run_id"]
    assert said["origin"]["signed_by"].startswith("SHA256:")
    assert said["origin"]["not_private"], f"{finished_run}: its noise is seeded"
    assert (said["labels"]["k"], said["labels"]["available"], said["labels"]["seed"]) == (40, ROWS, 5)
    assert said["method"]["used"] == "prox"
    assert said["points"] == {"base_score": 600.0, "base_odds": 50.0, "pdo": 30.0}
    assert Path(said["model"]).parent == bank / "models"
    assert load_model(Path(said["model"])).manifest.model_dump(mode="json") == {
        name: value for name, value in said.items() if name != "model"
    }


def test_all_labels_give_the_adaptation_of_the_whole_table(
    adapt: Callable[..., dict[str, Any]], exported: Path, key: Path, bank: Path, run_plan: Plan
) -> None:
    model = load_model(Path(adapt("--k", "all", "--method", "prox")["model"]))
    data = load_dataset(bank / "loans.csv", run_plan.data, "Lender A")
    start = verify_export(exported, key).meta_params
    expected = adapt_params(run_plan.model, start, data.x, data.y, method="prox")
    np.testing.assert_allclose(model.params["points.weight"], expected.params["points.weight"], atol=1e-8)
    order = _shuffled(ROWS, model.manifest.labels.seed, "labels")
    half = order[_shuffled(ROWS, model.manifest.labels.seed, "half", 3)[: ROWS // 2]]
    drawn = adapt_params(run_plan.model, start, data.x[half], data.y[half], method="prox")
    np.testing.assert_allclose(model.draws[3]["points.weight"], drawn.params["points.weight"], atol=1e-8)
    halves = [draw["points.weight"] for draw in model.draws]
    assert len(halves) == 20
    assert min(float(np.abs(a - model.params["points.weight"]).max()) for a in halves) > 1e-4
    assert len({draw.tobytes() for draw in halves}) == 20, "every draw is another half of the labels"


def test_a_seed_chooses_the_same_records_again(adapt: Callable[..., dict[str, Any]]) -> None:
    first, again, other = (adapt("--k", 30, "--seed", seed) for seed in (1, 1, 2))
    fresh = [adapt("--k", 30)["labels"]["fingerprint"] for _ in range(2)]
    assert first["labels"]["fingerprint"] == again["labels"]["fingerprint"] != other["labels"]["fingerprint"]
    assert len({*fresh, first["labels"]["fingerprint"]}) == 3
    assert first["files"]["params.safetensors"] == again["files"]["params.safetensors"]
    assert (first["name"], again["name"], other["name"]) == ("consumer-001", "consumer-002", "consumer-003")


def test_only_a_segments_records_adapt_it(
    adapt: Callable[..., dict[str, Any]], bank: Path, run_plan: Plan, call: Call, exported: Path, key: Path
) -> None:
    data = load_dataset(bank / "loans.csv", run_plan.data, "Lender A")
    assert data.segment is not None
    here = data.segment == "car"
    said = adapt("--segment", "car")
    assert said["labels"]["k"] == int(here.sum())
    assert said["labels"]["positives"] == int(data.y[here].sum())
    code, _, err = call(app, "adapt", exported, "--key", key, "--folder", bank, "--segment", "boat")
    assert code == 2
    assert "no labelled record in segment 'boat'" in err


def test_a_learned_prior_comes_with_the_signed_journal(
    call: Call, exported: Path, key: Path, server: Server, bank: Path, run_plan: Plan, tmp_path: Path
) -> None:
    export = Path(shutil.copytree(exported, tmp_path / "export"))
    groups = tuple(dict.fromkeys(Encoder(run_plan.data).groups))
    tau2 = tuple(0.02 * (number + 1) for number in range(len(groups)))
    lines = (export / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1]) | {"learned_prior": LearnedPrior(groups, tau2, 3, 4).to_json()}
    (export / "journal.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n", encoding="utf-8")
    sign_again(export, server)
    arguments = (app, "adapt", export, "--key", key, "--folder", bank, "--k", "all", "--method", "prior", "--json")
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["method"]["prior"] == "learned"
    assert LearnedPrior.from_json(said["method"]["learned_prior"]).tau2 == tau2
    data = load_dataset(bank / "loans.csv", run_plan.data, "Lender A")
    prior = LearnedPrior(groups, tau2, 3, 4).variances(Encoder(run_plan.data).groups)
    start = verify_export(export, key).meta_params
    expected = adapt_params(run_plan.model, start, data.x, data.y, method="prior", prior=prior)
    found = load_model(Path(said["model"]))
    np.testing.assert_allclose(found.params["points.weight"], expected.params["points.weight"], atol=1e-8)


def test_a_plain_file_is_called_unsigned(call: Call, finished_run: Path, bank: Path, tmp_path: Path, key: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    export_file(finished_run, plain)
    code, out, err = call(app, "adapt", plain, "--folder", bank, "--k", 20, "--name", "mine")
    assert (code, err) == (0, "")
    assert "unsigned" in out
    assert "NOT PRIVATE" in out
    assert "no DP claim" in out
    assert load_model(bank / "models" / "mine-001").manifest.origin.signed_by is None
    code, _, err = call(app, "adapt", plain, "--folder", bank, "--key", key)
    assert (code, "only an export's folder is signed" in err) == (2, True)
    whole = plain.read_bytes()
    plain.write_bytes(whole[: len(whole) // 2])
    code, _, err = call(app, "adapt", plain, "--folder", bank)
    assert (code, "is no initialization with its plan" in err) == (5, True)


def test_no_labels_leave_the_initialization_and_ask_for_no_table(
    adapt: Callable[..., dict[str, Any]], exported: Path, key: Path, bank: Path
) -> None:
    (bank / "loans.csv").unlink()
    said = adapt("--k", 0)
    assert (said["method"]["used"], said["labels"]["k"]) == ("none", 0)
    start = verify_export(exported, key).meta_params["points.weight"]
    np.testing.assert_array_equal(load_model(Path(said["model"])).params["points.weight"], start)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--k", "221"], 2, "220 labelled records, fewer than --k 221"),
        (["--k", "some"], 2, "--k: give a number"),
        (["--method", "magic"], 2, "--method: choose one of"),
        (["--method", "prior"], 2, "has learned no prior"),
        (["--name", "../up"], 2, "--name: use at most"),
        (["--pdo", "0"], 2, "--pdo: must be"),
        (["--data", "missing.csv"], 2, "missing.csv: there is no such file"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    call: Call, exported: Path, key: Path, bank: Path, arguments: list[str], code: int, said: str
) -> None:
    found, out, err = call(app, "adapt", exported, "--key", key, "--folder", bank, *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert [path for path in bank.glob("models/*") if path.is_dir()] == []


def test_what_was_not_signed_is_not_adapted(
    call: Call, exported: Path, key: Path, bank: Path, tmp_path: Path, server: Server
) -> None:
    export = Path(shutil.copytree(exported, tmp_path / "export"))
    with (export / "journal.jsonl").open("ab") as file:
        file.write(b"{}\n")
    code, _, err = call(app, "adapt", export, "--key", key, "--folder", bank)
    assert (code, "journal.jsonl" in err) == (5, True)
    code, _, err = call(app, "adapt", exported, "--folder", bank)
    assert (code, "--key" in err) == (2, True)
    # Signed, but of a prior that is none for this plan.
    (export / "journal.jsonl").write_bytes((exported / "journal.jsonl").read_bytes())
    lines = (export / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1]) | {"learned_prior": LearnedPrior(("else",), (1.0,), 1, 1).to_json()}
    (export / "journal.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n", encoding="utf-8")
    sign_again(export, server)
    code, _, err = call(app, "adapt", export, "--key", key, "--folder", bank)
    assert (code, "no prior for the plan's columns" in err) == (5, True)
    assert not (bank / "models").exists()


def test_rows_that_do_not_fit_are_left_out_and_counted(
    adapt: Callable[..., dict[str, Any]], bank: Path, make_loans: Callable[..., pl.DataFrame], tmp_path: Path
) -> None:
    frame = make_loans(lenders=1)
    place = pl.int_range(pl.len())
    odd = frame.with_columns(
        pl.when(place < 4).then(pl.lit("SECRET")).otherwise(pl.col("income").cast(pl.String)).alias("income")
    )
    odd.write_csv(tmp_path / "odd.csv")
    said = adapt("--data", tmp_path / "odd.csv")
    assert (said["labels"]["left_out"], said["labels"]["available"]) == (4, ROWS - 4)
    assert "SECRET" not in json.dumps(said)
    assert bank.exists()


def test_learned_rates_are_the_steps_of_sgd(call: Call, bank: Path, tmp_path: Path, plan: Plan) -> None:
    values = json.loads(plan.to_json())
    values["inner"]["algorithm"] = "meta_sgd"
    values["mechanism"] |= {"noise_multiplier": 0.0, "max_grad_norm": None}
    learned = Plan.model_validate(values)
    start = initial_params(learned, Encoder(learned.data).width)
    start["rate/points.weight"] *= 0.25
    said = {"plan": learned.to_json(), "plan_hash": learned.hash(), "run_id": "run"}
    save_file(start, tmp_path / "rates.safetensors", metadata=said)
    arguments = ("--folder", bank, "--method", "sgd", "--json")
    code, out, err = call(app, "adapt", tmp_path / "rates.safetensors", *arguments)
    assert (code, err) == (0, "")
    model = load_model(Path(json.loads(out)["model"]))
    data = load_dataset(bank / "loans.csv", learned.data, "Lender A")
    expected = adapt_params(learned.model, start, data.x, data.y, method="sgd").params
    plain = adapt_params(learned.model, {"points.weight": start["points.weight"]}, data.x, data.y, method="sgd").params
    assert set(model.params) == {"points.weight"}
    np.testing.assert_allclose(model.params["points.weight"], expected["points.weight"], atol=1e-6)
    assert float(np.abs(plain["points.weight"] - expected["points.weight"]).max()) > 1e-3

"""The audit's experiment: canaries are what they should be, banks are real, what is written can be checked again."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import client.mechanism
import simulations.audit
from client.ledger import Ledger
from client.rng import SecureRandom
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.features import Encoder
from metarisk_common.models import build, forward, record_losses, to_tensors
from metarisk_common.plan import Plan, read_plan
from simulations.audit import Audit, Request, audit, broadcast
from simulations.audit_page import render
from simulations.audit_statistics import Claim, Scores, judge
from simulations.cli import app

Call = Callable[..., tuple[int, str, str]]
SMALL = ("--canaries", 400, "--rounds", 2, "--seed", 5)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, call: Call) -> tuple[Path, int, str]:
    """An audit by the command line: its folder, exit code and standard output."""
    out = tmp_path_factory.mktemp("written") / "audit"
    code, said, err = call(app, "audit", *SMALL, "--out", out, "--json")
    assert err == ""
    return out, code, said


@pytest.fixture(scope="module", params=["scorecard", "mlp"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    folder = tmp_path_factory.mktemp(request.param) / "audit"
    return audit(Request(folder, canaries=300, rounds=1, seed=1, model=request.param))


def canary(plan: Plan, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    frame = pl.DataFrame({"mark": [f"m{number}"], "amount": [30_000.0], "term": [180.0]})
    return torch.from_numpy(Encoder(plan.data).encode(frame)[0]), torch.tensor([float(number % 2)])


def test_a_canary_lies_in_one_column(small: Audit) -> None:
    x, _ = canary(small.plan, 7)
    own, rest = float(x[0, 7]), torch.cat([x[0, :7], x[0, 8:300]])
    # The ordinary columns take the rest, and less of it the more marks there are.
    assert own > 0.93
    assert float(rest.abs().max()) < 0.01


def test_what_the_attacker_looks_for_is_the_canary_s_own_gradient(small: Audit) -> None:
    """Against plain autograd at the broadcast weights: the strength, the sign, and that the clip does bite."""
    plan = small.plan
    x, y = canary(plan, 7)
    params = {name: value.requires_grad_() for name, value in to_tensors(broadcast(plan)).items()}
    loss = record_losses(forward(build(plan.model, x.shape[1]), params, x), y).sum()
    gradients = torch.autograd.grad(loss, list(params.values()))
    norm = float(torch.cat([value.flatten() for value in gradients]).norm())
    column = gradients[0][:, 7]
    assert norm > 10 * float(plan.mechanism.max_grad_norm or 0)
    assert small.scores.strength[7] == pytest.approx(float(column.norm()) / norm, rel=1e-4)
    assert small.scores.orientation[7] == np.sign(float(column.sum()))


def test_a_canary_has_an_unlikely_label_and_a_probe_a_likely_one(small: Audit) -> None:
    plan = small.plan
    for number, likely in ((0, False), (1, False), (300, True), (301, True)):
        x, y = canary(plan, number)
        logit = float(forward(build(plan.model, x.shape[1]), to_tensors(broadcast(plan)), x))
        assert (logit > 0) == (bool(y) == likely)
        assert 1.5 < abs(logit) < 3.5


def test_the_coin_decides_who_is_in(small: Audit) -> None:
    assert 110 < int((small.scores.copies == 1).sum()) < 190
    assert int((small.scores.copies == 40).sum()) == 50
    table = pl.read_parquet(small.request.folder / "bank-1" / "data.parquet")
    counts = dict(table["mark"].value_counts().iter_rows())
    planted = [counts.get(f"m{index}", 0) for index in range(350)]
    assert planted == small.scores.copies[0].tolist()
    assert table.height == sum(planted) + 500


def test_the_bank_is_one_of_production(small: Audit) -> None:
    folder = small.request.folder / "bank-1"
    config = tomllib.loads((folder / "institution.toml").read_text(encoding="utf-8"))
    assert "simulation" not in config
    # The declared size counts every record that might be there: it says nothing about the coins.
    assert config["declared_size"] == 300 + 50 * 40 + 500
    with Ledger.read(folder / "ledger.sqlite") as ledger:
        assert 0.99 * 4 < ledger.spent() <= 4


def test_the_command_says_what_it_found(written: tuple[Path, int, str]) -> None:
    out, code, said = written
    told = json.loads(said)
    assert told == json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert code == (0 if told["verdict"] == "PASS" else 1)
    assert told["verdict"] != "FALSIFIED"
    assert told["claim"]["steps"] == 8
    assert told["plan_hash"] == read_plan(out / "plan.json").hash()


def test_the_verdict_can_be_reached_again_from_the_scores(written: tuple[Path, int, str]) -> None:
    out, _, said = written
    told, table = json.loads(said), pl.read_parquet(out / "scores.parquet")
    values = table.select(pl.col("^round .*$")).to_numpy().T[None]
    scores = Scores(
        values,
        table["copies"].to_numpy()[None].astype(np.int64),
        table["strength"].to_numpy(),
        table["orientation"].to_numpy(),
    )
    again = judge(scores, Claim(**told["claim"]))
    assert again.verdict == told["verdict"]
    assert again.figures.bound == pytest.approx(told["figures"]["bound"])


def test_the_page_is_complete_in_itself(written: tuple[Path, int, str]) -> None:
    page = (written[0] / "audit.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('<svg class="chart') == 2
    assert "What this audit cannot see" in page
    assert "--seed 5" in page


def test_the_terminal_is_told_in_words(tmp_path: Path, call: Call) -> None:
    _, said, _ = call(app, "audit", *SMALL, "--model", "mlp", "--out", tmp_path / "audit")
    assert said.startswith(("PASS", "INCONCLUSIVE"))
    for word in ("claim", "bound", "noise", "shift", "correlation", "cannot see", "audit.html"):
        assert word in said


def test_a_broken_engine_ends_the_command_with_1(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(total: torch.Tensor, std: float, rng: SecureRandom) -> torch.Tensor:
        return total + torch.from_numpy(rng.normal(tuple(total.shape), std / 3)).to(total.dtype)

    monkeypatch.setattr(client.mechanism, "noised", silent)
    code, said, _ = call(app, "audit", *SMALL, "--out", tmp_path / "audit")
    assert code == 1
    assert said.startswith("FALSIFIED: ")
    assert "noise has 0.3" in said
    page = (tmp_path / "audit" / "audit.html").read_text(encoding="utf-8")
    assert "The claim of epsilon 4 is refuted" in page
    assert "noise has 0.3" in page


def test_canaries_are_shared_out_among_banks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations.audit, "_MARKS_PER_BANK", 150)
    seen: list[tuple[int, int]] = []
    found = audit(Request(tmp_path / "audit", canaries=400, rounds=2), lambda *progress: seen.append(progress))
    assert found.scores.values.shape == (3, 2, 134 + 50)
    assert found.findings.figures.planted + found.findings.figures.left_out == 402
    assert seen == [(done, 6) for done in range(1, 7)]
    assert not np.array_equal(found.scores.copies[0], found.scores.copies[1])
    assert "3 synthetic banks" in render(found, created="2026-01-01")


def test_the_seed_decides_the_coins_and_nothing_else(tmp_path: Path) -> None:
    one, two, other = (
        audit(Request(tmp_path / name, canaries=100, rounds=1, seed=seed)).scores
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert np.array_equal(one.copies, two.copies)
    assert not np.array_equal(one.copies, other.copies)
    # At the audit's long weights float32 is coarse, so that two draws of noise may round alike; of one seed all would.
    assert np.sum(one.values == two.values) <= 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epsilon", "inf"), "--epsilon"),
        (("--epsilon", "0"), "--epsilon"),
        (("--delta", "1e-3"), "--delta"),
        (("--model", "forest"), "--model"),
        (("--thorough", "--canaries", 500), "exclude"),
        (("--canaries", 5), "--canaries"),
    ],
)
def test_what_cannot_be_asked_is_told(arguments: tuple[str, ...], said: str, tmp_path: Path, call: Call) -> None:
    code, _, err = call(app, "audit", *arguments, "--out", tmp_path / "audit")
    assert code == 2
    assert said in err
    assert not (tmp_path / "audit").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="in use"):
        audit(Request(tmp_path))
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]


def test_a_bank_that_declines_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr(client.mechanism, "poisson_batch", broken)
    with pytest.raises(MetariskError, match="bank 1 answered round 1 with a refusal"):
        audit(Request(tmp_path / "audit", canaries=100))

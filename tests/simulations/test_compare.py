"""A comparison is repeatable, goes on where it was killed, and judges nobody on what was learned from."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.plan import Plan
from simulations import compare_page, vector
from simulations.cli import app
from simulations.compare import BASELINES, Outcome, carry_out
from simulations.compare_data import judged_sets, open_world, training_tables, training_tasks
from simulations.compare_tables import Pair, Table, tabulate
from simulations.comparison import Loaded, load_comparison, parts_of

TOML = """\
name = "small"
scenario = "scenario.toml"
reference = "reptile"
epsilons = [2, inf]
seeds = [1, 2]
baselines = ["local-logistic", "pooled-logistic"]
split = { kind = "folds", folds = 2 }

[evaluation]
k = [0, 10, 50]
gain_k = 50
draws = 2
min_judged = 50

[methods.reptile]
server = { rounds = 2 }

[methods.twin]
like = "reptile"

[methods.still]
like = "reptile"
adaptation = { method = "none" }

[methods.joint]
title = "Joint"
training = { algorithm = "fedavg", local_steps = 1, learning_rate = 1.0 }
server = { rounds = 3, learning_rate = 3.0 }
epsilons = [inf]
"""


def write(folder: Path, make_scenario: Callable[..., Path], frame: pl.DataFrame, text: str = TOML) -> Loaded:
    make_scenario(folder, frame=frame)
    path = folder / "compare.toml"
    path.write_text(text, encoding="utf-8")
    return load_comparison(path)


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory,
    make_scenario: Callable[..., Path],
    make_loans: Callable[..., pl.DataFrame],
) -> Loaded:
    return write(tmp_path_factory.mktemp("comparison"), make_scenario, make_loans(lenders=6, rows=130))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def done(loaded: Loaded, kept: Path) -> tuple[Outcome, Table]:
    outcome = carry_out(loaded, kept, workers=0)
    return outcome, tabulate(loaded, outcome)


def pairs_of(table: Table, **wanted: object) -> list[Pair]:
    return [pair for pair in table["pairs"] if all(pair[key] == value for key, value in wanted.items())]  # type: ignore[literal-required]


def test_a_killed_comparison_goes_on_and_gives_the_same_table_with_two_workers(
    loaded: Loaded, done: tuple[Outcome, Table], tmp_path: Path
) -> None:
    def kill(finished: int, _total: int) -> None:
        if finished == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(loaded, tmp_path, workers=0, on_progress=kill)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert 0 < len(made) < len(done[0].scores)
    again = carry_out(loaded, tmp_path, workers=2)
    assert again.scores == done[0].scores
    assert list(again.scores) == list(done[0].scores)
    assert json.dumps(tabulate(loaded, again)) == json.dumps(done[1])
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_nothing_is_trained_twice(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_scenario: Callable[..., Path]
) -> None:
    trained: list[tuple[str, int | None]] = []
    learn = vector.learn

    def spy(plan: Plan, *arguments: Any, seed: int | None, **named: Any) -> vector.Learned:
        trained.append((plan.hash(), seed))
        return learn(plan, *arguments, seed=seed, **named)

    monkeypatch.setattr(vector, "learn", spy)
    carry_out(loaded, tmp_path, workers=0)
    # In each of 2 folds: Reptile and those like it with 2 seeds at epsilon 2, and once without noise; joint once.
    assert len(trained) == 2 * (2 + 1 + 1)
    carry_out(loaded, tmp_path, workers=0)
    assert len(trained) == 8
    # Judged otherwise, nothing is learned anew; what is learned otherwise, is.
    source = loaded.base_path.parent / "compare.toml"
    for old, new, more in (("draws = 2", "draws = 1", 0), ("rounds = 3", "rounds = 4", 2)):
        changed = source.with_name("changed.toml")
        changed.write_text(source.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        carry_out(load_comparison(changed), tmp_path, workers=0)
        assert len(trained) == 8 + more


def test_a_method_that_is_the_reference_differs_by_exactly_nothing(done: tuple[Outcome, Table]) -> None:
    found = pairs_of(done[1], kind="reference", method="twin")
    assert {(pair["epsilon"], pair["k"], pair["metric"]) for pair in found} == {
        (epsilon, k, metric) for epsilon in (2.0, "inf") for k in (0, 10, 50) for metric in ("auc", "log_loss")
    }
    for pair in found:
        assert (pair["mean"], pair["ci95"], pair["wins"], pair["losses"]) == (0.0, [0.0, 0.0], 0, 0)
        assert set(pair.get("by_lender", {}).values()) <= {0.0}
    still = pairs_of(done[1], kind="labels", method="still")
    assert still
    assert {pair["mean"] for pair in still} == {0.0}
    assert any(pair["mean"] != 0 for pair in pairs_of(done[1], kind="labels", method="reptile"))


def test_figures_are_means_over_lenders_of_means_over_draws_and_seeds(done: tuple[Outcome, Table]) -> None:
    outcome, table = done
    by_lender: dict[str, list[float]] = {}
    for key, scores in outcome.scores.items():
        if (key.method, key.epsilon) == ("reptile", 2.0):
            for score in scores:
                if score.k == 10:
                    by_lender.setdefault(score.institution, []).append(score["auc"])
    assert {len(values) for values in by_lender.values()} == {4}
    row = next(row for row in table["rows"] if (row["method"], row["epsilon"], row["k"]) == ("reptile", 2.0, 10))
    assert row["auc"]["mean"] == pytest.approx(sum(sum(v) / 4 for v in by_lender.values()) / len(by_lender))
    assert row["lenders"] == len(by_lender) == 4


def test_every_training_lender_is_judged_in_one_fold_and_no_other_at_all(
    loaded: Loaded, done: tuple[Outcome, Table]
) -> None:
    judged = [
        {score.institution for score in scores} for key, scores in done[0].scores.items() if key.method == BASELINES
    ]
    assert len(judged) == 2
    assert not judged[0] & judged[1]
    seen = parts_of(loaded, list(open_world(loaded.base_path).tables))
    assert judged[0] | judged[1] == {name for part in seen for name in part.judged}
    assert len(judged[0] | judged[1]) == 4  # of 6, with 2 unseen


@given(
    names=st.sets(st.text(min_size=1, max_size=8), min_size=8, max_size=20),
    folds=st.integers(2, 6),
    over=st.sampled_from(["training", "all"]),
)
def test_a_lender_that_is_held_out_is_never_learned_from(
    loaded: Loaded, names: set[str], folds: int, over: str
) -> None:
    comparison = loaded.comparison.model_copy(
        update={"split": loaded.comparison.split.model_copy(update={"folds": folds, "over": over})}
    )
    parts = parts_of(Loaded(comparison, loaded.base, loaded.base_path), sorted(names))
    assert len(parts) == folds
    judged = [name for part in parts for name in part.judged]
    assert len(set(judged)) == len(judged) == len(names) - (2 if over == "training" else 0)
    for part in parts:
        assert not set(part.training) & set(part.judged)
        assert set(part.training) | set(part.judged) == set(judged)


def test_a_segment_that_is_held_out_is_in_no_training_table(
    tmp_path: Path, make_scenario: Callable[..., Path], make_loans: Callable[..., pl.DataFrame]
) -> None:
    text = TOML.replace('{ kind = "folds", folds = 2 }', '{ kind = "segments", unseen = ["car"] }')
    loaded = write(tmp_path, make_scenario, make_loans(rows=330), text.replace("[1, 2]", "[1]"))
    world = open_world(loaded.base_path)
    (part,) = parts_of(loaded, list(world.tables))
    tables = training_tables(world, part)
    assert len(tables) == 4
    for name, table in tables.items():
        assert set(table["purpose"]) == {"home", "travel"}
        assert table.height == world.tables[name].filter(pl.col("purpose") != "car").height
    tasks = training_tasks(world, part, loaded.scenario("reptile", 2.0).plan())
    assert {name: sum(len(task.y) for task in own) for name, own in tasks.items()} == {
        name: table.height for name, table in tables.items()
    }
    sets = judged_sets(world, part, loaded.comparison.evaluation, world.scenario.columns)
    assert {item.institution for item in sets} <= {f"{name} / car" for name in tables}
    for item in sets:
        name = item.institution.removesuffix(" / car")
        assert len(item.y) == world.tables[name].filter(pl.col("purpose") == "car").height
    wrong = write(tmp_path, make_scenario, make_loans(), text.replace('["car"]', '["boat"]'))
    with pytest.raises(ConfigError, match="no record of the table is of segment 'boat'"):
        carry_out(wrong, tmp_path / "out")


def test_a_method_may_make_other_inputs_of_the_same_records(
    tmp_path: Path, make_scenario: Callable[..., Path], make_loans: Callable[..., pl.DataFrame]
) -> None:
    text = (
        TOML.replace("epsilons = [2, inf]", "epsilons = [inf]")
        + """
[methods.trees]
like = "reptile"
encoding = { interactions = { trees = 5, depth = 2 } }
"""
    )
    loaded = write(tmp_path, make_scenario, make_loans(lenders=6, rows=130), text)
    world = open_world(loaded.base_path)
    part = parts_of(loaded, list(world.tables))[0]
    plain, wide = (
        judged_sets(world, part, loaded.comparison.evaluation, loaded.scenario(name, math.inf).columns)
        for name in ("reptile", "trees")
    )
    for one, other in zip(plain, wide, strict=True):
        assert one.institution == other.institution
        assert other.x.shape[1] == one.x.shape[1] + 5 * 4
        np.testing.assert_array_equal(one.y, other.y)
    outcome = carry_out(loaded, tmp_path / "out")
    scored = {
        method: [score["auc"] for key, scores in outcome.scores.items() if key.method == method for score in scores]
        for method in ("reptile", "twin", "trees")
    }
    assert scored["reptile"] == scored["twin"] != scored["trees"]


def test_whoever_is_too_small_is_left_out_and_named(
    tmp_path: Path, make_scenario: Callable[..., Path], make_loans: Callable[..., pl.DataFrame]
) -> None:
    text = TOML.replace('["local-logistic", "pooled-logistic"]', '["local-logistic"]').replace(
        '{ kind = "folds", folds = 2 }', '{ kind = "unseen" }'
    )
    loaded = write(tmp_path, make_scenario, make_loans(lenders=6, rows=130), text.replace("[2, inf]", "[inf]"))
    (part,) = parts_of(loaded, list(open_world(loaded.base_path).tables))
    small = part.judged[0]
    frame = make_loans(lenders=6, rows=130)
    few = pl.concat([frame.filter(pl.col("lender") != small), frame.filter(pl.col("lender") == small).head(60)])
    loaded = write(tmp_path, make_scenario, few, text.replace("[2, inf]", "[inf]"))
    outcome = carry_out(loaded, tmp_path / "out")
    assert outcome.left_out == (small,)
    assert {score.institution for scores in outcome.scores.values() for score in scores} == {part.judged[1]}
    table = tabulate(loaded, outcome)
    assert table["rows"][0]["auc"]["ci95"] == [None, None]
    assert small in compare_page.render(table)


def test_a_damaged_file_is_told(loaded: Loaded, done: tuple[Outcome, Table], kept: Path, tmp_path: Path) -> None:
    assert done[0].scores
    for folder, words in (("cells", "with --resume"), ("trained", "it is made again")):
        copy = tmp_path / folder
        shutil.copytree(kept, copy)
        damaged = min((copy / folder).iterdir())
        damaged.write_bytes(damaged.read_bytes()[:60])
        if folder == "trained":
            shutil.rmtree(copy / "cells")
        with pytest.raises(IntegrityError, match=f"{damaged.name}: is damaged; remove it, and .*{words}"):
            carry_out(loaded, copy, workers=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({'reference = "reptile"': 'reference = "maml"'}, "'maml' is none of the methods"),
        ({"rounds = 2 }": "rouds = 2 }"}, "methods.reptile: unknown key 'server.rouds'; did you mean 'rounds'"),
        ({"epsilons = [2, inf]": "epsilons = [2, 2]"}, "epsilons: one of the values stands twice"),
        ({'method = "none"': 'method = "magic"'}, "there is no such adaptation"),
        ({'method = "none"': 'method = "prior"'}, "needs server.learn_prior = true"),
        ({'like = "reptile"\nadaptation': 'like = "twin"\nadaptation'}, "methods.still.like: name another method"),
        ({"epsilons = [inf]": "epsilons = [inf]\nprivacy = { epsilon = 9 }"}, "epsilon is the same for all methods"),
        ({"epsilons = [inf]": "epsilons = [inf]\nat = { 2 = { server = { rounds = 4 } } }"}, "not trained at that"),
        ({"gain_k = 50": "gain_k = 40"}, "gain_k = 40 is none of the numbers"),
        ({'kind = "folds", folds = 2': 'kind = "segments"'}, 'kind = "segments" goes with unseen'),
        ({'kind = "folds", folds = 2': 'kind = "unseen", over = "all"'}, 'over goes with kind = "folds"'),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_key(
    loaded: Loaded, tmp_path: Path, change: Mapping[str, str], message: str
) -> None:
    text = TOML.replace("scenario.toml", str(loaded.base_path))
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "wrong.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as told:
        load_comparison(path)
    assert message in str(told.value)
    assert str(path) in str(told.value)


def test_the_command_writes_table_and_page(
    loaded: Loaded, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    source = loaded.base_path.parent / "compare.toml"
    out = tmp_path / "out"
    code, printed, err = call(app, "compare", source, "--out", out, "--workers", 0, "--json")
    assert (code, err) == (0, "")
    table = json.loads(printed)
    assert table == json.loads((out / "table.json").read_text())
    assert table["not_private"] is True
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert len(lines) == len(table["rows"])
    assert {line["difference"] for line in lines if line["method"] == "twin"} == {"0.0"}
    page = (out / "comparison.html").read_text()
    assert "NOT PRIVATE" in page
    assert page.count("<svg class=") >= 8
    for gain in table["gains"]:
        for lender, value in gain["by_lender"].items():
            assert value >= 0 or f"{lender} (" in page
    assert "<script" not in page
    code, _, err = call(app, "compare", source, "--out", out)
    assert code == 2
    assert "--resume" in err
    code, printed, _ = call(app, "compare", source, "--out", out, "--resume", "--workers", 0)
    assert code == 0
    assert "Labels from which on" in printed
    assert "NOT PRIVATE" in printed

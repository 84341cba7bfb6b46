"""Rounds through real messages: the fixed points that mathematics demands, and the same bits after a crash."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarisk_common.errors import ConfigError, IntegrityError
from server import rounds
from server.checkpoint import load_checkpoint
from server.journal import read_journal
from server.rounds import CHECKPOINT, JOURNAL, play_round, resume_or_start, run_rounds
from server.state import ServerState

INNER_RATE = 0.1


def weights(tasks: list[Any], steps: int) -> list[np.ndarray]:
    one = np.eye(len(tasks[0].c))
    return [one - np.linalg.matrix_power(one - INNER_RATE * task.a, steps) for task in tasks]


def fixed_point(tasks: list[Any], steps: int, sizes: list[int]) -> np.ndarray:
    w = [size * wi for size, wi in zip(sizes, weights(tasks, steps), strict=True)]
    return np.linalg.solve(sum(w), sum(wi @ task.c for wi, task in zip(w, tasks, strict=True)))


def outer_for(tasks: list[Any], steps: int, sizes: list[int], digits: float) -> dict[str, Any]:
    """Heavy-ball momentum at its best rate for the outer loop's curvature (Polyak 1964), and rounds enough."""
    w = sum(size * wi for size, wi in zip(sizes, weights(tasks, steps), strict=True)) / sum(sizes)
    curvature = np.abs(np.linalg.eigvals(w))
    low, high = np.sqrt(curvature.min()), np.sqrt(curvature.max())
    beta = ((high - low) / (high + low)) ** 2
    return {
        "optimizer": "momentum",
        "momentum": float(beta),
        "learning_rate": float((2 / (high + low)) ** 2),
        "rounds": int(np.ceil((digits + 2) * np.log(10) / -np.log(np.sqrt(beta)))) + 10,
    }


def plain(state: ServerState) -> dict[str, Any]:
    arrays = {**state.meta_params, **state.optimizer_state}
    return {
        "round": state.round,
        "sizes": state.declared_sizes,
        **{name: (value.dtype, value.shape, value.tobytes()) for name, value in arrays.items()},
    }


def journal(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "seconds": None} for record in read_journal(folder / JOURNAL)]


# Where the rounds lead.


@pytest.mark.parametrize(("dtype", "digits"), [("float64", 10), ("float32", 5)])
@pytest.mark.parametrize("algorithm", ["reptile", "fedavg"])
@pytest.mark.parametrize("steps", [1, 5, 200])
def test_rounds_end_where_they_must(
    tmp_path: Path, federation: Any, steps: int, algorithm: str, dtype: str, digits: int
) -> None:
    tasks = federation().tasks
    equal = [1] * len(tasks)
    inner = {"local_steps": steps, "algorithm": algorithm}
    fed = federation(inner=inner, outer=outer_for(tasks, steps, equal, digits), dtype=dtype)
    end = run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path)
    assert np.abs(end.meta_params["theta"] - fixed_point(tasks, steps, equal)).max() < 10.0**-digits


def test_rounds_weighted_by_declared_size_end_elsewhere(tmp_path: Path, federation: Any) -> None:
    tasks = federation().tasks
    sizes = [task.size for task in tasks]
    fed = federation(outer={**outer_for(tasks, 5, sizes, 10), "weighting": "declared_size"})
    end = run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path).meta_params["theta"]
    assert np.abs(end - fixed_point(tasks, 5, sizes)).max() < 1e-10
    assert np.abs(end - fixed_point(tasks, 5, [1] * len(tasks))).max() > 1e-2


def test_a_round_of_one_step_is_federated_sgd(tmp_path: Path, federation: Any) -> None:
    fed = federation(inner={"local_steps": 1}, outer={"optimizer": "sgd"})
    after = play_round(fed.start(), fed.plan, fed.grid(), tmp_path).meta_params["theta"]
    step = np.mean([task.a @ (np.zeros(len(task.c)) - task.c) for task in fed.tasks], axis=0)
    assert np.abs(after + INNER_RATE * step).max() < 1e-15


def test_the_journal_tells_every_round(tmp_path: Path, federation: Any) -> None:
    fed = federation(outer={"schedule": "linear", "optimizer": "sgd"})
    end = run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path)
    records = read_journal(tmp_path / JOURNAL)
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert [record["server_learning_rate"] for record in records] == [1.0, 0.75, 0.5, 0.25]
    assert len({record["order_digest"] for record in records}) == 4
    for record in records:
        assert record["admitted"] == [f"Bank {number}" for number in range(8)]
        assert (record["run_id"], record["cohort"], record["quorum"]) == ("run-1", 8, True)
        assert (record["refused"], record["rejected"], record["absent"]) == ({}, {}, [])
        assert 0 < record["aggregate_norm"] <= record["mean_update_norm"]
        assert record["seconds"] >= 0
    assert end.declared_sizes == {f"Bank {number}": 10 * (number + 1) for number in range(8)}
    found = load_checkpoint(tmp_path / CHECKPOINT)
    assert found is not None
    assert plain(found[0]) == plain(end)


# What interrupts them.


def undisturbed(fed: Any, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    end = run_rounds(fed.start(), fed.plan, fed.grid(), folder)
    return plain(end), journal(folder)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("pulls", [0, 13, 24])
def test_after_a_crash_in_a_round_the_run_is_the_same_to_the_bit(
    tmp_path: Path, federation: Any, optimizer: str, pulls: int
) -> None:
    fed = federation(outer={"optimizer": optimizer, "schedule": "cosine"})
    grid = fed.grid()
    grid.pulls_before_crash = pulls
    with pytest.raises(ConnectionError):
        run_rounds(resume_or_start(tmp_path / "a", fed.start()), fed.plan, grid, tmp_path / "a")
    again = resume_or_start(tmp_path / "a", fed.start())
    assert again.round == pulls // 8
    end = run_rounds(again, fed.plan, fed.grid(), tmp_path / "a")
    assert (plain(end), journal(tmp_path / "a")) == undisturbed(fed, tmp_path / "b")


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("torn", [b"", b'{"admitted": ["Ban'])
def test_after_a_crash_between_checkpoint_and_journal_nothing_is_missing(
    tmp_path: Path, federation: Any, monkeypatch: pytest.MonkeyPatch, optimizer: str, torn: bytes
) -> None:
    fed = federation(outer={"optimizer": optimizer})
    state = play_round(fed.start(), fed.plan, fed.grid(), tmp_path / "a")

    def crash(path: Path, _: object) -> None:
        with path.open("ab") as stream:
            stream.write(torn)
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "append_record", crash)
        with pytest.raises(ConnectionError):
            run_rounds(state, fed.plan, fed.grid(), tmp_path / "a")
    again = resume_or_start(tmp_path / "a", fed.start())
    assert again.round == 2
    end = run_rounds(again, fed.plan, fed.grid(), tmp_path / "a")
    assert (plain(end), journal(tmp_path / "a")) == undisturbed(fed, tmp_path / "b")


def test_a_finished_run_is_finished(tmp_path: Path, federation: Any) -> None:
    fed = federation()
    end, records = undisturbed(fed, tmp_path)
    again = run_rounds(resume_or_start(tmp_path, fed.start()), fed.plan, fed.grid([]), tmp_path)
    assert (plain(again), journal(tmp_path)) == (end, records)


def test_the_order_of_replies_does_not_matter_to_the_bit(tmp_path: Path, federation: Any) -> None:
    fed = federation(outer={"weighting": "declared_size", "rounds": 2})
    grid = fed.grid()
    grid.slow = {"Bank 0", "Bank 3", "Bank 4"}
    end = run_rounds(fed.start(), fed.plan, grid, tmp_path / "a")
    expected, records = undisturbed(fed, tmp_path / "b")
    assert plain(end) == expected
    norms = [record.pop("mean_update_norm") for entries in (journal(tmp_path / "a"), records) for record in entries]
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-12)


def test_without_a_checkpoint_a_run_starts(tmp_path: Path, federation: Any) -> None:
    start = federation().start()
    assert resume_or_start(tmp_path, start) is start


def test_another_plans_checkpoint_is_refused(tmp_path: Path, federation: Any) -> None:
    fed, other = federation(), federation(outer={"learning_rate": 0.5})
    play_round(fed.start(), fed.plan, fed.grid(), tmp_path)
    with pytest.raises(IntegrityError, match="another plan"):
        resume_or_start(tmp_path, other.start())
    with pytest.raises(IntegrityError, match="another plan or run"):
        resume_or_start(tmp_path, fed.start("run-2"))


def test_a_damaged_checkpoint_does_not_start_the_run_anew(tmp_path: Path, federation: Any) -> None:
    fed = federation()
    play_round(fed.start(), fed.plan, fed.grid(), tmp_path)
    path = tmp_path / CHECKPOINT / "checkpoint.json"
    path.write_text(json.dumps({"manifest": {}}), encoding="utf-8")
    with pytest.raises(IntegrityError):
        resume_or_start(tmp_path, fed.start())


def test_with_nobody_online_there_is_no_round(tmp_path: Path, federation: Any) -> None:
    fed = federation()
    with pytest.raises(ConfigError, match="no bank is online"):
        run_rounds(fed.start(), fed.plan, fed.grid([]), tmp_path)
    assert list(tmp_path.iterdir()) == []

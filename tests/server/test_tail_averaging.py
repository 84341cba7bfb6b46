"""The mean over the last rounds, and what else is summed over them: right, in the checkpoint, whole after a crash."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarisk_common.plan import OuterLoop, Plan
from server import prior_sums
from server.averaging import TailState, add_round, averaged, tail_rounds
from server.checkpoint import load_checkpoint
from server.journal import read_journal
from server.noise import mean_noise_variance
from server.rounds import CHECKPOINT, JOURNAL, play_round, resume_or_start, run_rounds
from server.state import ServerState, end_round
from server.strategy import configure_evaluate, configure_train

# As wide as the federation's five parameters: a scale, three bins and the intercept.
DATA: dict[str, Any] = {
    "label": {"name": "default"},
    "institution": "bank",
    "columns": [{"kind": "numeric", "name": "amount", "lower": 0, "upper": 1, "bins": [0.2, 0.6], "missing": "refuse"}],
}
MECHANISM = {"noise_multiplier": 2.0, "max_grad_norm": 1.0}
ALL_OF_IT: dict[str, Any] = {
    "rounds": 9, "optimizer": "adam", "subtract_noise": True, "schedule": "cosine", "warmup_rounds": 2,
    "tail_averaging": 0.5, "learn_prior": True, "learning_rate": 0.1, "weighting": "declared_size",
}  # fmt: skip


def outer(**values: Any) -> OuterLoop:
    return OuterLoop.model_validate(values)


@pytest.mark.parametrize(
    ("share", "rounds", "expected"), [(0, 20, 0), (0.25, 20, 5), (0.29, 100, 29), (0.01, 20, 1), (0.3, 9, 3), (1, 7, 7)]
)
def test_the_share_is_rounded_up_as_people_write_it(share: float, rounds: int, expected: int) -> None:
    assert tail_rounds(outer(tail_averaging=share, rounds=rounds)) == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_average_is_the_mean_of_the_last_rounds(share: float) -> None:
    chosen = outer(tail_averaging=share, rounds=10)
    iterates = np.random.default_rng(1).normal(size=(10, 2, 3))
    tail: TailState = {}
    for number, value in enumerate(iterates, 1):
        tail = add_round(tail, chosen, number, {"a": value})
    kept = iterates[-tail_rounds(chosen) :] if share else iterates[-1:]
    np.testing.assert_allclose(averaged(tail, {"a": iterates[-1]})["a"], kept.mean(axis=0), rtol=1e-14)
    assert bool(tail) == (share > 0)


def iterates_of(fed: Any, folder: Path) -> list[np.ndarray]:
    state, found = fed.start(), []
    while state.round < fed.plan.outer.rounds:
        state = play_round(state, fed.plan, fed.grid(), folder)
        found.append(state.meta_params["theta"])
    return found


def test_the_run_goes_on_from_the_newest_and_ends_with_the_mean(tmp_path: Path, federation: Any) -> None:
    plain = iterates_of(federation(outer={"rounds": 8}), tmp_path / "plain")
    fed = federation(outer={"rounds": 8, "tail_averaging": 0.4})
    tailed = iterates_of(fed, tmp_path / "tailed")
    for number in range(7):
        assert tailed[number].tobytes() == plain[number].tobytes()
    np.testing.assert_allclose(tailed[-1], np.mean(plain[4:], axis=0), rtol=1e-14)
    assert np.abs(tailed[-1] - plain[-1]).max() > 1e-3
    found = load_checkpoint(tmp_path / "tailed" / CHECKPOINT)
    assert found is not None
    end, record = found
    assert end.meta_params["theta"].tobytes() == tailed[-1].tobytes()
    # What is exported, what a next order would carry and what histograms judge: one and the same.
    for order in (configure_train(end, fed.plan), configure_evaluate(end, fed.plan)):
        assert order.meta_params["theta"].tobytes() == tailed[-1].tobytes()
    assert record is not None
    assert record["averaged_rounds"] == 4
    assert ["averaged_rounds" in one for one in read_journal(tmp_path / "tailed" / JOURNAL)] == [False] * 7 + [True]


def test_a_round_below_the_quorum_counts_with_what_it_kept(federation: Any) -> None:
    plan = federation(outer={"rounds": 4, "tail_averaging": 1.0, "optimizer": "sgd"}).plan
    state = federation().start()
    for number in range(1, 5):
        update = None if number == 2 else {"theta": np.full(5, 4.0)}
        state = end_round(state, plan, number, update, [10])
    assert state.round == 4
    assert state.meta_params["theta"].tolist() == [(4 + 4 + 8 + 12) / 4] * 5


def test_the_optimizer_is_told_the_rounds_own_noise(federation: Any) -> None:
    """By the sizes of the banks that were admitted in it, and only if the plan asks."""
    for subtract in (True, False):
        fed = federation(mechanism=MECHANISM, outer={"optimizer": "adam", "subtract_noise": subtract})
        update = {"theta": np.full(5, 2.0)}
        after = end_round(fed.start(), fed.plan, 1, update, [10, 30]).optimizer_state
        known = mean_noise_variance(fed.plan, [10, 30]) if subtract else 0.0
        np.testing.assert_allclose(after["second/theta"], 0.01 * (4 - known))
        assert known > 1e-4 or not subtract


# The checkpoint.


def whole(state: ServerState) -> dict[str, Any]:
    parts = {"meta": state.meta_params, "optimizer": state.optimizer_state, "tail": state.tail, "prior": state.prior}
    arrays = {(part, name): value for part, values in parts.items() for name, value in values.items()}
    return {str(key): (value.dtype, value.shape, value.tobytes()) for key, value in arrays.items()}


def journal(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "seconds": None} for record in read_journal(folder / JOURNAL)]


def test_stopped_after_every_round_it_ends_with_the_same_bits(tmp_path: Path, federation: Any) -> None:
    fed = federation(data=DATA, mechanism=MECHANISM, outer=ALL_OF_IT)
    undisturbed = run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path / "a")
    for stops in range(1, 10):
        state = resume_or_start(tmp_path / "b", fed.start())
        assert state.round == stops - 1
        state = play_round(state, fed.plan, fed.grid(), tmp_path / "b")
        back = load_checkpoint(tmp_path / "b" / CHECKPOINT)
        assert back is not None
        assert whole(back[0]) == whole(state)
    assert whole(state) == whole(undisturbed)
    assert {key.split("'")[1] for key in whole(state)} == {"meta", "optimizer", "tail", "prior"}
    assert int(state.tail["rounds"]) == 5
    assert journal(tmp_path / "a") == journal(tmp_path / "b")


def test_killed_in_the_middle_of_a_tail_round_it_ends_with_the_same_bits(tmp_path: Path, federation: Any) -> None:
    fed = federation(data=DATA, mechanism=MECHANISM, outer=ALL_OF_IT)
    grid = fed.grid()
    grid.pulls_before_crash = 7 * 8 + 3  # In the eighth round, after three of eight replies.
    with pytest.raises(ConnectionError):
        run_rounds(fed.start(), fed.plan, grid, tmp_path / "a")
    again = resume_or_start(tmp_path / "a", fed.start())
    assert (again.round, bool(again.tail), bool(again.prior)) == (7, True, True)
    end = run_rounds(again, fed.plan, fed.grid(), tmp_path / "a")
    assert whole(end) == whole(run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path / "b"))
    assert journal(tmp_path / "a") == journal(tmp_path / "b")


# The sums that the learned prior is made of.


def prior_plan(federation: Any, **values: Any) -> Plan:
    found: Plan = federation(data=DATA, outer={"rounds": 9, "learn_prior": True, **values}).plan
    return found


def test_the_last_quarter_is_summed_for_each_institution_by_itself(federation: Any) -> None:
    plan = prior_plan(federation)
    assert prior_sums.last_rounds(plan) == 3
    sums = prior_sums.init()
    for number in range(1, 10):
        sums = prior_sums.add(sums, plan, number, "Bank/rounds", {"w": np.full((1, 2), number, np.float32)})
        if number != 8:
            sums = prior_sums.add(sums, plan, number, "Kölner Bänk\n", {"w": np.full((1, 2), -number, np.float32)})
    first, second = b"Bank/rounds".hex(), "Kölner Bänk\n".encode().hex()
    assert sums.keys() == {f"{name}/{part}" for name in (first, second) for part in ("rounds", "sum/w")}
    assert [int(sums[f"{name}/rounds"]) for name in (first, second)] == [3, 2]
    assert sums[f"{first}/sum/w"].tolist() == [[24.0, 24.0]]
    assert sums[f"{second}/sum/w"].tolist() == [[-16.0, -16.0]]
    assert sums[f"{first}/sum/w"].dtype == np.float64


def test_nothing_is_kept_where_the_plan_does_not_ask(tmp_path: Path, federation: Any) -> None:
    plan = prior_plan(federation, learn_prior=False)
    assert prior_sums.add({}, plan, 9, "bank", {"w": np.ones(2)}) == {}
    fed = federation()
    assert run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path).prior == {}
    assert not any("learned_prior" in record for record in read_journal(tmp_path / JOURNAL))


def test_two_institutions_tell_nothing_of_a_spread(tmp_path: Path, federation: Any) -> None:
    fed = federation(data=DATA, outer={"learn_prior": True})
    run_rounds(fed.start(), fed.plan, fed.grid(range(2)), tmp_path)
    assert read_journal(tmp_path / JOURNAL)[-1]["learned_prior"] is None


def test_the_last_record_and_no_other_has_the_prior(tmp_path: Path, federation: Any) -> None:
    fed = federation(data=DATA, outer={"learn_prior": True})
    run_rounds(fed.start(), fed.plan, fed.grid(), tmp_path)
    records = read_journal(tmp_path / JOURNAL)
    assert ["learned_prior" in record for record in records] == [False, False, False, True]
    told = records[-1]["learned_prior"]
    assert told["groups"] == ["amount", "intercept"]
    assert (told["rounds"], told["institutions"]) == (1, 8)

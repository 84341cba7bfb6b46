"""The ledger: what is charged, what may be tried again, and what opening it demands."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.ledger import Budget, Ledger, OrderKey
from metarisk_common.errors import BudgetExhaustedError, ConfigError, IntegrityError, RefusedError
from metarisk_common.privacy import PrivacyEvent, epsilon

BUDGET = Budget(epsilon=3.0, delta=1e-5)
EVENT = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)


def key(number: int, run: str = "run", digest: str = "digest") -> OrderKey:
    return OrderKey(run_id=run, round=number, plan_hash="plan", order_digest=digest)


def open_ledger(path: Path, budget: Budget = BUDGET, source: str = "loans", now: float | None = None) -> Ledger:
    """A ledger under which "plan" is approved, which its second entry says."""
    ledger = Ledger.open(path, source=source, budget=budget, now=now)
    ledger.approve("plan", now=now)
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with open_ledger(path) as opened:
        yield opened


# Charging.


def test_what_is_reserved_is_spent_and_stays_spent(path: Path) -> None:
    with open_ledger(path) as ledger:
        assert ledger.spent() == 0
        first = ledger.reserve(key(1), EVENT)
        ledger.release(first, b"report")
        ledger.abandon(ledger.reserve(key(2), EVENT))
        ledger.reserve(key(3), EVENT)
        assert ledger.spent() == epsilon([EVENT] * 3, BUDGET.delta)
    with open_ledger(path) as ledger:
        assert ledger.spent() == epsilon([EVENT] * 3, BUDGET.delta)
        assert ledger.events() == [EVENT] * 3


def test_segments_are_charged_in_parallel(ledger: Ledger) -> None:
    for number, segment in enumerate(["a", "b", "a"]):
        ledger.reserve(key(number), PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5, segment))
    assert ledger.spent() == epsilon([EVENT] * 2, BUDGET.delta)


def test_the_budget_is_never_passed_and_refuses_for_ever(path: Path) -> None:
    accepted = 0
    with open_ledger(path) as ledger:
        while epsilon([EVENT] * (accepted + 1), BUDGET.delta) <= BUDGET.epsilon:
            ledger.reserve(key(accepted), EVENT)
            accepted += 1
        with pytest.raises(BudgetExhaustedError, match=r"budget of epsilon 3 .* is spent"):
            ledger.reserve(key(accepted), EVENT)
        count = ledger.counter
        assert ledger.spent() == epsilon([EVENT] * accepted, BUDGET.delta)
    for _ in range(3):
        with open_ledger(path) as ledger:
            with pytest.raises(BudgetExhaustedError) as refusal:
                ledger.reserve(key(accepted, run="another consortium"), EVENT)
            assert (refusal.value.code, refusal.value.exit_code) == ("budget", 4)
            assert ledger.counter == count


def test_an_event_without_noise_needs_an_unlimited_budget(tmp_path: Path) -> None:
    bare = PrivacyEvent("poisson_gaussian", 0.0, 1.0, 1)
    with open_ledger(tmp_path / "finite") as ledger, pytest.raises(BudgetExhaustedError):
        ledger.reserve(key(1), bare)
    with open_ledger(tmp_path / "unlimited", Budget(math.inf, 1e-5)) as ledger:
        ledger.reserve(key(1), bare)
        assert ledger.spent() == math.inf
    with Ledger.read(tmp_path / "unlimited") as ledger:
        assert ledger.budget == Budget(math.inf, 1e-5)


# Retrying.


def test_a_reserved_order_may_be_tried_again_at_no_cost(path: Path) -> None:
    with open_ledger(path) as ledger:
        first = ledger.reserve(key(1), EVENT)
        assert ledger.reserve(key(1), EVENT) == first
    with open_ledger(path) as ledger:
        assert ledger.reserve(key(1), EVENT) == first
        assert ledger.events() == [EVENT]
        assert first.receipt == ledger.head


def test_a_reservation_has_one_output(ledger: Ledger) -> None:
    reservation = ledger.reserve(key(1), EVENT)
    receipt = ledger.release(reservation, b"the report")
    assert receipt == ledger.head
    with pytest.raises(RefusedError) as refusal:
        ledger.release(reservation, b"another report")
    assert refusal.value.code == "replayed"
    with pytest.raises(RefusedError) as refusal:
        ledger.reserve(key(1), EVENT)
    assert refusal.value.code == "replayed"
    with pytest.raises(RefusedError):
        ledger.abandon(reservation)
    assert ledger.released_report(key(1)) == b"the report"
    assert ledger.head == receipt


def test_two_processes_with_the_same_reservation_send_one_report(path: Path) -> None:
    with open_ledger(path) as one, open_ledger(path) as other:
        mine, theirs = one.reserve(key(1), EVENT), other.reserve(key(1), EVENT)
        assert mine == theirs
        one.release(mine, b"one")
        with pytest.raises(RefusedError):
            other.release(theirs, b"other")
        assert other.released_report(key(1)) == b"one"


def test_an_abandoned_round_stays_closed(ledger: Ledger) -> None:
    reservation = ledger.reserve(key(1), EVENT)
    ledger.abandon(reservation)
    with pytest.raises(RefusedError, match="abandoned"):
        ledger.reserve(key(1), EVENT)
    with pytest.raises(RefusedError, match="abandoned"):
        ledger.release(reservation, b"late")
    assert ledger.released_report(key(1)) is None
    assert ledger.spent() == epsilon([EVENT], BUDGET.delta)


def test_another_order_under_the_same_round_is_a_conflict(ledger: Ledger) -> None:
    reservation = ledger.reserve(key(1), EVENT)
    other_event = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 6)
    for other, event in [(key(1, digest="other"), EVENT), (key(1), other_event)]:
        with pytest.raises(RefusedError) as refusal:
            ledger.reserve(other, event)
        assert refusal.value.code == "conflict"
    ledger.release(reservation, b"report")
    assert ledger.released_report(key(1, digest="other")) is None
    assert ledger.counter == 4


def test_a_reservation_of_another_ledger_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with open_ledger(tmp_path / "other") as other:
        foreign = other.reserve(key(1), EVENT)
    ledger.reserve(key(1), EVENT)
    with pytest.raises(RefusedError) as refusal:
        ledger.release(foreign, b"report")
    assert refusal.value.code == "conflict"


def test_a_round_has_one_turn_for_training_and_one_for_evaluation(ledger: Ledger, path: Path) -> None:
    train, evaluate = key(1), replace(key(1), kind="evaluate")
    for turn, report in ((train, b"update"), (evaluate, b"histograms")):
        ledger.release(ledger.reserve(turn, EVENT), report)
    assert ledger.spent() == epsilon([EVENT] * 2, BUDGET.delta)
    with open_ledger(path) as again:
        assert [again.released_report(turn) for turn in (train, evaluate)] == [b"update", b"histograms"]
        for turn in (train, evaluate):
            with pytest.raises(RefusedError) as refusal:
                again.reserve(turn, EVENT)
            assert refusal.value.code == "replayed"
    with pytest.raises(ValueError, match="kind"):
        replace(key(1), kind="guess")


def test_the_outbox_keeps_the_newest_report_of_each_run(ledger: Ledger) -> None:
    for run in ("a", "b"):
        for number in (1, 2):
            ledger.release(ledger.reserve(key(number, run), EVENT), f"{run}{number}".encode())
    assert [ledger.released_report(key(2, run)) for run in ("a", "b")] == [b"a2", b"b2"]
    assert ledger.released_report(key(1, "a")) is None
    assert ledger.released_report(key(9, "a")) is None


# Opening.


def test_a_new_ledger_is_the_banks_alone(ledger: Ledger, path: Path) -> None:
    ledger.reserve(key(1), EVENT)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    names = {path.name, f"{path.name}-wal", f"{path.name}-shm", "ledger.key", "ledger.head"}
    assert {file.name for file in path.parent.iterdir()} == names
    assert (ledger.source, ledger.budget, ledger.counter) == ("loans", BUDGET, 3)


def test_source_and_delta_are_fixed_at_creation(path: Path) -> None:
    open_ledger(path).close()
    with pytest.raises(ConfigError, match="ledger of 'loans', not of 'cards'"):
        open_ledger(path, source="cards")
    with pytest.raises(ConfigError, match="delta 1e-05, which stays"):
        open_ledger(path, Budget(3.0, 1e-6))
    with Ledger.read(path) as ledger:
        assert ledger.counter == 2


def test_more_epsilon_is_a_recorded_change_of_policy(path: Path) -> None:
    open_ledger(path).close()
    more = Budget(5.0, 1e-5)
    with pytest.raises(ConfigError, match="change of policy"):
        open_ledger(path, more)
    with Ledger.open(path, source="loans", budget=more, allow_increase=True) as ledger:
        assert ledger.budget == more
        assert [entry.kind for entry in ledger.entries()] == ["create", "approve", "budget"]
    with open_ledger(path, more) as ledger:
        assert ledger.counter == 3


def test_less_epsilon_binds_at_once(path: Path) -> None:
    with open_ledger(path) as ledger:
        ledger.reserve(key(1), EVENT)
    with open_ledger(path, Budget(0.1, 1e-5)) as ledger, pytest.raises(BudgetExhaustedError):
        ledger.reserve(key(2), EVENT)
    with pytest.raises(ConfigError):
        open_ledger(path)


def test_reading_changes_nothing(path: Path) -> None:
    with open_ledger(path) as ledger:
        reservation = ledger.reserve(key(1), EVENT)
    before = path.read_bytes()
    with Ledger.read(path) as reader:
        assert [entry.kind for entry in reader.entries()] == ["create", "approve", "reserve"]
        reader.verify()
        for attempt in (lambda: reader.reserve(key(2), EVENT), lambda: reader.abandon(reservation)):
            with pytest.raises(ValueError, match="opened for reading"):
                attempt()
    assert path.read_bytes() == before


def test_entries_carry_the_time_they_were_given(path: Path) -> None:
    with open_ledger(path, now=12.0) as ledger:
        reservation = ledger.reserve(key(1), EVENT, now=12.5)
        ledger.release(reservation, b"report", now=13.5)
        assert [entry.time_seconds for entry in ledger.entries()] == [12.0, 12.0, 12.5, 13.5]


def test_a_receipt_does_not_betray_the_time(path: Path, tmp_path: Path) -> None:
    receipts = []
    open_ledger(path, now=1.0).close()
    for name in ("a", "b"):
        for file in list(tmp_path.glob("ledger.*")):
            shutil.copy(file, tmp_path / f"{name}{file.suffix}")
        with open_ledger(tmp_path / f"{name}.sqlite", now=1.0) as ledger:
            receipts.append(ledger.reserve(key(1), EVENT, now=1.0).receipt)
    assert receipts[0] != receipts[1]


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be read as one" * 20])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for attempt in (open_ledger, Ledger.read):
        with pytest.raises(IntegrityError, match=rf"{path}: is not a ledger"):
            attempt(path)
    assert path.read_bytes() == content


def test_a_missing_ledger_or_folder_is_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="there is no ledger"):
        Ledger.read(path)
    with pytest.raises(ConfigError, match="cannot be created here"):
        open_ledger(tmp_path / "missing" / "ledger")


def test_a_ledger_whose_file_was_deleted_while_its_log_remains_is_not_started_afresh(path: Path) -> None:
    with open_ledger(path) as ledger:
        ledger.reserve(key(1), EVENT)
        path.unlink()
        with pytest.raises(IntegrityError, match="write-ahead log"):
            open_ledger(path)


# The server's echo.


def test_what_servers_heard_of_this_ledger_is_found_in_it(path: Path) -> None:
    with open_ledger(path) as ledger:
        ledger.check_echo(0, "")
        heard = {ledger.reserve(key(number), EVENT).seq: ledger.head for number in range(3)}
        # An older echo is that of a run, or of an order, which came earlier: no alarm.
        for counter, receipt in [*heard.items(), *reversed(heard.items())]:
            ledger.check_echo(counter, receipt)
        with open_ledger(path) as other:
            fresh = other.reserve(key(9), EVENT)
        ledger.check_echo(fresh.seq, fresh.receipt)
    with Ledger.read(path) as reader:
        reader.check_echo(fresh.seq, fresh.receipt)


def test_an_echo_that_never_was_is_refused(ledger: Ledger, path: Path) -> None:
    for counter, receipt in ((1, ""), (0, "0" * 64), (-1, ""), (-1, ledger.head), (0, ledger.head), (9, ledger.head)):
        with pytest.raises(IntegrityError, match=rf"{path}: .* restore the newest copy"):
            ledger.check_echo(counter, receipt)


def test_an_older_copy_of_the_whole_folder_is_told_by_the_echo(path: Path, tmp_path: Path) -> None:
    with open_ledger(path) as ledger:
        first = ledger.reserve(key(1), EVENT).receipt
    older = shutil.copytree(path.parent, tmp_path / "older") / path.name
    with open_ledger(path) as ledger:
        counter = ledger.reserve(key(2), EVENT).seq
        receipt = ledger.head
    # Its head and key are of the same age, so nothing in it tells.
    with open_ledger(older) as clone:
        clone.check_echo(2, first)
        with pytest.raises(IntegrityError, match=rf"{older}: is older than .* entry 3; restore the newest copy"):
            clone.check_echo(counter, receipt)
        # Nor does it help to write on, up to the number that is known and past it.
        for number in (2, 3):
            clone.release(clone.reserve(key(number), EVENT), b"report")
        with pytest.raises(IntegrityError, match=rf"{older}: went another way .* entry 3; restore the newest copy"):
            clone.check_echo(counter, receipt)

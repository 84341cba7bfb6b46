"""Approvals in the ledger: which plans may be answered, until when and up to what epsilon, and the clock they go by."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import Approval, Budget, Ledger, OrderKey
from metarisk_common.errors import BudgetExhaustedError, ConfigError, IntegrityError, RefusedError
from metarisk_common.privacy import PrivacyEvent, epsilon

BUDGET = Budget(epsilon=3.0, delta=1e-5)
EVENT = PrivacyEvent("poisson_gaussian", 50.0, 1.0, 5)
ONE, TWO = (epsilon([EVENT] * count, BUDGET.delta) for count in (1, 2))
START = 1_000_000.0


def key(number: int, plan: str = "plan") -> OrderKey:
    return OrderKey(run_id="run", round=number, plan_hash=plan, order_digest="digest")


def open_ledger(path: Path, budget: Budget = BUDGET, now: float = START) -> Ledger:
    return Ledger.open(path, source="loans", budget=budget, now=now)


def refused(ledger: Ledger, order: OrderKey, now: float = START) -> str:
    """The code of a refusal, which has written nothing."""
    before = ledger.head
    with pytest.raises(RefusedError) as refusal:
        ledger.reserve(order, EVENT, now=now)
    assert ledger.head == before
    return refusal.value.code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with open_ledger(path) as opened:
        yield opened


# Who is approved.


def test_only_an_approved_plan_is_reserved_for(ledger: Ledger) -> None:
    assert refused(ledger, key(1)) == "plan"
    ledger.approve("other", now=START)
    assert refused(ledger, key(1)) == "plan"
    ledger.approve("plan", now=START)
    ledger.reserve(key(1), EVENT, now=START)
    assert ledger.events() == [EVENT]


def test_an_approval_outlives_the_process_and_is_seen_by_every_other(path: Path) -> None:
    with open_ledger(path) as one, open_ledger(path) as other:
        approval = one.approve("plan", epsilon=2.0, until_seconds=START + 10, now=START)
        assert approval == Approval("plan", 2.0, START + 10, seq=1)
        other.reserve(key(1), EVENT, now=START)
        other.revoke("plan", now=START)
        assert refused(one, key(2)) == "plan"
        assert one.approvals() == {}
    with Ledger.read(path) as reader:
        assert reader.approvals() == {}
        assert [entry.kind for entry in reader.entries()] == ["create", "approve", "reserve", "revoke"]
        with pytest.raises(ValueError, match="opened for reading"):
            reader.approve("plan")


def test_the_latest_terms_count_and_the_same_terms_write_nothing(ledger: Ledger) -> None:
    first = ledger.approve("plan", epsilon=1.0, now=START)
    assert ledger.approve("plan", epsilon=1.0, now=START + 1) == first
    assert ledger.counter == 2
    latest = ledger.approve("plan", until_seconds=START + 5, now=START + 1)
    assert ledger.approvals() == {"plan": latest}
    assert (latest.epsilon, latest.until_seconds, latest.seq) == (None, START + 5, 2)
    ledger.revoke("plan", now=START + 1)
    again = ledger.approve("plan", until_seconds=START + 5, now=START + 1)
    assert ledger.approvals() == {"plan": again}
    assert again.seq == 4


def test_a_reservation_cannot_be_used_once_its_plan_is_revoked(ledger: Ledger) -> None:
    ledger.approve("plan", now=START)
    reservation = ledger.reserve(key(1), EVENT, now=START)
    ledger.revoke("plan", now=START)
    assert refused(ledger, key(1)) == "plan"
    with pytest.raises(RefusedError) as refusal:
        ledger.release(reservation, b"report", now=START)
    assert refusal.value.code == "plan"
    assert ledger.released_report(key(1)) is None
    assert ledger.spent() == ONE
    ledger.approve("plan", now=START)
    assert ledger.reserve(key(1), EVENT, now=START) == reservation


def test_there_is_nothing_to_revoke_where_nothing_was_approved(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="plan 'plan' is not approved"):
        ledger.revoke("plan", now=START)
    ledger.approve("plan", now=START)
    ledger.revoke("plan", now=START)
    with pytest.raises(ConfigError, match="plan 'plan' is not approved"):
        ledger.revoke("plan", now=START)
    assert ledger.counter == 3


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_terms_that_mean_nothing_are_refused(ledger: Ledger, cap: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        ledger.approve("plan", epsilon=cap)
    with pytest.raises(ValueError, match="until_seconds"):
        ledger.approve("plan", until_seconds=math.inf)
    with pytest.raises(ValueError, match="plan_hash"):
        ledger.approve("")
    assert ledger.counter == 1


# What a plan may spend.


def test_a_plan_stops_at_its_own_cap_and_others_go_on(ledger: Ledger) -> None:
    ledger.approve("plan", epsilon=TWO, now=START)
    ledger.approve("other", now=START)
    for number in range(2):
        ledger.reserve(key(number), EVENT, now=START)
    with pytest.raises(BudgetExhaustedError, match=r"its plan's own cap of epsilon .* approving the plan anew"):
        ledger.reserve(key(2), EVENT, now=START)
    assert refused(ledger, key(2)) == "budget"
    ledger.reserve(key(3, "other"), EVENT, now=START)
    assert (ledger.spent("plan"), ledger.spent("other"), ledger.spent("unknown")) == (TWO, ONE, 0.0)
    assert ledger.spent() == epsilon([EVENT] * 3, BUDGET.delta)
    # What was reserved within the cap may still be used, and a new approval may raise it.
    ledger.reserve(key(1), EVENT, now=START)
    ledger.approve("plan", epsilon=2.5, now=START)
    ledger.reserve(key(2), EVENT, now=START)


def test_a_cap_never_raises_the_budget(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger", Budget(TWO, BUDGET.delta)) as ledger:
        ledger.approve("plan", epsilon=100.0, now=START)
        for number in range(2):
            ledger.reserve(key(number), EVENT, now=START)
        with pytest.raises(BudgetExhaustedError, match="the budget of epsilon"):
            ledger.reserve(key(2), EVENT, now=START)
        assert ledger.budget.epsilon == TWO


def test_approving_again_does_not_forget_what_was_spent(ledger: Ledger) -> None:
    ledger.approve("plan", epsilon=ONE, now=START)
    ledger.reserve(key(1), EVENT, now=START)
    ledger.revoke("plan", now=START)
    ledger.approve("plan", epsilon=ONE, now=START)
    assert refused(ledger, key(2)) == "budget"


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30), st.sampled_from(["", "s"])), max_size=8))
def test_neither_cap_nor_budget_is_ever_passed(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, int, str]]
) -> None:
    caps = {"a": 0.6, "b": 0.9}
    with open_ledger(tmp_path_factory.mktemp("caps") / "ledger", Budget(1.2, 1e-5)) as ledger:
        for plan, cap in caps.items():
            ledger.approve(plan, epsilon=cap, now=START)
        charged: list[tuple[str, PrivacyEvent]] = []
        for number, (plan, steps, segment) in enumerate(asked):
            event = PrivacyEvent("poisson_gaussian", 50.0, 1.0, steps, segment)
            of_plan = [known for name, known in charged if name == plan]
            affordable = (
                epsilon([*of_plan, event], 1e-5) <= caps[plan]
                and epsilon([*(known for _, known in charged), event], 1e-5) <= 1.2
            )
            if affordable:
                ledger.reserve(key(number, plan), event, now=START)
                charged.append((plan, event))
            else:
                with pytest.raises(BudgetExhaustedError):
                    ledger.reserve(key(number, plan), event, now=START)
        assert all(ledger.spent(plan) <= cap for plan, cap in caps.items())
        assert ledger.events() == [event for _, event in charged]


# Until when.


def test_an_approval_ends_at_its_time(ledger: Ledger) -> None:
    ledger.approve("plan", until_seconds=START + 100, now=START)
    ledger.reserve(key(1), EVENT, now=START + 99.9)
    assert refused(ledger, key(1), now=START + 100) == "plan"
    assert refused(ledger, key(2), now=START + 100) == "plan"
    assert ledger.approvals()["plan"].is_expired(START + 100)
    ledger.approve("plan", until_seconds=START + 200, now=START + 150)
    ledger.reserve(key(2), EVENT, now=START + 199)


def test_nothing_is_released_after_the_end(ledger: Ledger) -> None:
    ledger.approve("plan", until_seconds=START + 100, now=START)
    reservation = ledger.reserve(key(1), EVENT, now=START + 99)
    with pytest.raises(RefusedError) as refusal:
        ledger.release(reservation, b"report", now=START + 101)
    assert refusal.value.code == "plan"
    ledger.abandon(reservation, now=START + 102)


def test_what_has_ended_stays_so_when_the_clock_goes_back_a_little(ledger: Ledger) -> None:
    ledger.approve("plan", until_seconds=START + 100, now=START)
    ledger.approve("other", now=START + 150)
    assert refused(ledger, key(1), now=START + 50) == "plan"


def test_a_clock_set_back_stops_every_writing(path: Path) -> None:
    with open_ledger(path) as ledger:
        ledger.approve("plan", until_seconds=START + 1e6, now=START)
        reservation = ledger.reserve(key(1), EVENT, now=START + 5000)
        ledger.reserve(key(2), EVENT, now=START + 4700)  # within the 300 seconds that clocks are set right by
        before = ledger.entries()
        for late in (START + 4699, START + 4400, 0.0):  # measured from the latest time, so no small steps lead back
            for attempt in (
                lambda now: ledger.reserve(key(1), EVENT, now=now),
                lambda now: ledger.reserve(key(3), EVENT, now=now),
                lambda now: ledger.release(reservation, b"report", now=now),
                lambda now: ledger.abandon(reservation, now=now),
                lambda now: ledger.approve("more", now=now),
                lambda now: ledger.revoke("plan", now=now),
            ):
                with pytest.raises(
                    IntegrityError, match="the clock stands before the ledger's last entry; set it right"
                ):
                    attempt(late)
        assert ledger.entries() == before
        assert ledger.spent() == TWO
        ledger.release(reservation, b"report", now=START + 5001)
    with pytest.raises(IntegrityError, match=rf"{path}: the clock stands before"):
        open_ledger(path, Budget(2.0, BUDGET.delta), now=START)
    with Ledger.read(path) as reader:
        assert reader.entries()[:-1] == before


def test_the_systems_own_clock_is_held_against_the_ledger(path: Path) -> None:
    with open_ledger(path, now=1e11) as ledger:  # in the year 5138
        with pytest.raises(IntegrityError, match="the clock stands before"):
            ledger.approve("plan")
        assert ledger.counter == 1

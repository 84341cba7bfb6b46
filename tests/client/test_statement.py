"""The statement of a ledger: its numbers are those of the accountant, its page is safe and complete in itself."""

import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

from client.chain import Approval, Budget, Entry
from client.charges import Tally, charges_of
from client.statement import Statement, statement
from client.statement_chart import time_ticks
from client.statement_page import render, to_json
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent, epsilon

START = 1_767_225_600.0  # 2026-01-01 00:00 UTC
DAY = 86_400.0
KEY, FINGERPRINT = "5f" * 32, "0123:4567:89ab:cdef:0123:4567:89ab:cdef"
PLAN_A, PLAN_B = "a1" * 32, "b2" * 32


class Book:
    """Entries as a ledger writes them, one after another, at times of the test's choosing."""

    def __init__(self, epsilon: float | str = 3.0, source: str = "First Savings Bank") -> None:
        self.entries: list[Entry] = []
        self.source = source
        self.add("create", START, {"source": source, "budget": {"epsilon": epsilon, "delta": 1e-5}})

    def add(self, kind: str, when: float, content: dict[str, Any]) -> int:
        seq = len(self.entries)
        self.entries.append(Entry(seq, kind, when, content, f"{seq:064x}"))
        return seq

    def charge(
        self,
        when: float,
        *,
        run: str = "run-1",
        number: int = 1,
        plan: str = PLAN_A,
        kind: str = "train",
        outcome: str = "release",
        noise: float = 20.0,
        rate: float = 1.0,
        steps: int = 5,
        segment: str = "",
    ) -> None:
        mechanism = "poisson_gaussian" if kind == "train" else "gaussian_histograms"
        event = {"mechanism": mechanism, "noise_multiplier": noise, "sample_rate": rate, "steps": steps}
        key = {"run_id": run, "round": number, "plan_hash": plan, "order_digest": "cd" * 32, "kind": kind}
        seq = self.add("reserve", when, {"key": key, "event": {**event, "segment": segment}})
        if outcome:
            self.add(outcome, when + 1, {"reserved": seq})

    def state(self, budget: float = 3.0, **changes: Any) -> Statement:
        known: dict[str, Any] = {
            "source": self.source, "budget": Budget(budget, 1e-5), "public_key": KEY, "fingerprint": FINGERPRINT,
            "made_seconds": START + 400 * DAY, "approvals": {}, "plans": {}, "seeded": False,
        }  # fmt: skip
        return statement(self.entries, **(known | changes))


@pytest.fixture
def book() -> Book:
    """Two runs that take turns in February, and one in April."""
    book = Book()
    for number in range(1, 7):
        book.charge(START + (31 + number) * DAY, number=number, outcome="abandon" if number == 3 else "release")
        book.charge(START + (31.5 + number) * DAY, run="run-2", number=number, plan=PLAN_B, noise=8.0, rate=0.1)
    book.charge(START + 100 * DAY, run="run-3", outcome="")
    book.charge(START + 101 * DAY, run="run-3", kind="evaluate", steps=1, noise=25.0)
    return book


def gaussian(noise: float, steps: int, rate: float = 1.0) -> PrivacyEvent:
    return PrivacyEvent("poisson_gaussian", noise, rate, steps)


def text_of(html: str) -> str:
    """What a reader of the page sees, with single spaces."""
    parts: list[str] = []

    class Reader(HTMLParser):
        hidden = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - its name
            self.hidden += tag in {"style", "title", "desc"}

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in {"style", "title", "desc"}

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                parts.append(data)

    Reader().feed(html)
    return " ".join("".join(parts).split())


def test_every_epsilon_is_the_accountants_of_the_events_it_names(book: Book) -> None:
    made = book.state()
    first, second, third = made.runs
    assert [(row.run_id, row.released, row.abandoned, row.reserved) for row in made.runs] == [
        ("run-1", 5, 1, 0), ("run-2", 6, 0, 0), ("run-3", 1, 0, 1),
    ]  # fmt: skip
    both = [gaussian(20, 30), gaussian(8, 30, 0.1)]
    assert first.alone == pytest.approx(epsilon([gaussian(20, 30)], 1e-5))
    assert first.after == pytest.approx(epsilon([gaussian(20, 30), gaussian(8, 25, 0.1)], 1e-5))
    assert (second.alone, second.after) == pytest.approx((epsilon(both[1:], 1e-5), epsilon(both, 1e-5)))
    everything = epsilon([*both, gaussian(20, 5), gaussian(25, 1)], 1e-5)
    assert third.after == made.spent == pytest.approx(everything)
    assert made.remaining == pytest.approx(3 - everything)
    assert [(row.month, row.events) for row in made.months] == [("2026-02", 12), ("2026-04", 2)]
    assert [row.after for row in made.months] == pytest.approx([epsilon(both, 1e-5), everything])
    # Rows are not meant to be added, and here it shows.
    assert sum(row.alone for row in made.runs) > 1.2 * made.spent


def test_settings_of_the_noise_have_a_row_each(book: Book) -> None:
    rows = {(row.kind, row.noise_multiplier): row for row in book.state().mechanisms}
    assert set(rows) == {("train", 20.0), ("train", 8.0), ("evaluate", 25.0)}
    assert (rows["train", 20.0].events, rows["train", 20.0].steps) == (7, 35)
    assert rows["evaluate", 25.0].alone == pytest.approx(epsilon([gaussian(25, 1)], 1e-5))


def test_segments_compose_in_parallel_and_all_records_count_in_each() -> None:
    book = Book()
    for segment, noise in (("car", 10.0), ("home", 20.0), ("", 30.0)):
        book.charge(START + DAY, run=f"run of {segment}", noise=noise, segment=segment)
    made = book.state()
    spent = {row.name: row.spent for row in made.segments}
    assert spent["car"] == made.spent == pytest.approx(epsilon([gaussian(10, 5), gaussian(30, 5)], 1e-5))
    assert spent["home"] == pytest.approx(epsilon([gaussian(20, 5), gaussian(30, 5)], 1e-5))
    assert spent[""] == pytest.approx(epsilon([gaussian(30, 5)], 1e-5))
    assert "all records" in text_of(render(made))


def test_anybody_can_compute_the_export_again(book: Book) -> None:
    exported = json.loads(json.dumps(to_json(book.state()), allow_nan=False))
    accountant = PLDAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    for event in exported["events"]:
        step = dp_event.GaussianDpEvent(event["noise_multiplier"])
        sampled = dp_event.PoissonSampledDpEvent(event["sample_rate"], step) if event["sample_rate"] < 1 else step
        accountant.compose(dp_event.SelfComposedDpEvent(sampled, event["steps"]))
    assert accountant.get_epsilon(exported["budget"]["delta"]) == pytest.approx(exported["spent"], abs=1e-3)
    assert exported["spent"] == book.state().spent
    first = exported["events"][0]
    assert (first["time"], first["outcome"], first["run_id"]) == (
        "2026-02-02T00:00:00.000000+00:00", "released", "run-1",
    )  # fmt: skip
    assert (exported["ledger"]["head"], exported["ledger"]["fingerprint"]) == (book.entries[-1].digest, FINGERPRINT)


def drawn(steps: Sequence[tuple[float, float]], when: float) -> float:
    return max(value for start, value in steps if start <= when)


def test_the_curve_is_never_below_the_truth() -> None:
    book = Book()
    for number in range(200):
        book.charge(START + number**1.5 * DAY, run=f"run-{number // 40}", number=number, noise=40.0 + number % 3)
    made = book.state()
    assert len(made.curve) < len(made.charges)
    for count, charge in enumerate(made.charges, start=1):
        truth = epsilon([one.event for one in made.charges[:count]], 1e-5)
        assert drawn(made.curve, charge.time_seconds) >= truth - 1e-9
    assert made.curve[-1][1] == made.spent


def test_a_ledger_of_years_still_fits_its_pages() -> None:
    book = Book(source="Old Bank")
    for index in range(2000):
        book.charge(START + index * DAY / 2, run=f"run-{index // 50}", number=index % 50, noise=90.0 + index // 1000)
    made = book.state()
    assert (len(made.runs), made.earlier_runs) == (12, 28)
    assert (len(made.months), made.earlier_months) == (12, 21)
    assert len(made.curve) <= 61
    assert len(to_json(made)["events"]) == 2000
    page = text_of(render(made))
    assert "28 earlier runs are in the totals" in page
    assert "2,000 released, 0 abandoned, 0 open" in page


def test_a_clock_that_was_set_back_loses_nothing_and_is_told() -> None:
    book = Book()
    for number, days in enumerate((200, 3, 4), start=1):
        book.charge(START + days * DAY, number=number)
    made = book.state()
    assert made.clock_set_back == 1
    assert [row.month for row in made.months] == ["2026-01", "2026-07"]
    assert made.months[-1].after == made.spent == pytest.approx(epsilon([gaussian(20, 15)], 1e-5))
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(made.curve))
    assert "clock was set back" in text_of(render(made))


def test_the_page_says_what_is_claimed_spent_and_left(book: Book) -> None:
    page = text_of(render(book.state()))
    spent = math.ceil(book.state().spent * 1e4) / 1e4
    assert f"Epsilon {spent:.4f} of 3 is spent; {3 - spent:.4f} remains" in page
    assert "each record of First Savings Bank is protected with epsilon 3 and delta 1e-5" in page
    assert "12 released, 1 abandoned, 1 open" in page
    assert "NOT PRIVATE" not in page
    assert "Epsilons do not add." in page
    assert "the bank refused are not recorded" in page
    assert f"ledger verify ledger.sqlite --key {KEY}" in page
    assert FINGERPRINT in page


def test_the_page_loads_nothing_runs_nothing_and_escapes_everything() -> None:
    nasty = "<script>alert('1')</script> & \"Sons\""
    book = Book(source=nasty)
    book.charge(START + DAY, run="<img src=x onerror=alert(2)>", plan="<b>bold</b>", segment="<i>segment</i>")
    approvals = {"<u>plan</u>": Approval("<u>plan</u>", None, None, 1)}
    html = render(book.state(approvals=approvals))
    for hostile in ("<script", "<img", "<b>bold", "<i>segment", "<u>", "http:", "https:", "url(", "@import"):
        assert hostile not in html
    assert nasty in text_of(html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    ("seeded", "words"),
    [
        (True, "NOT PRIVATE: this bank's noise comes from a seed"),
        (None, "it cannot say whether the bank's noise came from a seed"),
    ],
)
def test_seeded_noise_is_stamped(book: Book, seeded: bool | None, words: str) -> None:  # noqa: FBT001 - a parameter
    made = book.state(seeded=seeded)
    assert words in text_of(render(made))
    assert (made.not_private, to_json(made)["noise_seeded"]) == (bool(seeded), seeded)


def test_a_release_without_noise_is_stamped_and_has_no_bound() -> None:
    book = Book(epsilon="unlimited")
    book.charge(START + DAY)
    book.charge(START + 2 * DAY, number=2, noise=0.0)
    made = book.state(budget=math.inf)
    page = text_of(render(made))
    assert "NOT PRIVATE: something was released without noise" in page
    assert "Epsilon has no bound" in page
    exported = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert (exported["spent"], exported["budget"]["epsilon"], exported["not_private"]) == (None, None, True)


def test_without_a_limit_nothing_is_claimed_about_one(book: Book) -> None:
    page = text_of(render(book.state(budget=math.inf)))
    assert "the policy sets no budget" in page
    assert "The claim" not in page


def test_an_empty_ledger_has_a_page_too() -> None:
    made = Book().state()
    assert (made.spent, made.remaining, made.runs, made.curve) == (0.0, 3.0, (), ((START, 0.0),))
    page = text_of(render(made))
    assert "Nothing has been released: the budget of epsilon 3 is whole" in page
    assert "No plan is approved" in page
    assert to_json(made)["events"] == []


def test_approvals_say_what_is_left_of_their_cap_and_when_they_ended(book: Book) -> None:
    until = START + 200 * DAY
    approvals = {PLAN_A: Approval(PLAN_A, 2.0, until, 1), PLAN_B: Approval(PLAN_B, None, None, 2)}
    first, second = book.state(made_seconds=until - 1, approvals=approvals).approvals
    assert (first.cap, first.in_force) == (2.0, True)
    assert first.spent == pytest.approx(epsilon([gaussian(20, 35), gaussian(25, 1)], 1e-5))
    assert (second.cap, second.until_seconds, second.in_force) == (None, None, True)
    ended = book.state(made_seconds=until, approvals=approvals)
    assert not ended.approvals[0].in_force
    assert "no, it has ended" in text_of(render(ended))
    # The ledger knows a later time than the clock: what has ended stays ended.
    book.charge(until + DAY, run="late")
    assert not book.state(made_seconds=until - 1, approvals=approvals).approvals[0].in_force


def test_a_change_of_budget_is_drawn(book: Book) -> None:
    book.add("budget", START + 120 * DAY, {"epsilon": 2.5, "delta": 1e-5})
    assert book.state(budget=2.5).limits == ((START, 3.0), (START + 120 * DAY, 2.5))
    assert "budget 2.5" in text_of(render(book.state(budget=2.5)))


def test_the_unit_is_the_one_that_every_plan_used_protects(book: Book, plan: Plan) -> None:
    data = {**plan.data.model_dump(), "privacy_unit": "customer_id", "max_records_per_unit": 4}
    customers = Plan.model_validate({**plan.model_dump(), "data": data})
    whole = "customer_id (with all its records, of which at most 4 are used)"
    made = book.state(plans={PLAN_A: customers, PLAN_B: customers})
    assert made.unit == whole
    assert f"each {whole} of First Savings Bank" in text_of(render(made))
    # Only a record is protected by both, and nothing better is known of a plan that is gone.
    assert book.state(plans={PLAN_A: customers, PLAN_B: plan}).unit == "record"
    assert book.state(plans={PLAN_A: customers}).unit == "record"


def test_charges_keep_what_became_of_them(book: Book) -> None:
    outcomes = [charge.outcome for charge in charges_of(book.entries)]
    assert (outcomes.count("released"), outcomes.count("abandoned"), outcomes.count("reserved")) == (12, 1, 1)
    assert Tally((), 1e-5).curve() == []


@given(first=st.floats(0, 4e9), span=st.floats(1, 3e9), most=st.integers(3, 8))
def test_ticks_are_few_ascending_and_within(first: float, span: float, most: int) -> None:
    ticks = time_ticks(first, first + span, most)
    assert len(ticks) <= most + 1
    assert all(first <= when <= first + span for when, _ in ticks)
    assert all(a[0] < b[0] for a, b in pairwise(ticks))
    assert len({text for _, text in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("first", "last", "texts"),
    [
        (START, START + 85, ["00:00:00", "00:00:30", "00:01:00"]),
        (START, START + 5 * 3600, ["00:00", "01:00", "02:00", "03:00", "04:00", "05:00"]),
        (START, START + 3 * DAY, ["1 Jan", "2 Jan", "3 Jan", "4 Jan"]),
        (START + DAY, START + 150 * DAY, ["Feb 2026", "Mar 2026", "Apr 2026", "May 2026"]),
        (START - DAY, START + 1100 * DAY, ["2026", "2027", "2028", "2029"]),
    ],
)
def test_ticks_are_round_times(first: float, last: float, texts: list[str]) -> None:
    assert [text for _, text in time_ticks(first, last, 5)] == texts

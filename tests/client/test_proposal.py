"""The matching of a bank's columns and codes with a schema's: known answers, and what must hold for any table."""

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.proposal import outcomes_of, propose, targets_of, with_mapping
from client.proposal_table import codes_told, with_open_lines
from client.proposal_words import meanings, name_likeness, polarity
from client.source_config import TableSection
from metarisk_common.schema import Label, Schema

SCHEMA = Schema.model_validate(
    {
        "label": {"name": "default", "positive": 1, "negative": 0},
        "institution": "bank",
        "segment": "sector",
        "identifier": "number",
        "privacy_unit": "customer",
        "columns": [
            {"name": "income", "kind": "numeric", "lower": 0, "upper": 5000},
            {"name": "guarantee", "kind": "numeric", "source": "secured", "divide_by": "amount", "lower": 0,
             "upper": 1},
            {"name": "purpose", "kind": "categorical", "categories": ["car", "house"]},
        ],
    }
)  # fmt: skip
NAMES = [
    *SCHEMA.required,
    "INCOME",
    "incomeEUR",
    "Purpose",
    "AMT",
    "CUST_ID",
    "x",
    "default_flag",
    "Sector ",
    "secured_amt",
]
COLUMNS: dict[str, list[Any]] = {
    "numbers": [1.0, 250.0, 4000.0, None], "codes": ["Car", "House", "Car", None], "flags": ["Y", "N", "Y", "N"],
    "text": ["a b", "c", "d", "e"], "empty": [None, None, None, None], "nested": [[1], [2], [3], [4]],
}  # fmt: skip


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(sorted(COLUMNS)), min_size=1))
def test_no_own_column_is_used_twice_and_the_section_can_be_used(chosen: dict[str, str]) -> None:
    cells = pl.DataFrame([pl.Series(name, COLUMNS[kind]) for name, kind in chosen.items()])
    pairs = propose(SCHEMA, cells)
    assert [pair.target.name for pair in pairs] == list(SCHEMA.required)
    used = [pair.own for pair in pairs if pair.own is not None]
    assert len(used) == len(set(used))
    assert set(used) <= set(chosen)
    # A name of the plan's is read as ever, and given to nothing else.
    assert all(pair.own == pair.target.name for pair in pairs if pair.target.name in chosen)
    section = with_mapping(TableSection(file="a.csv"), pairs)
    assert {section.columns.get(pair.target.name, pair.target.name) for pair in pairs if pair.own} == set(used)


@pytest.mark.parametrize(
    ("wanted", "own"),
    [
        ("annual_income", "AnnualIncome"), ("annual_income", "ANNUAL-INCOME_EUR"), ("größe", "GROESSE"),
        ("approved_amount", "APPR_AMT"), ("customer", "KUNDEN_NR"), ("number_of_employees", "NoOfEmpl"),
        ("café", "CAFE"), ("low_doc", "LOWDOC_FLG"), ("revolving_credit", "REV_CRED_FLAG"),
        ("interest_rate", "INT_RATE"),
    ],
)  # fmt: skip
def test_names_of_one_meaning_are_alike(wanted: str, own: str) -> None:
    assert name_likeness(wanted, own) >= 0.6


@pytest.mark.parametrize(
    ("wanted", "own"),
    [
        ("jobs_created", "JOBS_RETAINED"), ("approved_amount", "GUARANTEED_AMOUNT"), ("income", "OUTCOME"),
        ("approval_year", "APPROVED_AMOUNT"), ("age", "PAGE_COUNT"), ("sector", "VECTOR_ID"), ("a", ""), ("age", "___"),
    ],
)  # fmt: skip
def test_names_of_different_meaning_are_not(wanted: str, own: str) -> None:
    assert name_likeness(wanted, own) < 0.6


def test_codes_are_found_by_spelling_and_only_where_it_is_certain() -> None:
    sectors = ("retail", "real_estate", "other")
    assert meanings(("RETAIL", "Real Estate", "01 - Other", "99"), sectors) == {
        "RETAIL": "retail", "Real Estate": "real_estate", "01 - Other": "other",
    }  # fmt: skip
    assert meanings(("J", "N", "?"), ("yes", "no")) == {"J": "yes", "N": "no"}
    assert meanings(("U", "R"), ("urban", "rural")) == {"U": "urban", "R": "rural"}
    assert meanings(("U", "R"), ("urban", "rural", "unknown")) == {}
    assert meanings(("U", "UNKNOWN"), ("urban", "rural", "unknown")) == {"U": "urban", "UNKNOWN": "unknown"}
    assert meanings(("R",), sectors) == {}
    assert meanings(("1", "2"), ("car", "house")) == {}
    assert meanings(("A B",), ("a_b", "ab")) == {}
    assert meanings(("01", "1"), ("1", "2")) == {"01": "1", "1": "1"}


CHARGED = Label(name="charged_off", positive=1, negative=0)
WORDS = Label(name="outcome", positive="bad", negative="good")


@pytest.mark.parametrize(
    ("label", "own", "codes", "expected"),
    [
        (CHARGED, "STATUS", ("CHGOFF", "P I F"), {"CHGOFF": "1", "P I F": "0"}),
        (CHARGED, "STATUS", ("1", "0"), {"1": "1", "0": "0"}),
        (CHARGED, "X", ("Y", "N"), {"Y": "1", "N": "0"}),
        (CHARGED, "PAID_FLAG", ("1", "0"), {"1": "0", "0": "1"}),  # A 1 that says the opposite.
        (CHARGED, "DEFAULT_FLAG", ("J", "N"), {"J": "1", "N": "0"}),
        (CHARGED, "NOT_CHARGED_OFF", ("1", "0"), {}),
        (CHARGED, "STATUS", ("A", "B"), {}),
        (WORDS, "STATUS", ("paid", "Charged off"), {"paid": "good", "Charged off": "bad"}),
        (WORDS, "DEFAULTED", ("1", "0"), {"1": "bad", "0": "good"}),
        (WORDS, "STATUS", ("1", "0"), {}),  # Nobody said what 1 means.
        (WORDS, "STATUS", ("GOOD", "Bad "), {"GOOD": "good", "Bad ": "bad"}),
        (Label(name="outcome"), "STATUS", ("paid", "default"), {}),  # Nor what the plan's 1 does.
        (Label(name="repaid"), "STATUS", ("paid", "default"), {"paid": "1", "default": "0"}),
        (Label(name="repaid"), "DEFAULT", ("1", "0"), {"1": "0", "0": "1"}),
        (Label(name="default", positive=0, negative=1), "X", ("paid", "loss"), {"paid": "0", "loss": "1"}),
    ],
)
def test_the_two_outcomes_are_told_by_words_and_never_guessed(
    label: Label, own: str, codes: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert outcomes_of(codes, label, own) == expected


def test_a_word_that_is_denied_says_nothing() -> None:
    assert [polarity(text) for text in ("not paid", "NO DEFAULT", "paid in full", "Charge-Off", "open")] == [
        None, None, "good", "bad", None,
    ]  # fmt: skip


def test_kind_and_range_decide_where_names_do_not() -> None:
    rows = 50
    cells = pl.DataFrame(
        {
            "ZWECK_ALT": ["car", "house"] * 25, "K9": ["CAR", "House "] * 25, "income_text": ["low", "high"] * 25,
            "INCOME_A": [1e9] * rows, "INCOME_B": [100.0] * rows, "STATUS": ["paid", "charged off"] * 25,
        }
    )  # fmt: skip
    pairs = {pair.target.name: pair for pair in propose(SCHEMA, cells.drop("ZWECK_ALT"))}
    assert (pairs["income"].own, pairs["purpose"].own, pairs["purpose"].why) == (
        "INCOME_B",
        "K9",
        "kind only: please look",
    )
    assert pairs["purpose"].fit.codes == {"car": ("CAR",), "house": ("House ",)}
    assert (pairs["default"].own, pairs["default"].fit.codes) == ("STATUS", {"1": ("charged off",), "0": ("paid",)})
    assert (pairs["amount"].own, pairs["customer"].own) == (None, None)


def test_two_columns_that_are_as_good_as_each_other_are_pointed_out() -> None:
    pairs = {pair.target.name: pair for pair in propose(SCHEMA, pl.DataFrame({"INCOME": [1.0], "Income": [2.0]}))}
    assert "please look" in pairs["income"].why


def test_what_may_be_a_record_s_own_text_is_never_told() -> None:
    cells = pl.DataFrame({"Purpose": ["Car", "Car", "C4N4RY at the lake", "07", "07"], "income": [1, 2, 3, 4, 5]})
    pairs = propose(SCHEMA, cells)
    told = "\n".join(codes_told(pairs)) + with_open_lines("", pairs)
    assert "07" in told
    assert "C4N4RY" not in told


def test_every_column_that_a_plan_requires_is_a_target() -> None:
    kinds = {target.name: target.kind for target in targets_of(SCHEMA)}
    assert kinds == {
        "income": "number", "secured": "number", "amount": "number", "purpose": "category", "default": "outcome",
        "sector": "category", "number": "key", "customer": "key",
    }  # fmt: skip

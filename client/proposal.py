"""Which of a bank's own columns may be which of a schema's: a proposal for a person to confirm, never a decision.

Pairs are scored by name, and by how many cells of a sample are what the schema expects: numbers within its public
bounds, its categories in the bank's spelling, one of its two outcomes. The best assignment of own columns to the
schema's is taken (`scipy.optimize.linear_sum_assignment`), each own column at most once; unlikely pairs stay open.
"""

import re
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import polars as pl
from scipy.optimize import linear_sum_assignment

from metarisk_common.config import validate
from metarisk_common.schema import CategoricalColumn, Label, NumericColumn, NumericLabel, Schema

from .proposal_words import denies, meanings, name_likeness, polarity, truth
from .source_config import TableSection

Kind = Literal["number", "category", "outcome", "key"]

_ALIKE: Final = 0.6
"""Names less alike than this are not paired for their names."""
_SPELT_OTHERWISE: Final = 0.97
_SURE_NAME: Final = 0.75
_FEW_FIT: Final = 0.5
_MOST_FIT: Final = 0.8
_CLOSE: Final = 0.02
_MOST_CODES: Final = 60
_LEAST_KNOWN: Final = 2
_LEAST_ROWS: Final = 2
"""Rows that a code must stand in to be shown: what stands in one only may be no code, but a record's own text."""
_OUTCOMES: Final = range(2, 11)
_WHOLE_NUMBER_AS_FLOAT: Final = r"^(-?\d+)\.0+$"


@dataclass(frozen=True)
class Target:
    """A column that the schema requires: its `title`s, and what its cells must be; all of it public."""

    name: str
    kind: Kind
    titles: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    label: Label | None = None


@dataclass(frozen=True)
class Fit:
    """What the sample's cells of one own column would be as a target's.

    Attributes:
        possible: whether the column can be of that kind at all.
        share: of the cells that are not blank, those that fit; none: nothing can be told.
        codes: own codes that need a mapping, by the schema's word.
        unknown: own codes of several rows that nobody can place.
        meant: the schema's words that some code spells.

    """

    possible: bool
    share: float | None = None
    codes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    meant: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pair:
    """A column of the schema and the bank's own that is proposed for it, or none: then it stays open."""

    target: Target
    own: str | None = None
    why: str = "open"
    fit: Fit = Fit(possible=False)


def targets_of(schema: Schema) -> tuple[Target, ...]:
    """List what a bank's table must have, in the order of `schema.required`."""
    return tuple(_target(schema, name) for name in schema.required)


def propose(schema: Schema, cells: pl.DataFrame) -> tuple[Pair, ...]:
    """Pair the schema's columns with those of a sample; one pair for each that the schema requires.

    Args:
        schema: the plan's.
        cells: (rows, own columns) the sample, under the bank's own names.

    """
    targets, owns = targets_of(schema), cells.columns
    fits = [[fit_of(target, cells[own]) for own in owns] for target in targets]
    names = np.array([[_likeness(target, own) for own in owns] for target in targets])
    scores = np.array(
        [[_score(names[i, j], fit, targets[i]) for j, fit in enumerate(row)] for i, row in enumerate(fits)]
    )
    rows, columns = linear_sum_assignment(scores, maximize=True)
    chosen = {int(i): int(j) for i, j in zip(rows, columns, strict=True) if scores[i, j] > 0}
    pairs = []
    for i, target in enumerate(targets):
        if i not in chosen:
            pairs.append(Pair(target))
            continue
        j = chosen[i]
        free = [k for k in range(len(owns)) if k not in chosen.values()]
        rival = next((owns[k] for k in free if scores[i, k] > scores[i, j] - _CLOSE), None)
        pairs.append(Pair(target, owns[j], _why(names[i, j], fits[i][j], rival), fits[i][j]))
    return tuple(pairs)


def with_mapping(section: TableSection, pairs: tuple[Pair, ...]) -> TableSection:
    """Put the pairs' names and codes into a section that says where the table is."""
    columns = {pair.target.name: pair.own for pair in pairs if pair.own not in {None, pair.target.name}}
    values = {pair.target.name: pair.fit.codes for pair in pairs if pair.own is not None and pair.fit.codes}
    whole = section.model_dump() | {"columns": columns, "values": values}
    return validate(whole, TableSection, where="the proposal")


def fit_of(target: Target, cells: pl.Series) -> Fit:
    """Tell how well a column's cells are what the target's must be."""
    if cells.dtype.is_nested() or cells.dtype in (pl.Binary, pl.Object):
        return Fit(possible=False)
    text = cells.cast(pl.String).str.replace(_WHOLE_NUMBER_AS_FLOAT, "$1").replace({"True": "true", "False": "false"})
    text = text.filter(text.is_not_null() & (text.str.strip_chars() != "") & ~text.is_in(["NaN", "nan"]))
    if text.is_empty():
        return Fit(possible=True)
    if target.kind == "number":
        return _fit_of_numbers(target, text)
    if target.kind == "key":
        return Fit(possible=not text.str.contains(r"^-?\d+[.,]\d+$").any())
    return _fit_of_codes(target, text, cells.name)


def _fit_of_numbers(target: Target, text: pl.Series) -> Fit:
    values = text.str.strip_chars().cast(pl.Float64, strict=False)
    share = values.is_finite().fill_null(value=False).mean()
    possible = isinstance(share, float) and share >= _FEW_FIT
    if target.bounds is not None:
        share = values.is_between(*target.bounds).fill_null(value=False).mean()
    return Fit(possible, share if isinstance(share, float) else None)


def _fit_of_codes(target: Target, text: pl.Series, own: str) -> Fit:
    counts = text.value_counts(sort=False, name="rows").sort(["rows", text.name], descending=[True, False])
    codes = tuple(counts[text.name].to_list())
    rows = dict(zip(codes, counts["rows"].to_list(), strict=True))
    if target.kind == "outcome" and target.label is not None:
        if len(codes) not in _OUTCOMES:
            return Fit(possible=False)
        meaning = outcomes_of(codes, target.label, own)
    elif not target.categories:
        return Fit(possible=len(codes) <= max(_MOST_CODES, len(text) // 10))
    else:
        few = len(codes) <= max(_MOST_CODES, 3 * len(target.categories))
        meaning = meanings(codes, target.categories) if few else {}
        if not few:
            return Fit(possible=False, share=sum(rows[one] for one in codes if one in target.categories) / len(text))
    mapped = {
        word: tuple(code for code in codes if meaning.get(code) == word and code != word)
        for word in dict.fromkeys(meaning.values())
    }
    return Fit(
        possible=True,
        share=sum(rows[code] for code in meaning) / len(text),
        codes={word: some for word, some in mapped.items() if some},
        unknown=tuple(code for code in codes if code not in meaning and rows[code] >= _LEAST_ROWS),
        meant=frozenset(meaning.values()),
    )


def outcomes_of(codes: tuple[str, ...], label: Label, own: str) -> dict[str, str]:
    """Tell which outcome each code means, where words say so; what is not said stays out, for a person to decide.

    What the positive outcome is, bad or good, is read from its own word, else from the label's name and title; what 1
    means in the bank's column from the column's name. A 1 in PAID_FLAG is no 1 of charged_off.
    """
    positive, negative = str(label.positive), str(label.negative)
    by_word = polarity(positive) or _opposite(polarity(negative))
    named = polarity(label.name) or polarity(label.title)
    binary = {truth(positive), truth(negative)} == {True, False}
    if binary and named is not None and not truth(positive):
        named = _opposite(named)
    event, own_event = by_word or named, polarity(own)
    found = {}
    for code in codes:
        said, is_true = polarity(code), truth(code)
        if said is None and is_true is not None and own_event is not None:
            said = own_event if is_true else _opposite(own_event)
        if said is not None and event is not None:
            found[code] = positive if said == event else negative
        elif is_true is not None and denies(own) != denies(label.name):
            continue
        elif is_true is not None and binary:
            found[code] = positive if is_true == truth(positive) else negative
        elif code in {positive, negative}:
            found[code] = code
        else:
            found |= meanings((code,), (positive, negative))
    return found


def _opposite(said: Literal["bad", "good"] | None) -> Literal["bad", "good"] | None:
    return None if said is None else "good" if said == "bad" else "bad"


def _target(schema: Schema, name: str) -> Target:
    label = schema.label
    if name == label.name:
        if isinstance(label, NumericLabel):
            return Target(name, "number", (label.title,), (label.lower, label.upper))
        outcomes = (str(label.positive), str(label.negative))
        return Target(name, "outcome", (label.title,), categories=outcomes, label=label)
    titles = tuple(one.title for one in schema.columns if one.sources == (name,))
    categories = tuple(
        word for one in schema.columns if isinstance(one, CategoricalColumn) and one.name == name
        for word in one.categories
    )  # fmt: skip
    if name == schema.segment:
        categories = tuple(dict.fromkeys((*categories, *schema.segments)))
    if categories or name == schema.segment:
        return Target(name, "category", titles, categories=categories)
    if name in {schema.identifier, schema.privacy_unit}:
        return Target(name, "key", titles)
    alone = [one for one in schema.columns if isinstance(one, NumericColumn) and one.sources == (name,)]
    bounds = (min(one.lower for one in alone), max(one.upper for one in alone)) if alone else None
    return Target(name, "number", titles, bounds)


def _likeness(target: Target, own: str) -> float:
    by_title = max((0.95 * name_likeness(title, own) for title in target.titles if title), default=0.0)
    return max(name_likeness(target.name, own), by_title)


def _score(name: float, fit: Fit, target: Target) -> float:
    """Score a pair: above 10 for the very same name, which is read unless a person says otherwise; 0 for no pair."""
    share = _FEW_FIT if fit.share is None else fit.share
    if name == 1:
        return 10 + share
    if not fit.possible:
        return 0.0
    if name >= _ALIKE:
        return 0.7 * name + 0.3 * share
    by_words = len(fit.meant) >= _LEAST_KNOWN and any(
        re.search("[^\\W\\d_]{2}", code) and truth(code) is None for code in (*fit.meant, *sum(fit.codes.values(), ()))
    )
    if target.kind in {"category", "outcome"} and by_words and share >= _MOST_FIT:
        return 0.3 * share + 0.1 * name
    return 0.0


def _why(name: float, fit: Fit, rival: str | None) -> str:
    if name >= _SPELT_OTHERWISE:
        why = "same name" if name == 1 else "same name, spelt otherwise"
    else:
        why = "similar name and kind" if name >= _ALIKE else "kind only"
    if rival is not None:
        return f"{why}, as {rival} is: please look"
    doubtful = name < _SURE_NAME or (fit.share is not None and fit.share < _FEW_FIT)
    return f"{why}: please look" if doubtful else why

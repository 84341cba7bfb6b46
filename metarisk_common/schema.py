"""The columns of a table, with everything public that is needed to turn them into model inputs.

A schema belongs to the plan, so every bank and the server see the same one. Bounds, bins, shares and
categories are public constants; nothing in it may be fitted on private records.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from .config import Frozen
from .errors import ConfigError

Text = Annotated[str, Field(min_length=1)]


class NumericColumn(Frozen):
    """A number between public bounds.

    The value is that of the table's column `source` (by default, of the same name), divided by the column
    `divide_by` of the same record where one is given: a guarantee as a share of the loan, say.

    `bins` are the inner edges of the piecewise-linear bins, in the column's own unit, ascending and strictly
    inside the bounds; where none are given, the range is cut evenly on the column's scale. `shares` are the
    publicly expected shares of records in the `len(bins) + 1` bins; even shares where none are given.
    """

    kind: Literal["numeric"]
    name: Text
    title: str = ""
    unit: str = ""
    source: Text | None = None
    divide_by: Text | None = None
    lower: float = Field(allow_inf_nan=False)
    upper: float = Field(allow_inf_nan=False)
    scale: Literal["linear", "log", "log1p"] = "linear"
    bins: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    missing: Literal["indicator", "refuse"] = "indicator"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lower < self.upper:
            raise ValueError(f"column '{self.name}': lower must be below upper")
        if self.scale == "log" and self.lower <= 0:
            raise ValueError(f"column '{self.name}': scale 'log' needs a lower bound above 0; 'log1p' takes 0")
        if self.scale == "log1p" and self.lower < 0:
            raise ValueError(f"column '{self.name}': scale 'log1p' needs a lower bound of 0 or more")
        inside = all(math.isfinite(edge) and self.lower < edge < self.upper for edge in self.bins)
        if not inside or any(a >= b for a, b in zip(self.bins, self.bins[1:], strict=False)):
            raise ValueError(f"column '{self.name}': bins must ascend strictly inside the bounds")
        if self.shares and (len(self.shares) != len(self.bins) + 1 or not self.bins):
            raise ValueError(f"column '{self.name}': shares must have one entry for each bin: one more than edges")
        if any(not 0 < share < 1 for share in self.shares):
            raise ValueError(f"column '{self.name}': shares must lie between 0 and 1")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Columns of the table that this input is read from."""
        first = self.source or self.name
        return (first, self.divide_by) if self.divide_by else (first,)


class CategoricalColumn(Frozen):
    """One of a public list of categories; anything else, a missing value included, counts as `other`.

    `shares` are publicly expected shares of the categories, in their order; even shares where none are given.
    """

    kind: Literal["categorical"]
    name: Text
    title: str = ""
    categories: tuple[str, ...] = Field(min_length=1)
    shares: tuple[float, ...] = ()

    @field_validator("categories", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        # A year or a code may be written as a number in TOML; a boolean would be ambiguous as text.
        if isinstance(value, list | tuple):
            return [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.categories)) != len(self.categories):
            raise ValueError(f"column '{self.name}': a category stands twice")
        if self.shares:
            if len(self.shares) != len(self.categories):
                raise ValueError(f"column '{self.name}': shares must have one entry for each category")
            if any(not 0 < share < 1 for share in self.shares) or sum(self.shares) > 1 + 1e-9:
                raise ValueError(f"column '{self.name}': shares must lie between 0 and 1 and sum to at most 1")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Columns of the table that this input is read from."""
        return (self.name,)


class Label(Frozen):
    """The binary outcome: which value means that the event happened (a loan was charged off), which that it did not."""

    name: Text
    positive: str | int = 1
    negative: str | int = 0
    title: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if str(self.positive) == str(self.negative):
            raise ValueError("label: positive and negative must differ")
        return self


class NumericLabel(Frozen):
    """A number that is to be predicted (the logarithm of a variance, say), within public bounds.

    Models learn `(value - centre) / scale`, both public: what the values lie around, and how far. A value outside the
    bounds is clipped, so one record's label moves a gradient by no more than the bounds allow.
    """

    kind: Literal["numeric"]
    name: Text
    title: str = ""
    unit: str = ""
    lower: float = Field(allow_inf_nan=False)
    upper: float = Field(allow_inf_nan=False)
    centre: float = Field(allow_inf_nan=False)
    scale: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lower < self.upper:
            raise ValueError("label: lower must be below upper")
        if not self.lower <= self.centre <= self.upper:
            raise ValueError("label: centre must lie within the bounds")
        return self


def _kind_of_label(value: object) -> str:
    if isinstance(value, NumericLabel):
        return "numeric"
    return "numeric" if isinstance(value, dict) and "kind" in value else "binary"


AnyLabel = Annotated[
    Annotated[Label, Tag("binary")] | Annotated[NumericLabel, Tag("numeric")], Discriminator(_kind_of_label)
]


class Interactions(Frozen):
    """Trees drawn at random from public constants, whose leaves are inputs; see `metarisk_common.interactions`."""

    trees: int = Field(default=100, ge=1, le=10_000)
    depth: int = Field(default=3, ge=2, le=8)
    share: float = Field(default=0.3, gt=0, lt=1)
    """Of a row's squared norm, the intercept aside: the leaves'; the columns' own inputs have the rest."""
    seed: int = Field(default=0, ge=0)
    leave_out: tuple[str, ...] = ()
    """Columns that no tree splits."""


class Encoding(Frozen):
    """Public constants of the encoding; `metarisk_common.features` says what each does."""

    variance_power: float = Field(default=0.35, ge=0, le=1)
    intercept: float = Field(default=0.25, gt=0, lt=1)
    clip_standardised: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    interactions: Interactions | None = None

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_where_unused(handler(self), {"interactions": None})


Column = Annotated[NumericColumn | CategoricalColumn, Field(discriminator="kind")]


class Schema(Frozen):
    """The columns of a table: inputs, label, and what the records are grouped by.

    `segments` is the public list of segments that tasks are made of; which of them a bank has records of is
    private, so every bank works on every one of them. A record of any other belongs to none.

    `privacy_unit` names the column whose value, a customer's number say, is protected as a whole: all the records of
    one unit count as one, and at most `max_records_per_unit` of them are used. Without it each record is a unit.
    """

    label: AnyLabel
    institution: Text
    segment: Text | None = None
    segments: tuple[str, ...] = ()
    identifier: Text | None = None
    privacy_unit: Text | None = None
    max_records_per_unit: int = Field(default=1, ge=1, le=1000)
    columns: tuple[Column, ...] = Field(min_length=1)
    encoding: Encoding = Encoding()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.segments and self.segment is None:
            raise ValueError("segments are listed but no segment column is named")
        if len(set(self.segments)) != len(self.segments):
            raise ValueError("a segment stands twice")
        if self.privacy_unit is None and self.max_records_per_unit != 1:
            raise ValueError("max_records_per_unit needs privacy_unit, the column that says whose a record is")
        names = [column.name for column in self.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column '{twice[0]}' stands twice")
        trees = self.encoding.interactions
        unknown = [name for name in (trees.leave_out if trees else ()) if name not in names]
        if unknown:
            raise ValueError(f"encoding.interactions.leave_out: there is no column '{unknown[0]}'")
        if "interactions" in names and trees:
            raise ValueError("a column named 'interactions' and encoding.interactions exclude each other")
        for role, name in (
            ("label", self.label.name),
            ("institution", self.institution),
            ("identifier", self.identifier),
            ("privacy unit", self.privacy_unit),
        ):
            if name and any(name in column.sources for column in self.columns):
                raise ValueError(f"column '{name}' is the {role} and may not be an input as well")
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_where_unused(handler(self), {"privacy_unit": None, "max_records_per_unit": 1})

    @property
    def regression(self) -> bool:
        """Whether the label is a number, and not one of two outcomes."""
        return isinstance(self.label, NumericLabel)

    @property
    def outcome(self) -> Label:
        """The label, of which two values are known.

        Raises:
            ConfigError: it is a number.

        """
        if isinstance(self.label, NumericLabel):
            raise ConfigError(
                f"schema.label: '{self.label.name}' is a number to predict, and this works for one of two outcomes only"
            )
        return self.label

    @property
    def required(self) -> tuple[str, ...]:
        """Every column that a bank's table must have, the institution aside: a bank knows its own name."""
        extra = [name for name in (self.label.name, self.segment, self.identifier, self.privacy_unit) if name]
        inputs = [name for column in self.columns for name in column.sources]
        return tuple(dict.fromkeys([*inputs, *extra]))

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of the schema, hexadecimal."""
        return canonical_hash(self)


def left_out_where_unused(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields that came later where they have their default: what banks have approved keeps its hash."""
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def canonical_json(value: Frozen) -> str:
    """One text for one value: keys sorted, no spaces, ASCII only."""
    return json.dumps(value.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_hash(value: Frozen) -> str:
    """SHA-256 of `canonical_json`, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

"""Section `[table]` of `institution.toml`: where a bank's table is, and what its own names and codes mean."""

import datetime as dt
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from metarisk_common.config import Frozen, toml_text

from .source_files import is_address

Scalar = bool | int | float | str | dt.date
"""What a cell is compared with, or is constant at; a date means its text, 2020-12-31."""

_Name = Annotated[str, Field(min_length=1, max_length=500)]
_TAKEN = ('"', "\n", "\r", ".")


def _as_list(value: object) -> object:
    """Take one value for a list of one."""
    return value if isinstance(value, (list, tuple)) else (value,)


def _no_address(path: str) -> str:
    """Refuse a database's URL where its file's path belongs: a path stands in messages, and a password must not."""
    if is_address(path):
        raise ValueError("names the file that holds the database's URL; the URL itself must not stand here")
    return path


_Some = Annotated[
    tuple[Annotated[Scalar, Field(union_mode="smart")], ...], BeforeValidator(_as_list), Field(min_length=1)
]


class TableSection(Frozen):
    """Where the table is: a `file`, or a database by `url_env` or `url_file` with its `table` or `query`.

    `where` and `between` keep the rows whose cell, of the bank's own column, is one of the values, or lies within both
    bounds. `columns` gives the bank's own name of a column of the schema, `values` the bank's own codes of a category
    of the schema or of an outcome, and `constants` a column's one value for every record.
    """

    file: _Name | None = None
    url_env: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    url_file: Annotated[_Name, AfterValidator(_no_address)] | None = None
    table: _Name | None = None
    query: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    order_by: Annotated[tuple[_Name, ...], BeforeValidator(_as_list)] = ()
    separator: Annotated[str, Field(pattern="^[\t -~]$")] = ","
    decimal_comma: bool = False
    encoding: Literal["utf-8"] = "utf-8"
    where: dict[_Name, _Some] = Field(default_factory=dict)
    between: dict[_Name, tuple[Scalar, Scalar]] = Field(default_factory=dict)
    columns: dict[_Name, _Name] = Field(default_factory=dict)
    values: dict[_Name, dict[str, _Some]] = Field(default_factory=dict)
    constants: dict[_Name, Scalar] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(value is not None for value in (self.file, self.url_env, self.url_file)) != 1:
            raise ValueError("give one of file, url_env and url_file: where the table is")
        if (self.file is None) != ((self.table is None) != (self.query is None)):
            raise ValueError("a database needs one of table and query, and a file none of them")
        if self.file is not None and (self.table or self.query or self.order_by):
            raise ValueError("table, query and order_by are for databases; a file has its own order")
        if self.separator in _TAKEN or (self.separator == "," and self.decimal_comma):
            raise ValueError("separator must be one character that no number and no quote has, such as ; or |")
        both = sorted(set(self.columns) & set(self.constants))
        if both:
            raise ValueError(f"'{both[0]}' is under columns and under constants; leave one out")
        for name, codes in self.values.items():
            listed = [cell_text(code) for some in codes.values() for code in some]
            if len(set(listed)) != len(listed):
                raise ValueError(f"values.{name}: a code stands twice")
        for name, (low, high) in self.between.items():
            if isinstance(low, (int, float)) != isinstance(high, (int, float)):
                raise ValueError(f"between.{name}: both bounds must be numbers, or both text")
        return self

    @property
    def title(self) -> str:
        """What messages call the table; nothing of its address but the file's own name."""
        if self.file is not None:
            return self.file
        return "the database's query" if self.table is None else f"database table '{self.table}'"


def cell_text(value: Scalar) -> str:
    """Spell a value as a cell's text is compared: true, 12, 0.5, 2020-12-31."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat() if isinstance(value, dt.date) else str(value)


def _toml(value: Any) -> str:  # noqa: ANN401 - whatever the section holds
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dt.date):
        return value.isoformat()
    return toml_text(value) if isinstance(value, str) else repr(value)


_EXPLAINED = {
    "file": "CSV or Parquet, a folder of Parquet files, or a pattern such as exports/*.parquet",
    "url_env": "the environment's variable that holds the database's URL, such as postgresql+psycopg://...",
    "url_file": "the file that holds the database's URL; it must be yours, and closed to all others (chmod 600)",
    "table": "in the database",
    "query": "instead of table: one SELECT",
    "order_by": "columns that give the rows of a database an order; needed where a plan limits records by customer",
    "separator": "of CSV",
    "decimal_comma": "of CSV: whether numbers are written 1,5",
    "encoding": "of CSV; no other is read",
}
_SUBSECTIONS = {
    "where": "Only rows whose cell is one of these: the bank's own column = value, or a list.",
    "between": "Only rows whose cell lies within both: the bank's own column = [least, most].",
    "columns": "The plan's column = the bank's own; what is not here has the plan's name.",
    "constants": "The plan's column = one value for every record.",
}

EXAMPLE = """\
# Instead of data: where the table is and what its names and codes mean, where they are not the plan's.
#   [table]
#   file = "exports/loans.csv"   # or a folder of Parquet files, or url_env / url_file with table or query
#   separator = ";"
#   decimal_comma = true
#   [table.where]                # only such rows: the bank's own column = value, or a list
#   product = ["mortgage", "consumer"]
#   [table.between]
#   year = [2015, 2020]
#   [table.columns]              # the plan's column = the bank's own
#   income = "INCOME_EUR"
#   [table.values.purpose]       # the plan's category, or outcome = the bank's own codes
#   car = ["01", "02"]
#   [table.constants]            # the plan's column = one value for every record
#   region = "north"
"""


def table_toml(section: TableSection | None) -> str:
    """Write the section with every key explained, or an example of it in comments."""
    if section is None:
        return EXAMPLE
    lines = ["# Where the table is and what its names and codes mean. It is only ever read here.", "[table]"]
    for key, what in _EXPLAINED.items():
        value = getattr(section, key)
        if value not in (None, ()):
            lines += [f"# {what}", f"{key} = {_toml(value)}"]
    for key, what in _SUBSECTIONS.items():
        held = getattr(section, key)
        if held:
            lines += [f"# {what}", f"[table.{key}]", *(f"{toml_text(name)} = {_toml(held[name])}" for name in held)]
    for name, codes in section.values.items():
        lines += ["# The plan's category or outcome = the bank's own codes.", f"[table.values.{toml_text(name)}]"]
        lines += [f"{toml_text(category)} = {_toml(codes[category])}" for category in codes]
    return "\n".join(lines) + "\n"

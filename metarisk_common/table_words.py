"""Words about a table's columns for messages; never about its cells."""

import difflib

import polars as pl


def near_miss(name: str, names: tuple[str, ...], frame: pl.DataFrame) -> str:
    """Ask whether a column that is missing is another one of the header, misspelt; empty where none comes near."""
    spelled = {" ".join(other.lower().split()): other for other in frame.columns if other not in names}
    close = difflib.get_close_matches(name.lower(), list(spelled), n=1)
    return f"; did you mean '{' '.join(spelled[close[0]].split())}'?" if close else ""


def wrong_kind(where: str, name: str, dtype: pl.DataType, expected: str) -> str:
    """Say that a whole column is of a kind that the schema cannot mean."""
    kind = "dates or times" if dtype.is_temporal() else "lists or structures" if dtype.is_nested() else "binary values"
    return f"{where}: column '{name}' holds {kind}, and the schema expects {expected}; convert the column in the table"

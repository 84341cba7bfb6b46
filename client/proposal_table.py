"""A proposed mapping as a person sees it, as a machine reads it, and as it stands in `institution.toml`."""

from typing import Final

from rich.markup import escape
from rich.table import Table

from metarisk_common.config import toml_text

from .proposal import Pair
from .source_config import TableSection

_SHOWN: Final = 8
_CATEGORY_KINDS: Final = ("category", "outcome")


def proposal_table(pairs: tuple[Pair, ...], title: str) -> Table:
    """Lay out what is proposed, a line for each column of the schema, with the share of the cells that fit."""
    table = Table(title=title, title_justify="left")
    for heading in ("column", "your column"):
        table.add_column(heading, overflow="fold")
    table.add_column("why")
    table.add_column("fits", justify="right")
    for pair in pairs:
        share = "" if pair.fit.share is None else f"{pair.fit.share:.1%}"
        table.add_row(escape(pair.target.name), escape(pair.own or "(open)"), escape(pair.why), share)
    return table


def codes_told(pairs: tuple[Pair, ...]) -> list[str]:
    """Say which own codes are taken for which category or outcome, and what stays open; a line each."""
    lines = []
    for pair in pairs:
        fit = pair.fit
        if pair.own is None or pair.target.kind not in _CATEGORY_KINDS:
            continue
        taken = [f"{word} = {_some(codes)}" for word, codes in fit.codes.items()]
        if taken:
            lines.append(f"{pair.target.name}: {'; '.join(taken)}")
        unknown, unmet = open_codes(pair)
        if unknown:
            lines.append(f"{pair.target.name}: OPEN, none of the plan's: {_some(unknown)}")
        if unmet:
            lines.append(f"{pair.target.name}: OPEN, no code was found for: {_some(unmet)}")
    return lines


def open_codes(pair: Pair) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the own codes that nobody can place, and, where there are any, the schema's words that none spells."""
    if pair.own is None or pair.target.kind not in _CATEGORY_KINDS or not pair.target.categories:
        return (), ()
    unmet = tuple(word for word in pair.target.categories if word not in pair.fit.meant)
    return (pair.fit.unknown, unmet if pair.fit.unknown else ())


def proposal_json(pairs: tuple[Pair, ...], section: TableSection) -> dict[str, object]:
    """Give the proposal and the section `[table]` that it would make."""
    listed = []
    for pair in pairs:
        unknown, unmet = open_codes(pair)
        listed.append(
            {"column": pair.target.name, "kind": pair.target.kind, "own": pair.own, "why": pair.why,
             "share": pair.fit.share, "values": pair.fit.codes if pair.own is not None else {},
             "open_codes": unknown, "open_categories": unmet}
        )  # fmt: skip
    return {"columns": listed, "open": open_columns(pairs), "table": section.model_dump(mode="json", exclude_none=True)}


def open_columns(pairs: tuple[Pair, ...]) -> list[str]:
    """Name the columns of the schema for which nothing is proposed."""
    return [pair.target.name for pair in pairs if pair.own is None]


def with_open_lines(text: str, pairs: tuple[Pair, ...]) -> str:
    """Write into the text of `institution.toml`, as comments, what a person must still say."""
    columns = [
        f'# {toml_text(pair.target.name)} = ""   # OPEN: write your own column here and take the first # away'
        for pair in pairs if pair.own is None
    ]  # fmt: skip
    heading = "\n[table.columns]\n"
    if columns and heading in text:
        text = text.replace(heading, heading + "\n".join(columns) + "\n", 1)
    elif columns:
        text += "\n".join(["# [table.columns]   # take the # away here, too", *columns]) + "\n"
    for pair in pairs:
        unknown, unmet = open_codes(pair)
        if unknown:
            codes = ", ".join(map(toml_text, unknown[:_SHOWN])) + (", ..." if len(unknown) > _SHOWN else "")
            words = ", ".join(map(toml_text, unmet)) or "none"
            text += (
                f"# OPEN: [table.values.{toml_text(pair.target.name)}]: your codes {codes} are none of the plan's.\n"
                f"#   Of the plan's, these have no code yet: {words}\n"
            )
    return text


def _some(words: tuple[str, ...]) -> str:
    shown = ", ".join(f"'{word}'" for word in words[:_SHOWN])
    return f"{shown} and {len(words) - _SHOWN} more" if len(words) > _SHOWN else shown

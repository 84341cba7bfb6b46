"""`metarisk-client init --from`: propose how a bank's own table fits a plan, show it, and have a person confirm it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from metarisk_common.config import validate
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.files import sync_folder, write_new_private
from metarisk_common.plan import read_plan

from .config import CONFIG_FILE, institution_toml, load_institution
from .ledger_cli import print_table
from .proposal import Pair, propose, with_mapping
from .proposal_table import codes_told, open_columns, proposal_json, proposal_table, with_open_lines
from .setup import check_place, table_from
from .source_config import TableSection
from .table_sample import Sample, database_sample, table_sample


@dataclass(frozen=True)
class Asked:
    """How the command was said: `yes` takes what is proposed, `as_json` is for machines."""

    yes: bool
    as_json: bool


@dataclass(frozen=True)
class Place:
    """Where the table in the bank's own words is said to be: a file, or a database; all None where nothing is said."""

    file: Path | None = None
    url_env: str | None = None
    url_file: Path | None = None
    table: str | None = None
    query: str | None = None

    def sample(self, folder: Path) -> Sample:
        """Look at some rows of the table, for a bank's folder that need not be there yet.

        Raises:
            ConfigError: options are missing or exclude each other, or the database's URL is not there.
            DataError: the table cannot be read, or has fewer than two columns or no rows.

        """
        urls = [name for name, value in (("--url-env", self.url_env), ("--url-file", self.url_file)) if value]
        parts = [name for name, value in (("--table", self.table), ("--query", self.query)) if value]
        given = [*(["--from"] if self.file else []), *urls]
        if len(given) > 1:
            raise ConfigError(f"{given[0]}: says where the table is, and so does {given[1]}; leave one out")
        if not given or (self.file is not None and parts):
            raise ConfigError(f"{[*parts, '--url-env'][0]}: a database needs --url-env or --url-file, for its URL")
        if urls and len(parts) != 1:
            raise ConfigError(f"{urls[0]}: needs one of --table and --query: what to read in the database")
        if self.file is not None:
            return table_sample(self.file)
        file = None if self.url_file is None else str(self.url_file)
        values = {"url_env": self.url_env, "url_file": file, "table": self.table, "query": self.query}
        section = validate(values, TableSection, where="init")
        # A path on the command line is from where the command runs, one in the configuration from the folder.
        here = {} if file is None else {"url_file": str(Path(file).absolute())}
        return Sample(section, database_sample(folder, section.model_copy(update=here)))


@dataclass(frozen=True)
class Proposed:
    """How the table at a place would be read: the section, and what it was made from.

    `unordered`: the plan's privacy unit where a database holds the table, whose rows have no order by themselves.
    """

    section: TableSection
    pairs: tuple[Pair, ...]
    rows: int
    unordered: str | None = None

    @property
    def json(self) -> dict[str, object]:
        """The proposal for machines."""
        return proposal_json(self.pairs, self.section) | {"sample_rows": self.rows}


def proposal_of(folder: Path, place: Place, data: Path | None, plan: Path | None, asked: Asked) -> Proposed | None:
    """Propose how a table fits a plan and have it taken; where no place is said there is nothing to propose.

    Where the folder is there already, its configuration is changed and the command is done (`typer.Exit`).

    Raises:
        ConfigError: no plan is named, or it cannot be read; options exclude each other; or nobody can be asked.
        DataError: the table cannot be read, or no column of it is like any of the plan's.

    """
    if place == Place():
        if plan is not None:
            raise ConfigError("--plan: goes with --from, a table in your own words; to check a table, say check")
        return None
    if data is not None:
        raise ConfigError("--data: names the table, and so do --from, --url-env and --url-file; leave one out")
    there = (folder / CONFIG_FILE).is_file()
    if not there and (asked.yes or not asked.as_json):
        check_place(folder)
    found = _proposed(folder, place, plan)
    _confirm(found, asked)
    if not there:
        return found
    kept = take_table(folder, found)
    if asked.as_json:
        typer.echo(json.dumps({"folder": str(folder), "kept": str(kept), "proposal": found.json}))
    else:
        typer.echo(
            f"written: section [table] of {folder / CONFIG_FILE}; the file before it is kept as {kept}\n\n"
            f"Next: metarisk-client check {folder} --plan {plan}"
        )
    raise typer.Exit


def _proposed(folder: Path, place: Place, plan: Path | None) -> Proposed:
    """Look at a table's first rows and propose how it fits a plan."""
    if plan is None:
        raise ConfigError(
            "--plan: is missing: it says which columns to look for in the table. If there is none yet, name a file "
            "with --data now, and say this and --plan with the folder again when there is"
        )
    schema, sample = read_plan(plan).data, place.sample(folder)
    pairs = propose(schema, sample.cells)
    if len(open_columns(pairs)) == len(pairs):
        raise DataError(
            f"{sample.section.title}: no column is like any of the plan's {len(pairs)}; check that the first line "
            "of a file is a header, and that it is the right table. Nothing was made"
        )
    unit = None if sample.section.file is not None else schema.privacy_unit
    return Proposed(with_mapping(sample.section, pairs), pairs, sample.cells.height, unit)


def take_table(folder: Path, found: Proposed) -> Path:
    """Put a table in the bank's own words into a folder that is there already; the rest of what it says stays.

    Returns:
        the configuration as it was, kept beside the new one: comments of a person's own are in it alone.

    Raises:
        ConfigError: the configuration is wrong or of a simulation, or cannot be written.

    """
    institution = load_institution(folder)
    path = folder / CONFIG_FILE
    if institution.config.simulation is not None:
        raise ConfigError(f"{path}: is of a simulation, whose table is made for it")
    kept, new = path.with_name(f"{CONFIG_FILE}.old"), path.with_name(f".{CONFIG_FILE}.new")
    update = {"data": None, "table": table_from(found.section, folder.resolve())}
    text = with_open_lines(institution_toml(institution.config.model_copy(update=update)), found.pairs)
    try:
        for place, content in ((kept, path.read_bytes()), (new, text.encode())):
            place.unlink(missing_ok=True)
            write_new_private(place, content)
        new.replace(path)
        sync_folder(folder)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    return kept


def _confirm(found: Proposed, asked: Asked) -> None:
    """Show a proposal, and have a person take it; `--json` shows it, and takes it only with `--yes`."""
    if asked.as_json:
        if not asked.yes:
            typer.echo(json.dumps(found.json))
            raise typer.Exit
        return
    _show(found)
    if asked.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here; say --yes to take this proposal. Nothing was written")
    if not typer.confirm("Take this mapping? It can be edited in institution.toml at any time"):
        typer.echo("nothing was made")
        raise typer.Exit(1)


def _show(found: Proposed) -> None:
    section, still_open = found.section, open_columns(found.pairs)
    read, which = "", "its first" if section.file is not None else "some"
    if section.file is not None and section.file.lower().endswith(".csv"):
        sign = {"\t": "tabs", ",": "commas"}.get(section.separator, f"'{section.separator}'")
        read = f"; separated by {sign}, decimal {'commas' if section.decimal_comma else 'points'}"
    print_table(proposal_table(found.pairs, f"{section.title}: proposed from {which} {found.rows:,} rows{read}"))
    codes = codes_told(found.pairs)
    if codes:
        typer.echo("\nYour codes:")
    for line in codes:
        typer.echo(f"  {line}")
    if still_open:
        typer.echo(f"\nOpen, for you to fill in where {CONFIG_FILE} says OPEN: {', '.join(still_open)}")
    if found.unordered:
        typer.echo(
            f"\nThe plan takes the first records of each '{found.unordered}', and a database's rows have no order: "
            f"give [table] in {CONFIG_FILE} an order_by, such as the records' date"
        )
    typer.echo("\nLook at every line: a wrong column teaches the model something else. No row is shown or sent.")

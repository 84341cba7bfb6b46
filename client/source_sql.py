"""A bank's table in a database, read through SQLAlchemy in batches, in a transaction that can only read.

A database's own words may hold its address, its user or a row, so none is repeated: what failed is told apart by the
error's class and told in other words. The URL stays in local variables.
"""

import datetime as dt
import decimal
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import polars as pl
import sqlalchemy as sa
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from metarisk_common.errors import ConfigError, DataError
from metarisk_common.table import require_columns

from .source_config import Scalar, TableSection

BATCH_ROWS: Final = 16_384
_CONNECT_SECONDS: Final = 20
_LARGEST: Final = 2**63 - 1


def database_batches(folder: Path, table: TableSection, own: tuple[str, ...], where: str) -> Iterator[pl.DataFrame]:
    """Yield the `own` columns of a database's table or query, at most `BATCH_ROWS` rows at a time.

    The bank's filters are sent along where a column's kind and the values agree, which spares the transfer; they are
    applied to what comes back all the same. A database promises no order of rows but that of `order_by`.

    Raises:
        ConfigError: the URL is not there, or its file is open to others.
        DataError: the database cannot be reached or read, or lacks a column.

    """
    with _connected(folder, table, where) as connection:
        source = _source(table)
        names = list(connection.execute(sa.select(sa.text("*")).select_from(source).limit(0)).keys())
        require_columns(_no_rows(names), (*own, *table.order_by), where)
        chosen = source if table.query is None else _query(table, (*own, *table.order_by)).subquery("metarisk_rows")
        kinds = _kinds(connection, table)
        statement = sa.select(*(_column(chosen, name, kinds) for name in own)).select_from(chosen)
        statement = statement.where(*_conditions(kinds, table))
        statement = statement.order_by(*(_column(chosen, name, kinds) for name in table.order_by))
        result = connection.execution_options(yield_per=BATCH_ROWS).execute(statement)
        for rows in result.partitions():
            yield _frame(rows, own, where)


def database_rows(folder: Path, table: TableSection, where: str) -> int:
    """Count the rows of a database's table or query before the bank's filters.

    Raises:
        ConfigError: as for `database_batches`.
        DataError: likewise.

    """
    with _connected(folder, table, where) as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(_source(table))).scalar_one())


def database_head(folder: Path, table: TableSection, rows: int, where: str) -> pl.DataFrame:
    """Read some rows of a database's table or query with all columns that have cells; none in its order.

    Left out are columns of lists, structures and binary values, and those whose name stands twice.

    Raises:
        ConfigError: as for `database_batches`.
        DataError: likewise.

    """
    with _connected(folder, table, where) as connection:
        source = _source(table)
        found = list(connection.execute(sa.select(sa.text("*")).select_from(source).limit(0)).keys())
        names = [name for name in found if found.count(name) == 1]
        chosen = source if table.query is None else _query(table, tuple(names)).subquery("metarisk_rows")
        kinds = _kinds(connection, table)
        statement = sa.select(*(_column(chosen, name, kinds) for name in names)).select_from(chosen).limit(rows)
        cells = list(zip(*connection.execute(statement).all(), strict=True)) or [() for _ in names]
    series = []
    for name, column in zip(names, cells, strict=True):
        with suppress(DataError):
            series.append(_series(name, list(column), where))
    return pl.DataFrame(series)


@contextmanager
def _connected(folder: Path, table: TableSection, where: str) -> Iterator[sa.Connection]:
    """Connect for reading alone: whatever a query tries to write, the database itself refuses."""
    engine = _engine(_url(folder, table), folder, where)
    try:
        with _told(where, "cannot be reached; check the URL's host, port, user and password"):
            connection = engine.connect().execution_options(**_read_only(engine))
        with connection, _told(where, f"cannot be read; check that it is there and that the user may read {where}"):
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA query_only = ON")
            yield connection
    finally:
        engine.dispose()


def read_url(path: Path) -> str:
    """Read a database's URL from a file that only its owner may read.

    Raises:
        ConfigError: it is not there, belongs to another user, or is open to others.

    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as the file of the database's URL: {error.strerror}") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: is no file; the database's URL must stand in one")
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"{path}: belongs to another user; the file of the database's URL must be this user's own"
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(f"{path}: is open to other users, and holds a password; say: chmod 600 {path}")
        with open(handle, encoding="utf-8", closefd=False) as file:
            return file.read().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; it must hold the database's URL and nothing else") from None
    finally:
        os.close(handle)


def _url(folder: Path, table: TableSection) -> str:
    if table.url_file is not None:
        return read_url(folder / table.url_file)
    url = os.environ.get(str(table.url_env), "")
    if not url:
        raise ConfigError(f"{table.url_env}: set this variable of the environment to the database's URL")
    return url


def _engine(text: str, folder: Path, where: str) -> sa.Engine:
    try:
        url = sa.make_url(text)
        if url.get_backend_name() == "sqlite" and url.database:
            file = folder / url.database
            if not file.is_file():  # SQLite would make an empty one.
                raise DataError(f"{where}: there is no such SQLite file; check the path in the database's URL")
            url = url.set(database=str(file))
        waits = {"connect_timeout": _CONNECT_SECONDS} if url.get_backend_name() == "postgresql" else {}
        return sa.create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=waits)
    except (NoSuchModuleError, ImportError):
        message = "the URL names a database whose driver is not installed; PostgreSQL is postgresql+psycopg://..."
    except (SQLAlchemyError, ValueError, TypeError):
        message = "the URL cannot be understood; it must be like postgresql+psycopg://user:password@host:5432/name"
    raise DataError(f"{where}: {message}") from None


def _read_only(engine: sa.Engine) -> dict[str, Any]:
    # One snapshot for all batches, in which nothing can be written.
    postgresql = {"postgresql_readonly": True, "isolation_level": "REPEATABLE READ"}
    return postgresql if engine.dialect.name == "postgresql" else {}


@contextmanager
def _told(where: str, otherwise: str) -> Iterator[None]:
    """Say in our own words what a database or its driver raised."""
    try:
        yield
    except (SQLAlchemyError, OSError, UnicodeError, ValueError, ArithmeticError):
        raise DataError(f"{where}: {otherwise}") from None


def _source(table: TableSection) -> sa.FromClause:
    if table.table is None:
        return _query(table, ()).subquery("metarisk_rows")
    schema, _, name = table.table.rpartition(".")
    return sa.table(name, schema=schema or None)


def _query(table: TableSection, names: tuple[str, ...]) -> sa.TextualSelect:
    # A colon is a parameter to SQLAlchemy, and in a bank's query it is not.
    text = str(table.query).strip().rstrip(";").replace(":", "\\:")
    return sa.text(text).columns(*(sa.column(name) for name in dict.fromkeys(names)))


def _column(source: sa.FromClause, name: str, kinds: dict[str, Any]) -> sa.ColumnElement[Any]:
    if name in source.c:
        return source.c[name]
    # Some databases have no booleans but 0 and 1, which only the table's definition tells apart from numbers.
    return sa.column(name, sa.Boolean()) if isinstance(kinds.get(name), sa.Boolean) else sa.column(name)


def _kinds(connection: sa.Connection, table: TableSection) -> dict[str, Any]:
    """Tell of what kind each column of a table is; of a query nothing is known."""
    if table.table is None:
        return {}
    schema, _, name = table.table.rpartition(".")
    return {
        column["name"]: column["type"] for column in sa.inspect(connection).get_columns(name, schema=schema or None)
    }


def _no_rows(names: list[str]) -> pl.DataFrame:
    return pl.DataFrame(schema=dict.fromkeys(names, pl.String))


def _conditions(kinds: dict[str, Any], table: TableSection) -> Iterator[sa.ColumnElement[bool]]:
    """Give conditions that keep no fewer rows than the bank's filters do."""
    for own, values in table.where.items():
        side = _comparable(own, kinds.get(own), values)
        if side is not None:
            yield side.in_(values)
    for own, bounds in table.between.items():
        # Text is compared here only: databases sort it by the customs of a country.
        if all(_is_number(bound) for bound in bounds):
            side = _comparable(own, kinds.get(own), bounds)
            if side is not None:
                yield side.between(*bounds)


def _comparable(name: str, kind: Any, values: tuple[Scalar, ...]) -> sa.ColumnElement[Any] | None:  # noqa: ANN401 - a type of SQLAlchemy's
    if isinstance(kind, (sa.Integer, sa.Numeric)) and all(map(_is_number, values)):
        return sa.column(name)
    if isinstance(kind, sa.String) and all(isinstance(value, str) for value in values):
        return sa.func.rtrim(sa.column(name))
    return None


def _is_number(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _frame(rows: Any, own: tuple[str, ...], where: str) -> pl.DataFrame:  # noqa: ANN401 - rows of SQLAlchemy's
    cells = zip(*rows, strict=True)
    return pl.DataFrame([_series(name, list(column), where) for name, column in zip(own, cells, strict=True)])


def _series(name: str, cells: list[Any], where: str) -> pl.Series:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds <= {int} and all(cell is None or abs(cell) <= _LARGEST for cell in cells):
        return pl.Series(name, cells, dtype=pl.Int64 if kinds else pl.Null)
    for kind, dtype in ((float, pl.Float64), (bool, pl.Boolean), (str, pl.String)):
        if kinds == {kind}:
            return pl.Series(name, cells, dtype=dtype)
    return pl.Series(name, [None if cell is None else _text(cell, name, where) for cell in cells], dtype=pl.String)


def _text(cell: Any, name: str, where: str) -> str:  # noqa: ANN401 - whatever a database holds
    """Write a cell as a CSV file would hold it."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, dt.datetime):
        return cell.isoformat(sep=" ")
    if isinstance(cell, (dt.date, dt.time)):
        return cell.isoformat()
    if isinstance(cell, decimal.Decimal):
        return f"{cell:f}"
    if isinstance(cell, (int, float, str, UUID)):
        return str(cell)
    raise DataError(
        f"{where}: column '{name}' holds lists, structures or binary values; convert the column in the table"
    )

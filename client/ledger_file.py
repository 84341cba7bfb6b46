"""The SQLite side of the ledger: its tables, its connections, and SQLite's errors in words that help."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from metarisk_common.files import sync_folder

from .chain import Row
from .signing import head_path, key_path, load_key, make_key

SCHEMA: Final = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL) STRICT",
    "CREATE TABLE signatures (seq INTEGER PRIMARY KEY, signature TEXT NOT NULL) STRICT",
    """CREATE TABLE outbox
    (run_id TEXT NOT NULL, kind TEXT NOT NULL, seq INTEGER NOT NULL, report BLOB NOT NULL, PRIMARY KEY (run_id, kind))
    STRICT""",
    # The last one of each table: INSERT OR REPLACE would delete without asking the one before.
    *(
        f"CREATE TRIGGER {table}_{name} BEFORE {condition} BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for table in ("entries", "signatures")
        for name, condition in (
            ("no_update", f"UPDATE ON {table}"),
            ("no_delete", f"DELETE ON {table}"),
            ("in_order", f"INSERT ON {table} WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), -1) + 1 FROM {table})"),  # noqa: S608 - the tables are named here
        )
    ),
)
"""Every table and trigger of a ledger, in the very words that SQLite keeps of it."""

_BUSY_SECONDS: Final = 30.0
_NOT_ALLOWED: Final = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
_HELD: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DISK: Final = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Connect without any right to change the file or its log; not even closing the connection does."""
    try:
        return _connect(path, "mode=ro")
    except sqlite3.OperationalError as error:
        # SQLite wants to write beside the file even to read it. An archived copy on a medium that cannot be written
        # is whole without that, if no log belongs to it.
        if _code(error) not in _NOT_ALLOWED or _log_path(path).exists():
            raise
    return _connect(path, "mode=ro&immutable=1")


def connect_to_write(path: Path) -> sqlite3.Connection:
    """Connect to a file that exists: SQLite must not make one, for an empty ledger would have forgotten everything."""
    return _connect(path, "mode=rw")


def append(db: sqlite3.Connection, row: Row) -> None:
    """Insert an entry and its signature, within the caller's transaction."""
    seq, body, digest, signature = row
    db.execute("INSERT INTO entries VALUES (?, ?, ?)", (seq, body, digest))
    db.execute("INSERT INTO signatures VALUES (?, ?)", (seq, signature))


def rows_from(db: sqlite3.Connection, seq: int) -> Iterator[Row]:
    """Read the entries from `seq` on, in order, each with its signature."""
    return db.execute(
        "SELECT seq, body, digest, signature FROM entries LEFT JOIN signatures USING (seq) WHERE seq >= ? ORDER BY seq",
        (seq,),
    )


def has_schema(db: sqlite3.Connection) -> bool:
    """Tell whether every table and trigger is there, in the very words of `SCHEMA`, and none besides."""
    return {row[0] for row in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")} == set(SCHEMA)


def create(path: Path, first_row: Callable[[Ed25519PrivateKey], Row]) -> None:
    """Write a new ledger beside its place, complete, and link it in: no half-made ledger is ever seen.

    Its key comes before it. Should the process end between the two, or another one be quicker, that key counts.

    Raises:
        ConfigError: it cannot be created here.
        IntegrityError: something here says that there was a ledger.

    """
    for trace, what in ((_log_path(path), "write-ahead log"), (head_path(path), "signed head")):
        if trace.exists():
            raise IntegrityError(f"{path}: is gone but its {what} is not; restore the newest copy of the ledger")
    try:
        with TemporaryDirectory(prefix=".ledger-", dir=path.parent) as folder:
            place = key_path(path)
            make_key(Path(folder) / "key")
            with suppress(FileExistsError):
                os.link(Path(folder) / "key", place)
            sync_folder(place.parent)
            row = first_row(load_key(place))
            draft = Path(folder) / "ledger"
            draft.touch(mode=0o600, exist_ok=False)
            with naming(path), closing(connect_to_write(draft)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                for statement in SCHEMA:
                    db.execute(statement)
                append(db, row)
                db.execute("COMMIT")
            # Another process may have been quicker; then its ledger counts, and is checked like any other.
            with suppress(FileExistsError):
                os.link(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: a ledger cannot be created here: {error.strerror}") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, with the file's name and the way out, and name it in those of the chain."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # Misuse by this program, such as a closed connection, says nothing about the file.
    except IntegrityError as error:
        text = str(error)
        named = any(text.startswith(f"{name}: ") for name in (path, key_path(path), head_path(path)))
        raise IntegrityError(text if named else f"{path}: {text}") from None
    except (sqlite3.Error, UnicodeDecodeError) as error:  # The latter: SQLite's message quotes what it cannot read.
        raise _in_words(path, error) from None


def _in_words(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> MetariskError:
    code = _code(error)
    if code in _NOT_ALLOWED:
        return ConfigError(f"{path}: {error}; this user must be allowed to write the file, its folder and its log")
    if code in _HELD:
        return MetariskError(f"{path}: another process has held the ledger for {_BUSY_SECONDS:g} seconds; try again")
    if code in _DISK:
        return MetariskError(
            f"{path}: could not be written or read: {error}; nothing recorded before is lost; see to room on the disk "
            "and its health, and try again"
        )
    reason = "its text is garbled" if isinstance(error, UnicodeDecodeError) else str(error)
    return IntegrityError(f"{path}: is not a ledger, or is damaged: {reason}; restore its newest copy")


def _code(error: Exception) -> int:
    """Give SQLite's primary result code; an error of Python's own has none."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def _log_path(path: Path) -> Path:
    target = path.resolve()  # as SQLite does
    return target.with_name(f"{target.name}-wal")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # Whatever keeps SQLite from the file shows now.
    except BaseException:
        db.close()
        raise
    return db

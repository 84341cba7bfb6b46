"""One ledger's file under guard: what is read from it is checked, what is written to it is signed.

Beside the file stand its private key and the head file, which names its newest entry. The order of writing makes them
safe to lose power between: an entry and its signature in one transaction, and only then the head. So the head may be
behind, which the next writing mends, but never ahead, unless the ledger has lost entries.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarisk_common.errors import IntegrityError

from .chain import Entry, State, next_row, parse
from .ledger_file import append, connect_to_read, connect_to_write, has_schema, naming, rows_from
from .signing import FORMAT, Head, damaged_head, head_path, is_signed, key_path, load_key, read_head, write_head


class SignedFile:
    """An open ledger's file, and the state that follows from its entries. For one thread."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Connect and check everything but the older entries' own signatures.

        Raises:
            ConfigError: the ledger, or to write it, its key, may not be read or written by this user.
            IntegrityError: there is no ledger, it is not as it was written or older than its head; or, to write it,
                its head is missing, or its key missing, damaged or another's.

        """
        self.path = path
        self._writable = writable
        self._head_path = head_path(path)
        self._known: Head | None = None  # The head file's content that was last found in the chain, which only grows.
        self._state = State()
        if not path.is_file():
            raise IntegrityError(f"{path}: there is no ledger")
        if path.stat().st_size == 0:  # SQLite would take it for new, and delete its log.
            raise IntegrityError(f"{path}: is not a ledger: the file is empty; restore its newest copy")
        # First without any right to write: a ledger that is refused is left as it was found, its log included.
        with naming(path):
            self._db = connect_to_read(path)
        try:
            self.verify(every_signature=False)
            if writable:
                self._key = load_key(key_path(path), self._state.public_key)
                self._db.close()
                with naming(path):
                    self._db = connect_to_write(path)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; what was recorded is on disk already."""
        self._db.close()

    def current(self) -> State:
        """Give the state that follows from all entries, those that other processes have written included."""
        self._follow(self._state)
        return self._state

    def verify(self, *, every_signature: bool = True) -> None:
        """Check the file from its first entry to its last, and the head file if there is one.

        Raises:
            IntegrityError: naming the first thing that is wrong.

        """
        fresh = State()
        head = read_head(self._head_path)  # First: the ledger may grow meanwhile, and is never behind its head.
        with naming(self.path):
            if not has_schema(self._db):
                raise IntegrityError(self._why_no_ledger())
            self._follow(fresh, every_signature=every_signature)
            if fresh.newest is None:
                raise IntegrityError("the ledger has no entries; restore its newest copy")
            known = self._state.newest
            if known is not None and not fresh.holds(known.seq, known.digest):
                raise IntegrityError(f"entry {known.seq} is no longer what it was; restore the newest copy")
            self._check_head(head, fresh)
        self._state, self._known = fresh, head

    @contextmanager
    def transaction(self) -> Iterator[State]:
        """Hold the ledger alone, up to date; commit at the end, or leave no trace of what failed.

        When it is over, the head file names the newest entry.
        """
        if not self._writable:
            raise ValueError("this ledger was opened for reading")
        with self._alone() as state:
            yield state
        # Only what is committed is believed, and from then on it must still be there.
        if self._known != self.current().newest:
            # Under the lock again, so that of two processes the one behind never writes the head last.
            with self._alone() as state:
                self._write_head(state)

    def append(self, kind: str, content: dict[str, Any], now: float | None) -> Entry:
        """Write the next entry, signed, within a transaction.

        Raises:
            IntegrityError: the clock stands before the newest entry.

        """
        row = next_row(self._state, self._key, kind, content, self.moment(now))
        append(self._db, row)
        return parse(*row[:3])

    def moment(self, now: float | None) -> float:
        """Give the time in seconds since 1970: the clock's, if none is given.

        Raises:
            IntegrityError: the clock stands before the newest entry.

        """
        time_seconds = time.time() if now is None else now
        self._state.check_clock(time_seconds)
        return time_seconds

    def keep_report(self, run_id: str, kind: str, seq: int, report: bytes) -> None:
        """Put the report that entry `seq` released in place of its run's last, within a transaction."""
        self._db.execute("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?)", (run_id, kind, seq, report))

    def kept_report(self, run_id: str, kind: str, seq: int) -> bytes | None:
        """Give the report that entry `seq` released, if it is the last of its run."""
        query = "SELECT report FROM outbox WHERE run_id = ? AND kind = ? AND seq = ?"
        with naming(self.path):
            row = self._db.execute(query, (run_id, kind, seq)).fetchone()
        return None if row is None else bytes(row[0])

    def _follow(self, state: State, *, every_signature: bool = False) -> None:
        """Bring a state up to date with the file."""
        with naming(self.path):
            state.follow(rows_from(self._db, max(state.count - 1, 0)), every_signature=every_signature)

    @contextmanager
    def _alone(self) -> Iterator[State]:
        with naming(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._follow(self._state)
                head = read_head(self._head_path)
                self._check_head(head, self._state)
                self._known = head
                if head is None:  # Nobody has written it since the ledger was created.
                    self._write_head(self._state)
                yield self._state
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _check_head(self, head: Head | None, state: State) -> None:
        """Refuse a ledger that lacks the entry which its head file names."""
        if head is None:
            if self._writable and state.count > 1:
                raise IntegrityError(
                    f"{self._head_path}: the ledger's signed head is missing; put back a copy of it, of which any of "
                    "this ledger's will do"
                )
            return
        if head == self._known:
            return
        if head.source != state.source or not is_signed(state.public_key, head):
            raise damaged_head(self._head_path)
        if not state.holds(head.seq, head.digest):
            how = "is older than" if head.seq >= state.count else "went another way than"
            raise IntegrityError(
                f"{how} its signed head, which names entry {head.seq}; restore the newest copy, with its '-wal' file"
            )

    def _write_head(self, state: State) -> None:
        if state.newest is not None and state.newest != self._known:
            write_head(self._head_path, state.newest)
            self._known = state.newest

    def _why_no_ledger(self) -> str:
        """Tell an older format from a file that is no ledger at all."""
        try:
            row = self._db.execute("SELECT seq, body, digest FROM entries WHERE seq = 0").fetchone()
            found = parse(*row).content["format"]
        except (sqlite3.Error, ValueError, TypeError, KeyError):
            found = None
        if isinstance(found, str) and found != FORMAT:
            return f"is of the format '{found}', this version knows '{FORMAT}'; use the version that wrote it"
        return "is not a ledger, or its tables and triggers were changed; restore the newest copy"

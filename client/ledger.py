"""The bank's privacy ledger: an append-only, hash-chained record of every private release, in one SQLite file.

A release is reserved before a record is read, and charged by that alone. The rules that keep the record honest:

* One reservation, at most one output, ever. Retrying a reserved order gives back the same reservation, because
  nothing left the bank under it; once released, only the stored bytes may be sent again, which releases nothing new.
  So however often a process dies, what left the bank is never more than what was charged.
* Nothing is refunded: an abandoned reservation stays charged.
* Each entry holds the SHA-256 of the one before it, over everything it says and a random salt, so that a changed or
  missing entry shows, and a digest that leaves the bank as a receipt tells nothing about the entry's time.
* The budget is a filter: an event that would pass it is refused and not written. Epsilons never fall, so what was
  refused once stays refused for as long as the budget stands.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, Self

from metarisk_common.errors import BudgetExhaustedError, ConfigError, IntegrityError
from metarisk_common.privacy import PrivacyEvent, epsilon, within

from .chain import FORMAT, Budget, Entry, OrderKey, Reservation, State, budget_to_json, next_row, parse

__all__ = ["Budget", "Entry", "Ledger", "OrderKey", "Reservation"]

_BUSY_SECONDS: Final = 30.0
_INSERT: Final = "INSERT INTO entries VALUES (?, ?, ?)"
_ROUNDING: Final = 1e-9  # What a budget may be passed by: a calibrated plan meets its target to the last bit.

_SCHEMA: Final = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL) STRICT",
    "CREATE TABLE outbox (run_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, report BLOB NOT NULL) STRICT",
    # The last one: INSERT OR REPLACE would delete without asking the one before.
    *(
        f"CREATE TRIGGER entries_{name} BEFORE {condition} BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for name, condition in (
            ("no_update", "UPDATE ON entries"),
            ("no_delete", "DELETE ON entries"),
            ("in_order", "INSERT ON entries WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), -1) + 1 FROM entries)"),
        )
    ),
)


class Ledger:
    """A ledger that is open: the module's docstring says what it guarantees. A context manager, for one thread."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Connect and check everything; use `open` or `read`."""
        self._path = path
        self._writable = writable
        self._state = State()
        if not path.is_file():
            raise IntegrityError(f"{path}: there is no ledger")
        with _naming(path):
            self._db = _connect(path, "rw" if writable else "ro")
        try:
            self.verify()
        except BaseException:
            self._db.close()
            raise

    @classmethod
    def open(cls, path: Path, *, source: str, budget: Budget, allow_increase: bool = False) -> Self:
        """Open the ledger of a data source, and create it where there is none.

        A budget with less epsilon than the ledger's is taken over at once, one with more only with `allow_increase`:
        a change of policy. Either is recorded.

        Raises:
            ConfigError: another source, another delta, or more epsilon without `allow_increase`; nothing was written.
            IntegrityError: the file is no ledger, or not as it was written.

        """
        if not source:
            raise ValueError("source must name the data")
        if not path.exists():
            _create(path, source, budget)
        ledger = cls(path, writable=True)
        try:
            ledger._adopt(source, budget, allow_increase=allow_increase)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open an existing ledger to look at it; nothing can be written.

        Raises:
            IntegrityError: there is none, or it is not as it was written.

        """
        return cls(path, writable=False)

    def __enter__(self) -> Self:
        """Give the ledger itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was recorded is on disk already."""
        self._db.close()

    def reserve(self, key: OrderKey, event: PrivacyEvent, *, now: float | None = None) -> Reservation:
        """Charge an event before its records are read; it is on disk when this returns.

        A round that is reserved already, for the same order and event, gives the same reservation and costs nothing.

        Raises:
            BudgetExhaustedError: the event would pass the budget; nothing was written.
            RefusedError: the round was released or abandoned (code "replayed"), or reserved for a different order or
                event (code "conflict").
            IntegrityError: the ledger is not as it was written.

        """
        with self._transaction() as state:
            if turn := state.turns.get((key.run_id, key.round)):
                return turn.again(key, event)
            budget = state.budget
            if not within([*state.merged(), event], budget.delta, budget.epsilon * (1 + _ROUNDING)):
                raise BudgetExhaustedError(
                    f"{self._path}: this event would pass the budget of epsilon {budget.epsilon:g} at delta "
                    f"{budget.delta:g} for '{state.source}', of which {epsilon(state.merged(), budget.delta):.4g} is "
                    "spent; only a change of the bank's policy can allow more"
                )
            entry = self._append("reserve", {"key": asdict(key), "event": asdict(event)}, now)
        return Reservation(entry.seq, key, event, entry.digest)

    def release(self, reservation: Reservation, report: bytes, *, now: float | None = None) -> str:
        """Record that this report is the reservation's one output, and keep it for sending again.

        The outbox keeps the newest report of each run. Send the report only after this has returned.

        Returns:
            the receipt: the digest of the new entry, hexadecimal.

        Raises:
            RefusedError: the reservation was used already (code "replayed") or is not this ledger's ("conflict").
            IntegrityError: the ledger is not as it was written.

        """
        with self._transaction() as state:
            state.turn_of(reservation).again(reservation.key, reservation.event)
            content = {"reserved": reservation.seq, "report_sha256": hashlib.sha256(report).hexdigest()}
            entry = self._append("release", content, now)
            self._db.execute(
                "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?)", (reservation.key.run_id, entry.seq, report)
            )
        return entry.digest

    def abandon(self, reservation: Reservation, *, now: float | None = None) -> None:
        """Record that nothing will be released under this reservation; it stays charged.

        Raises:
            RefusedError: the reservation was used already (code "replayed") or is not this ledger's ("conflict").
            IntegrityError: the ledger is not as it was written.

        """
        with self._transaction() as state:
            state.turn_of(reservation).again(reservation.key, reservation.event)
            self._append("abandon", {"reserved": reservation.seq}, now)

    def released_report(self, key: OrderKey) -> bytes | None:
        """Give the report that was released for exactly this order, if it is the newest of its run, else None.

        Raises:
            IntegrityError: the stored report is not the one that was released.

        """
        turn = self._current().turns.get((key.run_id, key.round))
        if turn is None or turn.reservation.key != key or turn.state != "released":
            return None
        with _naming(self._path):
            row = self._db.execute("SELECT seq, report FROM outbox WHERE run_id = ?", (key.run_id,)).fetchone()
        if row is None or row[0] != turn.ended:
            return None
        report = bytes(row[1])
        if hashlib.sha256(report).hexdigest() != turn.report_sha256:
            raise IntegrityError(f"{self._path}: the stored report of entry {turn.ended} is not the one released")
        return report

    @property
    def source(self) -> str:
        """The data source whose records this ledger protects."""
        return self._current().source

    @property
    def budget(self) -> Budget:
        """The budget in force."""
        return self._current().budget

    @property
    def counter(self) -> int:
        """How many entries there are; it only ever grows."""
        return self._current().count

    @property
    def head(self) -> str:
        """The digest of the newest entry, hexadecimal."""
        return self._current().head

    def spent(self) -> float:
        """Give the epsilon of all that was ever reserved, at the budget's delta."""
        state = self._current()
        return epsilon(state.merged(), state.budget.delta)

    def events(self) -> list[PrivacyEvent]:
        """List every event that was reserved, in order."""
        return [turn.reservation.event for turn in self._current().turns.values()]

    def entries(self) -> list[Entry]:
        """List every entry, oldest first."""
        with _naming(self._path):
            return [parse(*row) for row in self._db.execute("SELECT seq, body, digest FROM entries ORDER BY seq")]

    def verify(self) -> None:
        """Check the file from its first entry to its last.

        Raises:
            IntegrityError: naming the first thing that is wrong.

        """
        fresh = State()
        with _naming(self._path):
            found = {row[0] for row in self._db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
            if found != set(_SCHEMA):
                raise IntegrityError(f"{self._path}: is not a ledger, or its tables and triggers were changed")
            self._follow(fresh)
        if fresh.count == 0:
            raise IntegrityError(f"{self._path}: the ledger has no entries; restore it from a copy")
        self._follow(self._state)
        self._state = fresh

    def _current(self) -> State:
        self._follow(self._state)
        return self._state

    def _follow(self, state: State) -> None:
        """Bring a state up to date with the file."""
        with _naming(self._path):
            query = "SELECT seq, body, digest FROM entries WHERE seq >= ? ORDER BY seq"
            state.follow(self._db.execute(query, (state.count - 1,)))

    @contextmanager
    def _transaction(self) -> Iterator[State]:
        """Hold the ledger alone, up to date; commit at the end, or leave no trace of what failed."""
        if not self._writable:
            raise ValueError("this ledger was opened for reading")
        with _naming(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._follow(self._state)
                yield self._state
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            # Only what is committed is believed, and from then on it must still be there.
            self._follow(self._state)

    def _append(self, kind: str, content: dict[str, Any], now: float | None) -> Entry:
        row = next_row(self._state, kind, content, time.time() if now is None else now)
        self._db.execute(_INSERT, row)
        return parse(*row)

    def _adopt(self, source: str, budget: Budget, *, allow_increase: bool) -> None:
        state = self._current()
        if state.source != source:
            raise ConfigError(f"{self._path}: is the ledger of '{state.source}', not of '{source}'")
        if state.budget.delta != budget.delta:
            raise ConfigError(
                f"{self._path}: was created with delta {state.budget.delta:g}, which stays; not {budget.delta:g}"
            )
        with self._transaction() as state:
            if budget.epsilon > state.budget.epsilon and not allow_increase:
                raise ConfigError(
                    f"{self._path}: the ledger's budget is epsilon {state.budget.epsilon:g}, the configuration says "
                    f"{budget.epsilon:g}; raising it is a change of policy that must be asked for expressly"
                )
            if budget != state.budget:
                self._append("budget", budget_to_json(budget), None)


def _connect(path: Path, mode: Literal["rw", "ro"]) -> sqlite3.Connection:
    # The mode keeps SQLite from creating a file: an empty ledger would have forgotten everything.
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one that names the file, and name it in those of the chain."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # Misuse by this program, such as a closed connection, says nothing about the file.
    except IntegrityError as error:
        text = str(error)
        raise IntegrityError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    except sqlite3.Error as error:
        raise IntegrityError(f"{path}: is not a ledger, or cannot be used as one: {error}") from None


def _create(path: Path, source: str, budget: Budget) -> None:
    """Write a new ledger beside its place, complete, and link it in: no half-made ledger is ever seen."""
    if path.with_name(f"{path.name}-wal").exists():
        raise IntegrityError(f"{path}: is gone but its write-ahead log is not; restore the ledger from a copy")
    try:
        with TemporaryDirectory(prefix=".ledger-", dir=path.parent) as folder:
            draft = Path(folder) / "ledger"
            draft.touch(mode=0o600, exist_ok=False)
            with _naming(path), closing(_connect(draft, "rw")) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    db.execute(statement)
                content = {"format": FORMAT, "source": source, "budget": budget_to_json(budget)}
                db.execute(_INSERT, next_row(State(), "create", content, time.time()))
                db.execute("COMMIT")
            # Another process may have been quicker; then its ledger counts, and is checked like any other.
            with suppress(FileExistsError):
                os.link(draft, path)
        folder_handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder_handle)
        finally:
            os.close(folder_handle)
    except OSError as error:
        raise ConfigError(f"{path}: a ledger cannot be created here: {error.strerror}") from None

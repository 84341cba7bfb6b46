"""The bank's privacy ledger: an append-only, hash-chained, signed record of every private release, in one SQLite file.

A release is reserved before a record is read, and charged by that alone. The rules that keep the record honest:

* One reservation, at most one output, ever. Retrying a reserved order gives back the same reservation, because
  nothing left the bank under it; once released, only the stored bytes may be sent again, which releases nothing new.
  So however often a process dies, what left the bank is never more than what was charged.
* Nothing is refunded: an abandoned reservation stays charged.
* Each entry holds the SHA-256 of the one before it, over everything it says and a random salt, so that a changed or
  missing entry shows, and a digest that leaves the bank as a receipt tells nothing about the entry's time.
* Each entry is signed, and the newest signature is kept beside the file: one that lost its end is refused. An older
  copy of both is told by what servers last heard of it (`check_echo`).
* The budget is a filter: an event that would pass it is refused and not written. Epsilons never fall, so what was
  refused once stays refused for as long as the budget stands. An approved plan's own cap is a filter of the same kind.
"""

import hashlib
import time
from pathlib import Path
from typing import Final, Self

from metarisk_common.errors import BudgetExhaustedError, ConfigError, IntegrityError
from metarisk_common.privacy import PrivacyEvent, epsilon, within

from .chain import Approval, Budget, Entry, OrderKey, Reservation, budget_to_json, first_row, reserve_to_json
from .ledger_file import create
from .signed_file import SignedFile
from .signing import fingerprint

__all__ = ["Approval", "Budget", "Entry", "Ledger", "OrderKey", "Reservation"]

_ROUNDING: Final = 1e-9  # What a budget may be passed by: a calibrated plan meets its target to the last bit.
_NEWEST: Final = "restore the newest copy"


class Ledger:
    """A ledger that is open: the module's docstring says what it guarantees. A context manager, for one thread."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Connect and check everything; use `open` or `read`."""
        self._path = path
        self._writable = writable
        self._file = SignedFile(path, writable=writable)

    @classmethod
    def open(
        cls, path: Path, *, source: str, budget: Budget, allow_increase: bool = False, now: float | None = None
    ) -> Self:
        """Open the ledger of a data source, and create it, with its key, where there is none.

        A budget with less epsilon than the ledger's is taken over at once, one with more only with `allow_increase`:
        a change of policy. Either is recorded.

        Raises:
            ConfigError: another source, another delta, or more epsilon without `allow_increase`, and nothing was
                written; or the ledger or its key may not be read or written.
            IntegrityError: the file is no ledger, not as it was written, or older than its signed head; its key is
                missing or another's; or the clock stands before its last entry.

        """
        if not source:
            raise ValueError("source must name the data")
        if not path.exists():
            create(path, lambda key: first_row(key, source, budget, time.time() if now is None else now))
        ledger = cls(path, writable=True)
        try:
            ledger._adopt(source, budget, allow_increase=allow_increase, now=now)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open an existing ledger to look at it; nothing can be written, and no key is needed.

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
        self._file.close()

    def approve(
        self,
        plan_hash: str,
        *,
        epsilon: float | None = None,
        until_seconds: float | None = None,
        now: float | None = None,
    ) -> Approval:
        """Consent to answer orders under a plan, in place of what was approved of it before; on disk on return.

        `epsilon` caps the plan's own events at the ledger's delta, within the ledger's budget, which it never raises;
        `until_seconds` (since 1970, UTC) ends it. The same terms as those in place write nothing.

        Raises:
            IntegrityError: the ledger is not as it was written, or the clock stands before its last entry.

        """
        content = {"plan_hash": plan_hash, "epsilon": epsilon, "until_seconds": until_seconds}
        with self._file.transaction() as state:
            approval = Approval(plan_hash, epsilon, until_seconds, state.count)
            standing = state.approvals.get(plan_hash)
            if standing and (standing.epsilon, standing.until_seconds) == (epsilon, until_seconds):
                return standing
            self._file.append("approve", content, now)
        return approval

    def revoke(self, plan_hash: str, *, now: float | None = None) -> None:
        """Take an approval back: nothing more may be released under the plan, reserved or not.

        Raises:
            ConfigError: the plan is not approved.
            IntegrityError: the ledger is not as it was written, or the clock stands before its last entry.

        """
        with self._file.transaction() as state:
            if plan_hash not in state.approvals:
                raise ConfigError(f"{self._path}: plan '{plan_hash}' is not approved; there is nothing to revoke")
            self._file.append("revoke", {"plan_hash": plan_hash}, now)

    def approvals(self) -> dict[str, Approval]:
        """Give the newest approval of each plan, expired ones among them; those revoked are left out."""
        return dict(self._file.current().approvals)

    def reserve(self, key: OrderKey, event: PrivacyEvent, *, now: float | None = None) -> Reservation:
        """Charge an event before its records are read; it is on disk when this returns.

        A turn that is reserved already, for the same order and event, gives the same reservation and costs nothing.

        Raises:
            BudgetExhaustedError: the event would pass the budget, or its plan's own cap; nothing was written.
            RefusedError: the plan is not approved, or no longer (code "plan"); the turn was released or abandoned
                (code "replayed"), or reserved for a different order or event (code "conflict").
            IntegrityError: the ledger is not as it was written, or the clock stands before its last entry.

        """
        with self._file.transaction() as state:
            approval = state.approval_of(key.plan_hash, self._file.moment(now))
            if turn := state.turns.get(key.turn):
                return turn.again(key, event)
            if approval.epsilon is not None:
                self._check_within(event, approval.epsilon, key.plan_hash)
            self._check_within(event, state.budget.epsilon, None)
            entry = self._file.append("reserve", reserve_to_json(key, event), now)
        return Reservation(entry.seq, key, event, entry.digest)

    def release(self, reservation: Reservation, report: bytes, *, now: float | None = None) -> str:
        """Record that this report is the reservation's one output, and keep it for sending again.

        The outbox keeps the newest report of each run and kind of order. Send it only after this has returned.

        Returns:
            the receipt: the digest of the new entry, hexadecimal.

        Raises:
            RefusedError: the plan is no longer approved (code "plan"), or the reservation was used already (code
                "replayed") or is not this ledger's ("conflict").
            IntegrityError: the ledger is not as it was written, or the clock stands before its last entry.

        """
        with self._file.transaction() as state:
            key = reservation.key
            state.turn_of(reservation).again(key, reservation.event)
            state.approval_of(key.plan_hash, self._file.moment(now))
            content = {"reserved": reservation.seq, "report_sha256": hashlib.sha256(report).hexdigest()}
            entry = self._file.append("release", content, now)
            self._file.keep_report(key.run_id, key.kind, entry.seq, report)
        return entry.digest

    def abandon(self, reservation: Reservation, *, now: float | None = None) -> None:
        """Record that nothing will be released under this reservation; it stays charged.

        Raises:
            RefusedError: the reservation was used already (code "replayed") or is not this ledger's ("conflict").
            IntegrityError: the ledger is not as it was written, or the clock stands before its last entry.

        """
        with self._file.transaction() as state:
            state.turn_of(reservation).again(reservation.key, reservation.event)
            self._file.append("abandon", {"reserved": reservation.seq}, now)

    def released_report(self, key: OrderKey, *, now: float | None = None) -> bytes | None:
        """Give the report released for exactly this order, if it is the newest of its run and kind, else None.

        Sending it again releases nothing new; but whoever takes an approval back wants nothing sent any more.

        Raises:
            RefusedError: the plan is no longer approved (code "plan"), where this ledger may be written.
            IntegrityError: the stored report is not the one that was released.

        """
        turn = self._file.current().turns.get(key.turn)
        if turn is None or turn.reservation.key != key or turn.state != "released":
            return None
        report = self._file.kept_report(key.run_id, key.kind, turn.ended)
        if report is None:
            return None
        if hashlib.sha256(report).hexdigest() != turn.report_sha256:
            raise IntegrityError(f"{self._path}: the stored report of entry {turn.ended} is not the one released")
        if self._writable:
            # Should its signed head be missing still, it is written before the report goes.
            with self._file.transaction() as state:
                state.approval_of(key.plan_hash, self._file.moment(now))
        return report

    def check_echo(self, counter: int, receipt: str) -> None:
        """Hold the ledger against what a server last heard of it: the number and digest of one of its entries.

        Only this tells an older copy of the whole folder. A server that has heard nothing says (0, "").

        Raises:
            IntegrityError: this file has no such entry: it is an older copy, or one that has gone another way.

        """
        if (counter, receipt) == (0, "") or self._file.current().holds(counter, receipt):
            return
        how = "is older than" if counter >= self.counter else "went another way than"
        raise IntegrityError(f"{self._path}: {how} the ledger that a server heard of at entry {counter}; {_NEWEST}")

    @property
    def source(self) -> str:
        """The data source whose records this ledger protects."""
        return self._file.current().source

    @property
    def budget(self) -> Budget:
        """The budget in force."""
        return self._file.current().budget

    @property
    def counter(self) -> int:
        """How many entries there are; it only ever grows."""
        return self._file.current().count

    @property
    def head(self) -> str:
        """The digest of the newest entry, hexadecimal."""
        return self._file.current().head

    @property
    def public_key(self) -> str:
        """The Ed25519 key that every entry is signed with, its public half, hexadecimal."""
        return self._file.current().public_key

    @property
    def fingerprint(self) -> str:
        """What two people compare to know that they look at ledgers of one key."""
        return fingerprint(self.public_key)

    def spent(self, plan_hash: str | None = None) -> float:
        """Give the epsilon of all that was ever reserved, at the budget's delta; with a hash, under that plan."""
        state = self._file.current()
        return epsilon(state.merged(plan_hash), state.budget.delta)

    def events(self) -> list[PrivacyEvent]:
        """List every event that was reserved, in order."""
        return [turn.reservation.event for turn in self._file.current().turns.values()]

    def entries(self) -> list[Entry]:
        """List every entry, oldest first."""
        return list(self._file.current().entries)

    def verify(self) -> None:
        """Check the file from its first entry to its last: the chain, every signature, and the head file if present.

        Raises:
            IntegrityError: naming the first thing that is wrong.

        """
        self._file.verify()

    def _check_within(self, event: PrivacyEvent, limit: float, plan_hash: str | None) -> None:
        """Refuse an event that would pass the ledger's budget, or with a hash, that plan's cap."""
        state = self._file.current()
        delta, events = state.budget.delta, state.merged(plan_hash)
        if within([*events, event], delta, limit * (1 + _ROUNDING)):
            return
        bound, way_out = (
            (f"the budget of epsilon {limit:g}", "only a change of the bank's policy can allow more")
            if plan_hash is None
            else (f"its plan's own cap of epsilon {limit:g}", "only approving the plan anew can allow more")
        )
        raise BudgetExhaustedError(
            f"{self._path}: this event would pass {bound} at delta {delta:g} for '{state.source}', of which "
            f"{epsilon(events, delta):.4g} is spent; {way_out}"
        )

    def _adopt(self, source: str, budget: Budget, *, allow_increase: bool, now: float | None) -> None:
        state = self._file.current()
        if state.source != source:
            raise ConfigError(f"{self._path}: is the ledger of '{state.source}', not of '{source}'")
        if state.budget.delta != budget.delta:
            raise ConfigError(
                f"{self._path}: was created with delta {state.budget.delta:g}, which stays; not {budget.delta:g}"
            )
        with self._file.transaction() as state:
            if budget.epsilon > state.budget.epsilon and not allow_increase:
                raise ConfigError(
                    f"{self._path}: the ledger's budget is epsilon {state.budget.epsilon:g}, the configuration says "
                    f"{budget.epsilon:g}; raising it is a change of policy that must be asked for expressly"
                )
            if budget != state.budget:
                self._file.append("budget", budget_to_json(budget), now)

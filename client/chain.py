"""What a ledger's entries say: the hash chain that holds them together, and the state that follows from them.

An entry's digest is SHA-256 over its number, the digest before it and its body, and the body holds 128 random bits:
a digest may leave the bank as a receipt, for nobody can guess a time or another run's entry behind it.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from metarisk_common.errors import IntegrityError, RefusedError
from metarisk_common.privacy import PrivacyEvent

from .signing import FORMAT, Head, is_signed, public_hex, sign

_GENESIS: Final = "0" * 64
_CLOCK_SLACK_SECONDS: Final = 300.0
_RESTORE: Final = "restore the newest copy of the ledger"

Row = tuple[int, str, str, str | None]
"""(seq, body, digest, signature), as stored."""


@dataclass(frozen=True)
class Budget:
    """The most that may be spent over the whole life of a data source; `epsilon` may be infinite."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Refuse a budget that means nothing; the ValueError names the argument."""
        if not self.epsilon >= 0:
            raise ValueError("epsilon must be a number of at least 0")
        if not 0 < self.delta < 1:
            raise ValueError("delta must lie strictly between 0 and 1")


@dataclass(frozen=True)
class OrderKey:
    """Which order a release answers.

    `order_digest`: SHA-256 over all that the order says, meta-parameters included. `kind`: "train" or "evaluate"; a
    round may ask for one output of each. "constants" is what a bank's own officer asks for (`client.constants`).
    """

    run_id: str
    round: int
    plan_hash: str
    order_digest: str
    kind: str = "train"

    def __post_init__(self) -> None:
        """Refuse a kind of order that nobody knows."""
        if self.kind not in {"train", "evaluate", "constants"}:
            raise ValueError("kind must be 'train', 'evaluate' or 'constants'")

    @property
    def turn(self) -> tuple[str, int, str]:
        """What has one output at most: (run, round, kind)."""
        return self.run_id, self.round, self.kind


@dataclass(frozen=True)
class Reservation:
    """The right to one release. `receipt` is the digest of entry `seq`, which may leave the bank."""

    seq: int
    key: OrderKey
    event: PrivacyEvent
    receipt: str


@dataclass(frozen=True)
class Approval:
    """The bank's consent to answer orders under a plan, given by entry `seq`.

    `epsilon` caps the plan's own events at the ledger's delta; None: the ledger's budget alone binds it. From
    `until_seconds` on (since 1970, UTC) the approval is spent; None: it stands until it is revoked.
    """

    plan_hash: str
    epsilon: float | None
    until_seconds: float | None
    seq: int

    def __post_init__(self) -> None:
        """Refuse terms that mean nothing; the ValueError names the argument."""
        if not self.plan_hash:
            raise ValueError("plan_hash must name a plan")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ValueError("epsilon must be a finite number above 0, or None for no cap of the plan's own")
        if self.until_seconds is not None and not math.isfinite(self.until_seconds):
            raise ValueError("until_seconds must be a finite number, or None for no end")

    def is_expired(self, time_seconds: float) -> bool:
        """Tell whether the approval has ended by then."""
        return self.until_seconds is not None and time_seconds >= self.until_seconds


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    `kind`: create, budget, approve, revoke, reserve, release or abandon; `time_seconds`: since 1970, UTC.
    """

    seq: int
    kind: str
    time_seconds: float
    content: dict[str, Any]
    digest: str


@dataclass
class Turn:
    """What became of one round's reservation; `ended` is the entry that ended it."""

    reservation: Reservation
    state: Literal["reserved", "released", "abandoned"] = "reserved"
    ended: int = -1
    report_sha256: str = ""

    def again(self, key: OrderKey, event: PrivacyEvent) -> Reservation:
        """Give the reservation to whoever asks for exactly the same, while it is unused."""
        number = f"round {key.round}"
        if self.reservation.key != key or self.reservation.event != event:
            raise RefusedError(f"{number} was reserved for a different order; it cannot change", code="conflict")
        if self.state != "reserved":
            raise RefusedError(f"{number} was {self.state} already; a round has one output at most", code="replayed")
        return self.reservation


class State:
    """What the entries say, folded one at a time."""

    def __init__(self) -> None:
        """Start before the first entry."""
        self.entries: list[Entry] = []
        self.newest: Head | None = None
        self.latest_seconds = -math.inf
        self.source = ""
        self.public_key = ""
        self.budget = Budget(0.0, 0.5)
        self.approvals: dict[str, Approval] = {}
        self.turns: dict[tuple[str, int, str], Turn] = {}
        self._by_seq: dict[int, Turn] = {}
        self._steps: dict[tuple[str, str, float, float, str], int] = {}
        self._wrong = ""

    @property
    def count(self) -> int:
        """How many entries there are."""
        return len(self.entries)

    @property
    def head(self) -> str:
        """The digest of the newest entry."""
        return self.entries[-1].digest if self.entries else _GENESIS

    def holds(self, seq: int, digest: str) -> bool:
        """Tell whether entry `seq` exists and has this digest."""
        return 0 <= seq < self.count and self.entries[seq].digest == digest

    def merged(self, plan_hash: str | None = None) -> list[PrivacyEvent]:
        """List the events, of one plan or of all, equal ones of a plan merged."""
        return [
            PrivacyEvent(mechanism, noise_multiplier, sample_rate, steps, segment)
            for (plan, mechanism, noise_multiplier, sample_rate, segment), steps in self._steps.items()
            if plan_hash in {None, plan}
        ]

    def turn_of(self, reservation: Reservation) -> Turn:
        """Find a reservation's turn; the RefusedError says that it is not this ledger's."""
        turn = self._by_seq.get(reservation.seq)
        if turn is None or turn.reservation != reservation:
            raise RefusedError("the reservation is not of this ledger", code="conflict")
        return turn

    def approval_of(self, plan_hash: str, time_seconds: float) -> Approval:
        """Find the approval that a plan has at this time; the RefusedError (code "plan") says that it has none."""
        approval = self.approvals.get(plan_hash)
        if approval is None:
            raise RefusedError("the order's plan is not approved, or was revoked; approve it first", code="plan")
        # What has ended has ended: a clock that went back a little does not bring it back.
        if approval.is_expired(max(time_seconds, self.latest_seconds)):
            raise RefusedError("the approval of the order's plan has expired; approve it anew", code="plan")
        return approval

    def check_clock(self, time_seconds: float) -> None:
        """Refuse a time that lies well before an entry's: an approval would last longer than was meant.

        Raises:
            IntegrityError: saying by how much.

        """
        behind = self.latest_seconds - time_seconds
        if behind > _CLOCK_SLACK_SECONDS:
            raise IntegrityError(
                f"the clock stands before the ledger's last entry; set it right (it is {behind:.0f} seconds behind)"
            )

    def follow(self, rows: Iterable[Row], *, every_signature: bool = False) -> None:
        """Check and fold the rows from the newest known entry on, which must come first and be unchanged.

        The newest signature is checked, which vouches for all before it; each by itself with `every_signature`.

        Raises:
            IntegrityError: naming the entry.

        """
        if self._wrong:  # What was once found wrong may be half folded: nothing follows from it any more.
            raise IntegrityError(self._wrong)
        found = list(rows)
        try:
            if self.count > 0:
                self._meet(found.pop(0) if found else None)
            for row in found:
                self._take(row, check_signature=every_signature or row is found[-1])
        except IntegrityError as error:
            self._wrong = str(error)
            raise

    def _meet(self, row: Row | None) -> None:
        if row is None or (row[0], row[2]) != (self.count - 1, self.head):
            raise IntegrityError(
                f"entry {self.count - 1} is no longer what it was; the file was replaced or changed; {_RESTORE}"
            )

    def _take(self, row: Row, *, check_signature: bool) -> None:
        seq, body, digest, signature = row
        if seq != self.count or digest != _digest(seq, self.head, body):
            raise IntegrityError(f"the chain is broken at entry {self.count}; it was changed or removed; {_RESTORE}")
        try:
            entry = parse(seq, body, digest)
            self._fold(entry)
        except (ValueError, KeyError, TypeError, RecursionError, RefusedError):
            raise IntegrityError(f"entry {seq} does not make sense; {_RESTORE}") from None
        self.entries.append(entry)
        self.newest = Head(self.source, seq, digest, signature or "")
        if signature is None or (check_signature and not is_signed(self.public_key, self.newest)):
            raise IntegrityError(f"entry {seq} is not signed by the ledger's key; {_RESTORE}")

    def _fold(self, entry: Entry) -> None:
        content = entry.content
        match entry.kind:
            case "create":
                if content["format"] != FORMAT or entry.seq != 0:
                    raise ValueError("format")
                self.source, self.public_key = content["source"], content["public_key"]
                self.budget = _budget_from_json(content["budget"])
            case "budget":
                self.budget = _budget_from_json(content)
            case "approve":
                self.approvals[content["plan_hash"]] = Approval(seq=entry.seq, **content)
            case "revoke":
                del self.approvals[content["plan_hash"]]
            case "reserve":
                self._reserve(entry)
            case "release" | "abandon":
                turn = self._by_seq[content["reserved"]]
                turn.again(turn.reservation.key, turn.reservation.event)
                turn.state = "released" if entry.kind == "release" else "abandoned"
                turn.ended, turn.report_sha256 = entry.seq, content.get("report_sha256", "")
            case _:
                raise ValueError("kind")
        self.latest_seconds = max(self.latest_seconds, entry.time_seconds)

    def _reserve(self, entry: Entry) -> None:
        key, event = OrderKey(**entry.content["key"]), PrivacyEvent(**entry.content["event"])
        turn = Turn(Reservation(entry.seq, key, event, entry.digest))
        if self.turns.setdefault(key.turn, turn) is not turn:
            raise ValueError("reserved twice")
        self._by_seq[entry.seq] = turn
        merge = (key.plan_hash, event.mechanism, event.noise_multiplier, event.sample_rate, event.segment)
        self._steps[merge] = self._steps.get(merge, 0) + event.steps


def _digest(seq: int, previous: str, body: str) -> str:
    return hashlib.sha256(f"{seq}\n{previous}\n{body}".encode()).hexdigest()


def parse(seq: int, body: str, digest: str) -> Entry:
    """Read a row."""
    fields = json.loads(body)
    return Entry(seq, fields["kind"], fields["time_seconds"], fields["content"], digest)


def first_row(key: Ed25519PrivateKey, source: str, budget: Budget, time_seconds: float) -> Row:
    """Give the row that a ledger begins with."""
    state = State()
    state.source = source
    content = {"format": FORMAT, "source": source, "budget": budget_to_json(budget), "public_key": public_hex(key)}
    return next_row(state, key, "create", content, time_seconds)


def next_row(state: State, key: Ed25519PrivateKey, kind: str, content: dict[str, Any], time_seconds: float) -> Row:
    """Give the row that continues the chain after `state`."""
    fields = {"kind": kind, "time_seconds": time_seconds, "salt": secrets.token_hex(16), "content": content}
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = _digest(state.count, state.head, body)
    return state.count, body, digest, sign(key, state.source, state.count, digest)


def reserve_to_json(key: OrderKey, event: PrivacyEvent) -> dict[str, Any]:
    """Write what is reserved as an entry's content."""
    return {"key": asdict(key), "event": asdict(event)}


def budget_to_json(budget: Budget) -> dict[str, Any]:
    """Write a budget as an entry's content."""
    return {"epsilon": budget.epsilon if math.isfinite(budget.epsilon) else "unlimited", "delta": budget.delta}


def _budget_from_json(fields: dict[str, Any]) -> Budget:
    unlimited = fields["epsilon"] == "unlimited"
    return Budget(math.inf if unlimited else float(fields["epsilon"]), float(fields["delta"]))

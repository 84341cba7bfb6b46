"""What a ledger's entries say: the hash chain that holds them together, and the state that follows from them.

An entry's digest is SHA-256 over its number, the digest before it and its body, and the body holds 128 random bits:
a digest may leave the bank as a receipt, for nobody can guess a time or another run's entry behind it.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from metarisk_common.errors import IntegrityError, RefusedError
from metarisk_common.privacy import PrivacyEvent

FORMAT: Final = "metarisk ledger 1"
_GENESIS: Final = "0" * 64

Row = tuple[int, str, str]
"""(seq, body, digest), as stored."""


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
    """Which order a release answers. `order_digest`: SHA-256 over all that the order says, meta-parameters included."""

    run_id: str
    round: int
    plan_hash: str
    order_digest: str


@dataclass(frozen=True)
class Reservation:
    """The right to one release. `receipt` is the digest of entry `seq`, which may leave the bank."""

    seq: int
    key: OrderKey
    event: PrivacyEvent
    receipt: str


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `kind`: create, budget, reserve, release or abandon; `time_seconds`: since 1970, UTC."""

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
        self.count = 0
        self.head = _GENESIS
        self.source = ""
        self.budget = Budget(0.0, 0.5)
        self.turns: dict[tuple[str, int], Turn] = {}
        self._by_seq: dict[int, Turn] = {}
        self._steps: dict[tuple[str, float, float, str], int] = {}

    def merged(self) -> list[PrivacyEvent]:
        """List the events, equal ones merged."""
        return [PrivacyEvent(m, z, q, steps, segment) for (m, z, q, segment), steps in self._steps.items()]

    def turn_of(self, reservation: Reservation) -> Turn:
        """Find a reservation's turn; the RefusedError says that it is not this ledger's."""
        turn = self._by_seq.get(reservation.seq)
        if turn is None or turn.reservation != reservation:
            raise RefusedError("the reservation is not of this ledger", code="conflict")
        return turn

    def follow(self, rows: Iterable[Row]) -> None:
        """Check and fold the rows from the newest known entry on, which must come first and be unchanged.

        Raises:
            IntegrityError: naming the entry.

        """
        rows = iter(rows)
        if self.count > 0:
            seq, _, digest = next(rows, (-1, "", ""))
            if (seq, digest) != (self.count - 1, self.head):
                raise IntegrityError(
                    f"entry {self.count - 1} is no longer what it was; the file was replaced or changed"
                )
        for seq, body, digest in rows:
            if seq != self.count or digest != _digest(seq, self.head, body):
                raise IntegrityError(f"the chain is broken at entry {self.count}; it was changed or removed")
            try:
                self._fold(parse(seq, body, digest))
            except (ValueError, KeyError, TypeError, RefusedError):
                raise IntegrityError(f"entry {seq} does not make sense") from None
            self.count, self.head = seq + 1, digest

    def _fold(self, entry: Entry) -> None:
        content = entry.content
        match entry.kind:
            case "create":
                if content["format"] != FORMAT:
                    raise ValueError("format")
                self.source, self.budget = content["source"], _budget_from_json(content["budget"])
            case "budget":
                self.budget = _budget_from_json(content)
            case "reserve":
                key, event = OrderKey(**content["key"]), PrivacyEvent(**content["event"])
                turn = Turn(Reservation(entry.seq, key, event, entry.digest))
                if self.turns.setdefault((key.run_id, key.round), turn) is not turn:
                    raise ValueError("reserved twice")
                self._by_seq[entry.seq] = turn
                merge = (event.mechanism, event.noise_multiplier, event.sample_rate, event.segment)
                self._steps[merge] = self._steps.get(merge, 0) + event.steps
            case "release" | "abandon":
                turn = self._by_seq[content["reserved"]]
                turn.again(turn.reservation.key, turn.reservation.event)
                turn.state = "released" if entry.kind == "release" else "abandoned"
                turn.ended, turn.report_sha256 = entry.seq, content.get("report_sha256", "")
            case _:
                raise ValueError("kind")


def _digest(seq: int, previous: str, body: str) -> str:
    return hashlib.sha256(f"{seq}\n{previous}\n{body}".encode()).hexdigest()


def parse(seq: int, body: str, digest: str) -> Entry:
    """Read a row."""
    fields = json.loads(body)
    return Entry(seq, fields["kind"], fields["time_seconds"], fields["content"], digest)


def next_row(state: State, kind: str, content: dict[str, Any], time_seconds: float) -> Row:
    """Give the row that continues the chain after `state`."""
    fields = {"kind": kind, "time_seconds": time_seconds, "salt": secrets.token_hex(16), "content": content}
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return state.count, body, _digest(state.count, state.head, body)


def budget_to_json(budget: Budget) -> dict[str, Any]:
    """Write a budget as an entry's content."""
    return {"epsilon": budget.epsilon if math.isfinite(budget.epsilon) else "unlimited", "delta": budget.delta}


def _budget_from_json(fields: dict[str, Any]) -> Budget:
    unlimited = fields["epsilon"] == "unlimited"
    return Budget(math.inf if unlimited else float(fields["epsilon"]), float(fields["delta"]))

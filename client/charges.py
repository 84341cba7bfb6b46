"""What a ledger has charged, one reservation at a time, and the epsilon that had been spent at each moment.

Times are those that the bank's clock gave. Charges are put in their order, so a clock that was set back moves a
charge, but loses none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metarisk_common.privacy import PrivacyEvent, epsilon

from .chain import Entry, OrderKey

Outcome = Literal["released", "reserved", "abandoned"]

_MOST_POINTS, _FEWEST_POINTS, _CONVOLUTIONS = 60, 12, 120  # Of the curve: each epsilon takes up to a tenth of a second.


@dataclass(frozen=True)
class Charge:
    """One reservation: charged when it was made, whatever became of it."""

    seq: int
    time_seconds: float
    key: OrderKey
    event: PrivacyEvent
    outcome: Outcome


def charges_of(entries: Sequence[Entry]) -> tuple[Charge, ...]:
    """Read the reservations of a verified ledger, each with what became of it."""
    outcomes: dict[int, Outcome] = {
        entry.content["reserved"]: "released" if entry.kind == "release" else "abandoned"
        for entry in entries
        if entry.kind in {"release", "abandon"}
    }
    return tuple(
        Charge(
            entry.seq,
            entry.time_seconds,
            OrderKey(**entry.content["key"]),
            PrivacyEvent(**entry.content["event"]),
            outcomes.get(entry.seq, "reserved"),
        )
        for entry in entries
        if entry.kind == "reserve"
    )


class Tally:
    """The charges in the order of their times, and the epsilon of the first so many, each computed once."""

    def __init__(self, charges: Sequence[Charge], delta: float) -> None:
        """Take charges in any order."""
        self.charges = sorted(charges, key=lambda charge: charge.time_seconds)
        self.delta = delta
        self._events = events = [charge.event for charge in self.charges]
        self._known: dict[int, float] = {}
        # Each setting of sampled steps, in each segment, costs its own convolution for every point.
        settings = {(event.segment, event.noise_multiplier, event.sample_rate) for event in events}
        self._points = min(_MOST_POINTS, max(_FEWEST_POINTS, _CONVOLUTIONS // max(1, len(settings))))

    def after(self, count: int) -> float:
        """Give the epsilon of the first `count` events together."""
        if count not in self._known:
            self._known[count] = epsilon(self._events[:count], self.delta)
        return self._known[count]

    def curve(self) -> list[tuple[float, float]]:
        """Give steps to draw: (seconds, epsilon from then on), at what is known already and evenly between.

        Several charges make one step, at the time of the first: the line is never below the truth.
        """
        total = len(self._events)
        free = max(1, self._points - len(self._known))
        counts = {*self._known, *(round(total * (index + 1) / free) for index in range(free)), total} - {0}
        steps, before = [], 0
        for count in sorted(counts):
            known = self._known.get(count)
            spent = epsilon(self._events[:count], self.delta) if known is None else known
            steps.append((self.charges[before].time_seconds, spent))
            before = count
        return steps

"""SYNTHETIC fraud: named scenarios, where and when each strikes, and its signature, which drifts over time.

No payment of this world was ever made and no figure is measured on a bank's records: the signatures are what the
trade's public descriptions of these frauds say in words, with numbers chosen so that much of each hides among sound
payments.

A signature is a list of chances. A fraudulent payment is first drawn as a sound one of its victim and channel; each
trait is then replaced with the scenario's own with the chance that the signature gives it. So every trait of a fraud
also occurs in sound payments, and no single one settles anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CHANNELS: Final = ("card-present", "card-not-present", "transfer")
PERIODS: Final = ("2024-H1", "2024-H2", "2025-H1")
PERIOD_ENDS: Final = (182, 366, 547)
"""Days since 2024-01-01 at which the periods end."""
LATER: Final = PERIODS[-1:]
"""Periods whose new scenarios nobody has learned from."""

CATEGORIES: Final[Mapping[str, tuple[str, ...]]] = {
    "card-present": ("groceries", "fuel", "restaurant", "clothing", "electronics", "travel", "cash"),
    "card-not-present": ("digital", "clothing", "electronics", "travel", "groceries", "gaming"),
    "transfer": ("bill", "person", "savings", "crypto", "rent"),
}
CATEGORY_SHARES: Final[Mapping[str, tuple[float, ...]]] = {
    "card-present": (0.38, 0.14, 0.20, 0.11, 0.05, 0.05, 0.07),
    "card-not-present": (0.28, 0.26, 0.13, 0.10, 0.15, 0.08),
    "transfer": (0.42, 0.30, 0.15, 0.03, 0.10),
}
AUTHENTICATION: Final[Mapping[str, tuple[str, ...]]] = {
    "card-present": ("chip_pin", "contactless", "magstripe"),
    "card-not-present": ("strong", "frictionless", "none"),
    "transfer": ("app", "sms", "none"),
}
AUTHENTICATION_SHARES: Final[Mapping[str, tuple[float, ...]]] = {
    "card-present": (0.50, 0.44, 0.06),
    "card-not-present": (0.45, 0.38, 0.17),
    "transfer": (0.62, 0.33, 0.05),
}


@dataclass(frozen=True)
class Pattern:
    """A fraud scenario. Chances are at the start of 2024, before a bank's own tilt; `drift` multiplies them a year.

    Attributes:
        name: the scenario's; `text` tells it.
        channel: where it strikes.
        strikes: weight among the channel's scenarios, by period.
        amount: mean shift of the log of the amount, or of a `small` fixed amount where `small` is true.
        small: the amounts are tests of a card, of about one unit of money.
        night: chance of an hour between 0 and 6.
        device: chance of a device first seen within three days.
        far: chance of a place hundreds of kilometres from home.
        mismatch: chance of a country that does not match.
        counterparty: chance of a merchant or beneficiary never paid before.
        contact: chance that contact details were changed within a week.
        category, authentication: chance of the favoured ones, and which those are.
        burst: mean number of payments of one case, at least 1.
        gap_hours: mean hours between two of them.
        at_home: chance of a familiar device, place, country and counterparty, which the other traits do not touch.
        drift: what a year makes of the chances; below 1 the fraudsters learn to hide.

    """

    name: str
    channel: str
    strikes: Mapping[str, float]
    amount: float
    night: float = 0.1
    device: float = 0.1
    far: float = 0.1
    mismatch: float = 0.1
    counterparty: float = 0.3
    contact: float = 0.0
    category: tuple[float, tuple[str, ...]] = (0.0, ())
    authentication: tuple[float, tuple[str, ...]] = (0.0, ())
    burst: float = 2.0
    gap_hours: float = 6.0
    small: bool = False
    at_home: float = 0.0
    drift: float = 0.8
    text: str = ""


PATTERNS: Final = (
    Pattern(
        "lost_and_stolen", "card-present", {"2024-H1": 1.0, "2024-H2": 0.5, "2025-H1": 0.2}, amount=0.3, night=0.25,
        far=0.15, category=(0.6, ("fuel", "groceries", "electronics")), authentication=(0.75, ("contactless",)),
        counterparty=0.7, burst=3.0, gap_hours=1.5,
        text="A found card is tapped for small purchases until it is blocked.",
    ),
    Pattern(
        "counterfeit_card", "card-present", {"2024-H2": 0.5, "2025-H1": 0.1}, amount=0.8, night=0.2, far=0.55,
        mismatch=0.5, category=(0.6, ("cash", "electronics")), authentication=(0.6, ("magstripe",)), counterparty=0.8,
        burst=2.5, gap_hours=3.0,
        text="A copied stripe is used abroad, where the chip is not asked for.",
    ),
    Pattern(
        "terminal_compromise", "card-present", {"2025-H1": 0.7}, amount=0.6, night=0.15, far=0.35, mismatch=0.25,
        category=(0.55, ("travel", "clothing", "electronics")), authentication=(0.35, ("magstripe",)),
        counterparty=0.75, burst=2.5, gap_hours=5.0, drift=1.0,
        text="Cards read at a tampered terminal are all used within days, far from their owners.",
    ),
    Pattern(
        "card_testing", "card-not-present", {"2024-H1": 1.0, "2024-H2": 0.5, "2025-H1": 0.1}, amount=0.3, small=True,
        night=0.3, device=0.5, far=0.4, mismatch=0.4, category=(0.6, ("digital", "gaming")),
        authentication=(0.6, ("none",)), counterparty=0.8, burst=4.0, gap_hours=0.3,
        text="Stolen numbers are tried by bursts of tiny payments.",
    ),
    Pattern(
        "phished_card", "card-not-present", {"2024-H2": 0.5, "2025-H1": 0.2}, amount=1.1, night=0.2, device=0.6,
        far=0.35, mismatch=0.25, category=(0.6, ("electronics", "travel")), authentication=(0.4, ("none", "strong")),
        counterparty=0.8, burst=2.0, gap_hours=2.0,
        text="Numbers given away on a false page buy what can be sold on.",
    ),
    Pattern(
        "refund_abuse", "card-not-present", {"2025-H1": 0.7}, amount=0.7, night=0.05, at_home=0.7,
        category=(0.75, ("clothing", "electronics")), authentication=(0.5, ("frictionless", "strong")),
        counterparty=0.05, burst=3.0, gap_hours=30.0, drift=1.0,
        text="The customer's own purchases, at home and well authenticated, that are later denied.",
    ),
    Pattern(
        "account_takeover", "transfer", {"2024-H1": 1.0, "2024-H2": 0.5, "2025-H1": 0.2}, amount=1.1, night=0.3,
        device=0.65, far=0.35, mismatch=0.25, contact=0.4, category=(0.4, ("person", "crypto")),
        authentication=(0.2, ("none",)), counterparty=0.75, burst=2.0, gap_hours=1.0,
        text="Stolen credentials on a new device empty an account.",
    ),
    Pattern(
        "mule_transfers", "transfer", {"2024-H2": 0.5, "2025-H1": 0.1}, amount=0.7, night=0.15, device=0.15,
        category=(0.5, ("person", "crypto")), counterparty=0.6, burst=4.0, gap_hours=3.0,
        text="What came in is passed on at once, in several pieces.",
    ),
    Pattern(
        "sim_swap", "transfer", {"2025-H1": 0.7}, amount=1.2, night=0.25, device=0.6, far=0.15, contact=0.3,
        category=(0.35, ("person", "savings", "crypto")), authentication=(0.75, ("sms",)), counterparty=0.7, burst=2.0,
        gap_hours=0.7, drift=1.0,
        text="The victim's number answers on another card, and confirms by text message what the thief orders.",
    ),
)  # fmt: skip


def segment_of(channel: str, period: str) -> str:
    """Name the public segment of a payment."""
    return f"{channel} {period}"


def segments(*, later: bool) -> tuple[str, ...]:
    """Return the public segments of the periods that come later, or of those before."""
    return tuple(
        segment_of(channel, period) for period in PERIODS if (period in LATER) == later for channel in CHANNELS
    )


def new_patterns(channel: str) -> tuple[str, ...]:
    """Name the scenarios that strike a channel in later periods only."""
    return tuple(
        pattern.name for pattern in PATTERNS if pattern.channel == channel and set(pattern.strikes) <= set(LATER)
    )

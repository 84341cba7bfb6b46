"""SYNTHETIC payments of some banks, with named frauds that change over time; no payment of this world was ever made.

Customers stand in the table for a window of five weeks each, with several payments in several channels, so that what
they did in the last day and week is known. Banks differ in size, in their customers' habits and in how hard each
fraud strikes them and what it looks like there. Between 0.5% and 4% of a bank's payments in a segment are frauds; see
`simulations.payments_patterns` for the scenarios and their periods.

The same options give the same table, byte for byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field

from metarisk_common.config import Frozen, validate

from .payments_lookback import DAY_MINUTES, look_back
from .payments_patterns import (
    AUTHENTICATION,
    AUTHENTICATION_SHARES,
    CATEGORIES,
    CATEGORY_SHARES,
    CHANNELS,
    PATTERNS,
    PERIOD_ENDS,
    PERIODS,
    Pattern,
    segment_of,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WINDOW_DAYS: Final = 35
SHARES: Final = (0.006, 0.038)
"""Bounds of the share of frauds that a bank's segment is given; the rounded counts stay within 0.5% and 4%."""
_STARTS: Final = (0.27, 0.30, 0.43)
"""Share of the customers whose window begins in each period: the extract of the last one is larger."""
_BUSY: Final = 0.5
"""Chance that a sound payment falls on one of two busy days of its customer: holidays, salary, moving house."""
_NEW_DEVICE, _ABROAD, _NEW_CONTACT = 0.06, 0.45, 0.03
"""Chances, in sound payments, of a new device, of another country when away from home, and of new contact details."""
_AMOUNT: Final = (3.2, 3.6, 5.0)
"""Mean of the log of an amount by channel."""


class PaymentOptions(Frozen):
    """What `[data.options]` may say. `customers`: of a middling bank."""

    banks: int = Field(default=24, ge=2, le=200)
    customers: int = Field(default=1400, ge=20, le=20_000)
    seed: int = Field(default=2026, ge=0)


@dataclass
class _Payments:
    """Columns under construction, `(rows,)` each; `pattern` is -1 for a sound payment."""

    customer: Ints
    channel: Ints
    minute: Ints
    pattern: Ints


@dataclass(frozen=True)
class _World:
    """Banks and customers. By bank: `tilt` and `intensity`, `(banks, patterns)`, and `reach`; by customer: the rest."""

    tilt: Floats
    intensity: Floats
    reach: Floats
    bank: Ints
    start_day: Ints
    period: Ints
    level: Floats
    online: Floats
    device: Floats
    traveller: Floats
    age_days: Floats


def table(options: Mapping[str, Any]) -> pl.DataFrame:
    """Draw the SYNTHETIC table: one payment a row, by customer and time.

    `fraud_scenario` names the scenario of a fraud and is null else: what an investigation finds out afterwards, for
    reports about this world, and no input.

    Raises:
        ConfigError: an option is unknown or out of bounds.

    """
    chosen = validate(dict(options), PaymentOptions, where="data.options of the payments")
    rng = np.random.default_rng(chosen.seed)
    world = _world(chosen, rng)
    sound = _sound(world, rng)
    payments = _joined(sound, _frauds(world, sound, rng))
    return _columns(world, payments, rng)


def _world(options: PaymentOptions, rng: np.random.Generator) -> _World:
    sizes = np.maximum(20, options.customers * np.exp(rng.normal(-0.08, 0.4, options.banks))).astype(np.int64)
    bank = np.repeat(np.arange(options.banks), sizes)
    count = len(bank)
    period = rng.choice(len(PERIODS), size=count, p=_STARTS)
    begins = np.array([0, *PERIOD_ENDS[:-1]])[period]
    room = np.array(PERIOD_ENDS)[period] - begins - WINDOW_DAYS
    taste = rng.normal(0, 0.5, options.banks)
    return _World(
        tilt=np.exp(rng.normal(0, 0.2, (options.banks, len(PATTERNS)))),
        intensity=np.exp(rng.normal(0, 0.35, (options.banks, len(PATTERNS)))),
        reach=np.exp(rng.normal(0, 0.4, options.banks)),
        bank=bank,
        start_day=begins + (rng.random(count) * room).astype(np.int64),
        period=period.astype(np.int64),
        level=rng.normal(0, 0.5, count) + 0.5 * taste[bank],
        online=rng.normal(0, 0.7, count) + taste[bank],
        device=np.exp(rng.normal(5.6, 0.9, count)),
        traveller=rng.beta(0.6, 9.0, count),
        age_days=np.exp(rng.normal(7.0, 1.0, count)),
    )


def _sound(world: _World, rng: np.random.Generator) -> _Payments:
    payments = 2 + rng.poisson(3.6, len(world.bank))
    customer = np.repeat(np.arange(len(world.bank)), payments)
    rows = len(customer)
    busy = rng.random((len(world.bank), 2))[customer, rng.integers(0, 2, rows)]
    at = np.where(rng.random(rows) < _BUSY, busy, rng.random(rows))
    day = world.start_day[customer] + (at * WINDOW_DAYS).astype(np.int64)
    logits = np.stack([np.full(rows, 0.5), world.online[customer], np.full(rows, -0.1)])
    channel = np.argmax(logits + rng.gumbel(size=logits.shape), axis=0)
    hour = np.where(channel == 0, rng.normal(14.5, 3.5, rows), rng.normal(15.5, 5.5, rows)) % 24
    minute = (day * DAY_MINUTES + hour * 60).astype(np.int64)
    return _Payments(customer, channel, minute, np.full(rows, -1))


def _frauds(world: _World, sound: _Payments, rng: np.random.Generator) -> _Payments:
    parts = []
    banks = len(world.reach)
    place = world.bank[sound.customer] * len(PERIODS) + world.period[sound.customer]
    volume = np.bincount(place * len(CHANNELS) + sound.channel, minlength=banks * len(PERIODS) * len(CHANNELS))
    volume = volume.reshape(banks, len(PERIODS), len(CHANNELS))
    victims = _by_place(world)
    for bank in range(banks):
        for at, period in enumerate(PERIODS):
            for channel, name in enumerate(CHANNELS):
                weights = np.array([p.strikes.get(period, 0.0) if p.channel == name else 0.0 for p in PATTERNS])
                weights *= world.intensity[bank]
                share = np.clip(0.02 * weights.sum(), *SHARES)
                wanted = int(volume[bank, at, channel] * share / (1 - share))
                drawn = rng.choice(len(PATTERNS), size=wanted, p=weights / weights.sum())
                for pattern, events in zip(*np.unique(drawn, return_counts=True), strict=True):
                    parts.append(_cases(world, victims[bank, at], channel, int(pattern), int(events), rng))
    return _Payments(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _by_place(world: _World) -> dict[tuple[int, int], Ints]:
    order = np.lexsort((world.period, world.bank))
    places = world.bank[order] * len(PERIODS) + world.period[order]
    starts = np.searchsorted(places, np.arange(len(world.reach) * len(PERIODS) + 1))
    return {
        (bank, at): order[starts[bank * len(PERIODS) + at] : starts[bank * len(PERIODS) + at + 1]]
        for bank in range(len(world.reach))
        for at in range(len(PERIODS))
    }


def _cases(
    world: _World, victims: Ints, channel: int, number: int, events: int, rng: np.random.Generator
) -> tuple[Ints, Ints, Ints, Ints]:
    """Spread a scenario's payments over cases of one victim each: bursts of them, hours or minutes apart."""
    pattern = PATTERNS[number]
    bursts = 1 + rng.poisson(pattern.burst - 1, events)
    case = np.searchsorted(np.cumsum(bursts), np.arange(events), side="right")
    cases = int(case[-1]) + 1
    victim = rng.choice(victims, size=cases, replace=cases > len(victims))
    night = rng.random(cases) < pattern.night
    hour = np.where(night, rng.random(cases) * 6, rng.normal(15, 5, cases) % 24)
    day = world.start_day[victim] + 4 + (rng.random(cases) * (WINDOW_DAYS - 9)).astype(np.int64)
    begun = day * DAY_MINUTES + hour * 60
    gaps = rng.exponential(pattern.gap_hours * 60, events)
    first = np.r_[True, case[1:] != case[:-1]]
    gaps[first] = 0.0
    since = np.cumsum(gaps)
    since -= since[first][case]
    # What is left of the window holds the longest case, so that a victim's payments stay in its period.
    minute = (begun[case] + np.minimum(since, 4 * DAY_MINUTES)).astype(np.int64)
    return victim[case], np.full(events, channel), minute, np.full(events, number)


def _joined(sound: _Payments, frauds: _Payments) -> _Payments:
    columns = [
        np.concatenate([getattr(sound, name), getattr(frauds, name)])
        for name in ("customer", "channel", "minute", "pattern")
    ]
    order = np.lexsort((columns[3], columns[2], columns[0]))
    return _Payments(*(column[order] for column in columns))


def _columns(world: _World, payments: _Payments, rng: np.random.Generator) -> pl.DataFrame:
    customer, channel = payments.customer, payments.channel
    rows, bank = len(customer), world.bank[payments.customer]
    traits = _sound_traits(world, payments, rng)
    for number, pattern in enumerate(PATTERNS):
        struck = np.flatnonzero(payments.pattern == number)
        years = payments.minute[struck] / (365 * DAY_MINUTES)
        strength = world.tilt[bank[struck], number] * pattern.drift**years
        _strike(traits, pattern, struck, strength, rng)
    amount = np.round(np.exp(np.clip(traits["log_amount"], 0.0, 10.5)), 2)
    recent = look_back(customer, payments.minute, amount)
    period = np.searchsorted(PERIOD_ENDS, payments.minute // DAY_MINUTES, side="right")
    names = np.array([[segment_of(c, p) for p in PERIODS] for c in CHANNELS])
    scenarios = np.array([*(pattern.name for pattern in PATTERNS), ""])
    day = (payments.minute // DAY_MINUTES).astype(np.int64)
    usual = np.exp(world.level[customer] + np.array(_AMOUNT)[channel] + rng.normal(0, 0.2, rows))
    return pl.DataFrame(
        {
            "bank": [f"bank {number + 1:02d}" for number in bank],
            "customer": [f"c{number:06d}" for number in customer],
            "segment": names[channel, period],
            "day": day,
            "channel": np.array(CHANNELS)[channel],
            "amount": amount,
            "usual_amount": np.round(usual, 2),
            "hour": np.round(payments.minute % DAY_MINUTES / 60, 2),
            "weekday": np.array(["mon", "tue", "wed", "thu", "fri", "sat", "sun"])[day % 7],
            "category": traits["category"],
            "authentication": traits["authentication"],
            "device_age_days": np.round(traits["device"], 1),
            "distance_km": np.round(traits["distance"], 1),
            "country_mismatch": np.where(traits["mismatch"], "yes", "no"),
            "new_counterparty": np.where(traits["counterparty"], "yes", "no"),
            "contact_change_days": np.round(traits["contact"], 1),
            "account_age_days": np.round(world.age_days[customer]),
            "count_24h": recent.count_24h,
            "sum_24h": recent.sum_24h,
            "count_7d": recent.count_7d,
            "sum_7d": recent.sum_7d,
            "hours_since_previous": np.round(recent.hours_since, 2),
            "fraud": (payments.pattern >= 0).astype(np.int64),
            "fraud_scenario": scenarios[payments.pattern],
        }
    ).with_columns(
        pl.col("hours_since_previous").fill_nan(None),
        pl.when(pl.col("fraud") == 1).then("fraud_scenario").alias("fraud_scenario"),
    )


def _sound_traits(world: _World, payments: _Payments, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """Draw the traits of sound payments for all: a fraud begins as a payment that its victim might have made."""
    customer, channel = payments.customer, payments.channel
    rows, bank = len(customer), world.bank[payments.customer]
    away = rng.random(rows) < world.traveller[customer]
    near = np.exp(rng.normal(np.array([1.3, 2.2, 1.8])[channel], 1.1)) * world.reach[bank]
    far = np.exp(rng.normal(6.3, 0.9, rows))
    device = np.where(rng.random(rows) < _NEW_DEVICE, rng.random(rows) * 6, world.device[customer])
    category, authentication = np.empty(rows, dtype=object), np.empty(rows, dtype=object)
    for number, name in enumerate(CHANNELS):
        own = np.flatnonzero(channel == number)
        category[own] = rng.choice(CATEGORIES[name], size=len(own), p=CATEGORY_SHARES[name])
        authentication[own] = rng.choice(AUTHENTICATION[name], size=len(own), p=AUTHENTICATION_SHARES[name])
    return {
        "log_amount": rng.normal(world.level[customer] + np.array(_AMOUNT)[channel], 0.85),
        "category": category,
        "authentication": authentication,
        "device": device,
        "distance": np.where(away, far, near),
        "mismatch": np.where(
            away, rng.random(rows) < _ABROAD, rng.random(rows) < np.array([0.01, 0.06, 0.02])[channel]
        ),
        "counterparty": rng.random(rows) < np.array([0.22, 0.28, 0.16])[channel],
        "contact": np.where(rng.random(rows) < _NEW_CONTACT, rng.random(rows) * 14, rng.exponential(400, rows)),
    }


def _strike(
    traits: dict[str, npt.NDArray[Any]], pattern: Pattern, rows: Ints, strength: Floats, rng: np.random.Generator
) -> None:
    """Replace traits of a scenario's payments by its own, each with the chance that its signature gives, in place."""
    count = len(rows)

    def chosen(chance: float) -> Ints:
        return rows[rng.random(count) < np.minimum(0.95, chance * strength)]

    if pattern.small:
        tested = chosen(0.85)
        traits["log_amount"][tested] = rng.normal(pattern.amount, 0.6, len(tested))
    else:
        traits["log_amount"][rows] += pattern.amount * strength
    for name, chance, draw in (
        ("device", pattern.device, lambda size: rng.random(size) * 3),
        ("distance", pattern.far, lambda size: np.exp(rng.normal(6.3, 0.9, size))),
        ("mismatch", pattern.mismatch, lambda size: np.ones(size, dtype=bool)),
        ("counterparty", pattern.counterparty, lambda size: np.ones(size, dtype=bool)),
        ("contact", pattern.contact, lambda size: rng.random(size) * 7),
        ("category", pattern.category[0], lambda size: rng.choice(pattern.category[1], size=size)),
        ("authentication", pattern.authentication[0], lambda size: rng.choice(pattern.authentication[1], size=size)),
    ):
        struck = chosen(chance)
        if len(struck):
            traits[name][struck] = draw(len(struck))
    home = chosen(pattern.at_home)
    traits["distance"][home] = np.exp(rng.normal(1.0, 0.8, len(home)))
    traits["device"][home] = np.exp(rng.normal(5.9, 0.7, len(home)))
    traits["mismatch"][home] = False
    traits["counterparty"][home] = False

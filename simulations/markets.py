"""Daily closes made into records: what an asset's volatility was, and what it was over the next five days.

Of a close c_t the return is r_t = log(c_t / c_(t-1)). A record of day t has the logarithms of the mean squared return
over the last 1, 5, 22 and 66 days (Corsi 2009, "A Simple Approximate Long-Memory Model of Realized Volatility", on
squared daily returns) and as its target that over the days t+1 to t+5. Nothing else looks ahead.

Who is who is a public rule on names alone: of each class of assets, in the order of their names, every third one is
unseen; the others are dealt out to desks of that class. Desks learn from days whose target was known by
`learn_until`; unseen assets, each an institution of its own, are judged on the days after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field
from scipy.special import digamma

from client.dataset import read_table
from metarisk_common.config import Frozen, validate
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.volatility_metrics import half_variance

WINDOWS: Final = (1, 5, 22, 66)
"""Days that each input looks back."""

HORIZON: Final = 5
"""Days that the target looks ahead."""

FLOOR: Final = 1e-7
"""Least mean squared return, public: an asset that did not move has no logarithm."""

CLASS: Final = "asset_class"
"""Column of what kind of asset a record is of."""

OWN_MEAN: Final = "own_mean"
"""Column of an unseen asset's mean target, of the days on which it was known; null elsewhere."""

HALF_VARIANCE: Final = "_half_variance"
"""Ends the name of the column that retransforms a rival's forecasts; see `volatility_metrics.half_variance`."""

DECAY: Final = 0.94
"""Of the exponentially weighted variance (RiskMetrics 1996, table 5.7: daily data)."""

FLOOR_LOG: Final = float(np.log(FLOOR))
"""The least that a logarithm here can be."""

LOG_OF_MEAN: Final = float(digamma(HORIZON / 2) + np.log(2 / HORIZON))
"""What the logarithm of a mean of five squared normals lies below that of their variance, on average."""

RIVALS: Final = ("har_all", "ewma", "garch")
"""Columns of forecasts that an asset's own past gives."""

_EVERY: Final = 3
_LEAST_RETURNS: Final = 250
Vector = npt.NDArray[np.float64]


class Options(Frozen):
    """`[data.options]` of the recipe."""

    learn_until: date = date(2011, 12, 30)
    assets_a_desk: int = Field(default=4, ge=1)
    learn: tuple[str, ...] = ()
    """Classes whose desks learn, while the unseen assets of the other classes are judged; none: all do both."""


@dataclass(frozen=True)
class _Asset:
    name: str
    kind: str
    dates: list[datetime]
    closes: Vector


def table(path: Path, options: Mapping[str, Any]) -> pl.DataFrame:
    """Build the records of all assets.

    Columns: desk, asset, asset_class, date, session (its number among the asset's days), log_variance_1 to _66,
    log_variance (the target); and of unseen assets, else null: own_mean, and of three rivals (har_all, ewma, garch) the
    forecast of the target and, as har_all_half_variance and so on, what retransforms it, estimated on the asset's days
    up to `learn_until`.

    Args:
        path: a table of `date`, `asset`, `close` and `desk`, which here is the class of the asset.
        options: see `Options`.

    Raises:
        ConfigError: an option is unknown or wrong.
        DataError: the table cannot be read, or lacks a column.

    """
    chosen = validate(dict(options), Options, where="data.options")
    frame = read_table(path)
    missing = [name for name in ("date", "asset", "close", "desk") if name not in frame.columns]
    if missing:
        raise DataError(f"{path}: column '{missing[0]}' is missing; prices need date, asset, close and desk")
    unknown = sorted(set(chosen.learn) - set(frame["desk"].cast(pl.String)))
    if unknown:
        raise ConfigError(f"data.options.learn: {path} has no class '{unknown[0]}'")
    desks = desks_of(frame, chosen.assets_a_desk)
    parts = []
    for asset in _assets(frame):
        desk = desks[asset.name]
        here = not chosen.learn or (asset.kind in chosen.learn) == (desk is not None)
        if not here or len(asset.closes) < _LEAST_RETURNS:
            continue
        found = records(asset.closes).with_columns(
            pl.Series("date", [day.date() if isinstance(day, datetime) else day for day in asset.dates])
        )
        # The target of a day is known five days later: what desks learn from ends before `learn_until` altogether.
        known = pl.col("date").shift(-HORIZON) <= chosen.learn_until
        if desk is None:
            found = _with_rivals(found, asset, chosen.learn_until).filter(pl.col("date") > chosen.learn_until)
            if found.select(pl.col(known_of_unseen()).null_count()).sum_horizontal().item():
                raise DataError(
                    f"{path}: asset '{asset.name}' has too few days up to {chosen.learn_until} to estimate its own "
                    f"models on; give it {_LEAST_RETURNS + WINDOWS[-1] + HORIZON + 1}, or leave it out"
                )
        else:
            found = found.filter(known).with_columns(pl.lit(None, pl.Float64).alias(name) for name in known_of_unseen())
        name = f"{asset.name} ({asset.kind.replace('_', ' ')})" if desk is None else desk
        found = found.drop_nulls([*inputs(), "log_variance"])
        parts.append(
            found.select(
                pl.lit(name).alias("desk"), pl.lit(asset.name).alias("asset"),
                pl.lit(asset.kind.replace("_", " ")).alias(CLASS), pl.col("date"), pl.col("session"),
                *inputs(), pl.col("log_variance"), *known_of_unseen(),
            )
        )  # fmt: skip
    return pl.concat([part for part in parts if part.height])


def inputs() -> list[str]:
    """Names of the columns that look back."""
    return [f"log_variance_{window}" for window in WINDOWS]


def known_of_unseen() -> list[str]:
    """Names of the columns that only unseen assets have: their own past mean, and what their rivals forecast."""
    return [OWN_MEAN, *(f"{name}{ending}" for name in RIVALS for ending in ("", HALF_VARIANCE))]


def records(closes: Vector) -> pl.DataFrame:
    """Build one asset's records from its closes in order of days: `session`, inputs and target, null where unknown."""
    squared = np.square(np.diff(np.log(closes), prepend=np.nan))
    columns: dict[str, Any] = {"session": np.arange(len(closes), dtype=np.float64)}
    frame = pl.DataFrame(columns | {"squared": squared}).with_columns(pl.col("squared").fill_nan(None))

    def log_mean(window: int) -> pl.Expr:
        return pl.col("squared").rolling_mean(window).clip(lower_bound=FLOOR).log()

    return frame.with_columns(
        *(log_mean(window).alias(f"log_variance_{window}") for window in WINDOWS),
        log_mean(HORIZON).shift(-HORIZON).alias("log_variance"),
    ).drop("squared")


def desks_of(frame: pl.DataFrame, assets_a_desk: int) -> dict[str, str | None]:
    """Deal assets out to desks by their names alone; None for an asset that no desk has."""
    found: dict[str, str | None] = {}
    by_class = frame.select(pl.col("desk").cast(pl.String), pl.col("asset").cast(pl.String)).unique().sort("asset")
    for (kind,), part in sorted(by_class.group_by("desk"), key=lambda item: str(item[0])):
        names = part["asset"].sort().to_list()
        kept = [name for index, name in enumerate(names) if index % _EVERY != _EVERY - 1]
        found |= dict.fromkeys(names)
        for index, name in enumerate(kept):
            found[name] = f"{str(kind).replace('_', ' ')} desk {index // assets_a_desk + 1}"
    return found


def own_mean(target: Vector) -> Vector:
    """Return each day's mean of the targets known by then, (days,); NaN until there is one.

    `target: (days,)`, NaN where unknown; that of a day is known `HORIZON` days later.
    """
    known = _lagged(np.isfinite(target).astype(np.float64))
    count = np.cumsum(known)
    total = np.cumsum(_lagged(np.nan_to_num(target)))
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1.0), np.nan))


def har(found: pl.DataFrame) -> Vector:
    """Forecast each day's target by the heterogeneous autoregression on all of the asset's own days before, (days,).

    Corsi (2009), equation 7, in logarithms, by least squares, estimated again every day on all days whose target is
    known by then; NaN where that are fewer than 250. `found`: as `records` builds it.
    """
    x = found.select(inputs()).to_numpy()
    y = found["log_variance"].fill_null(float("nan")).to_numpy()
    # About the middle of what logarithms of variance are, which changes no forecast and loses no digits.
    rows = np.column_stack([np.ones(len(x)), x - FLOOR_LOG / 2])
    whole: npt.NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
    usable = whole & np.isfinite(y)
    rows, target = np.where(whole[:, None], rows, 0.0), np.where(usable, y, 0.0)
    seen = np.where(usable[:, None], rows, 0.0)
    squares = np.cumsum(_lagged(seen[:, :, None] * seen[:, None, :]), axis=0)
    products = np.cumsum(_lagged(seen * target[:, None]), axis=0)
    enough = whole & (squares[:, 0, 0] >= _LEAST_RETURNS)
    forecasts = np.full(len(y), np.nan)
    weights = np.linalg.solve(squares[enough], products[enough][:, :, None])[:, :, 0]
    forecasts[enough] = (rows[enough] * weights).sum(axis=1)
    return forecasts


def ewma(closes: Vector) -> Vector:
    """Forecast each day's target from the exponentially weighted variance up to that day, (days,); NaN on the first."""
    squared = np.square(np.diff(np.log(closes)))
    variance = np.empty(len(squared))
    level = float(squared[: WINDOWS[2]].mean())
    for index, value in enumerate(squared):
        level = DECAY * level + (1 - DECAY) * float(value)
        variance[index] = level
    return np.append(np.nan, np.log(np.maximum(variance, FLOOR)) + LOG_OF_MEAN)


def garch(closes: Vector, learn: int) -> Vector:
    """Forecast each day's target by GARCH(1,1), estimated on the first `learn` days alone; (days,).

    Bollerslev (1986), equation 5, by maximum likelihood (the package arch). The forecast is the logarithm of the mean
    of the next five days' expected variances. NaN where there are too few days to estimate it on.
    """
    from arch import arch_model  # noqa: PLC0415 - slow to import, and only this rival needs it

    returns = 100.0 * np.diff(np.log(closes))
    if learn - 1 < _LEAST_RETURNS:
        return np.full(len(closes), np.nan)
    fitted = arch_model(returns[: learn - 1], mean="Constant", vol="GARCH", p=1, q=1).fit(
        disp="off", show_warning=False
    )
    mean, omega, alpha, beta = (float(fitted.params[name]) for name in ("mu", "omega", "alpha[1]", "beta[1]"))
    squared = np.square(returns - mean)
    level, forecasts = float(squared[: learn - 1].mean()), np.empty(len(returns))
    for index, value in enumerate(squared):
        level = omega + alpha * float(value) + beta * level
        ahead, total = level, level
        for _ in range(HORIZON - 1):
            ahead = omega + (alpha + beta) * ahead
            total += ahead
        forecasts[index] = total / HORIZON / 1e4
    return np.append(np.nan, np.log(np.maximum(forecasts, FLOOR)) + LOG_OF_MEAN)


def _assets(frame: pl.DataFrame) -> list[_Asset]:
    ordered = frame.with_columns(pl.col("asset").cast(pl.String), pl.col("desk").cast(pl.String)).sort("asset", "date")
    return [
        _Asset(str(name), part["desk"][0], part["date"].to_list(), part["close"].cast(pl.Float64).to_numpy())
        for (name,), part in ordered.group_by("asset", maintain_order=True)
    ]


def _with_rivals(found: pl.DataFrame, asset: _Asset, learn_until: date) -> pl.DataFrame:
    learn = int((found["date"] <= learn_until).sum())
    target = found["log_variance"].fill_null(float("nan")).to_numpy()
    forecasts = {"har_all": har(found), "ewma": ewma(asset.closes), "garch": garch(asset.closes, learn)}
    columns = {OWN_MEAN: own_mean(target)}
    for name in RIVALS:
        columns |= {name: forecasts[name], f"{name}{HALF_VARIANCE}": _retransformation(target, forecasts[name], learn)}
    return found.with_columns(pl.Series(name, values).fill_nan(None) for name, values in columns.items())


def _retransformation(target: Vector, forecasts: Vector, learn: int) -> Vector:
    """Return the retransformation of forecasts, the same on all days, from the targets known by day `learn`."""
    past = slice(0, max(learn - HORIZON, 0))
    both = np.isfinite(target[past]) & np.isfinite(forecasts[past])
    value = half_variance(target[past][both], forecasts[past][both]) if both.any() else np.nan
    return np.full(len(target), value)


def _lagged(values: Vector) -> Vector:
    """Move (days, ...) to the day on which they are known, `HORIZON` days later; 0 before."""
    return np.concatenate([np.zeros((min(HORIZON, len(values)), *values.shape[1:])), values[:-HORIZON]])

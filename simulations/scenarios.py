"""A scenario: one TOML file that says everything about an experiment, so that another data set is another file."""

import datetime as dt
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from metarisk_common.calibration import noise_multiplier_for
from metarisk_common.config import Frozen, load_toml, validate
from metarisk_common.errors import ConfigError
from metarisk_common.plan import InnerLoop, Mechanism, ModelSpec, OuterLoop, Plan, ScoreHistograms
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.schema import Schema
from metarisk_common.yardsticks import Field as RiskField

BUILT_IN = {
    "credit": "sba.toml",
    "credit-later": "sba_later.toml",
    "fraud": "fraud.toml",
    "volatility": "volatility.toml",
    "volatility-across": "volatility_across.toml",
}
"""Scenarios that come with the package, by the name `--scenario` takes."""


class DataFile(Frozen):
    """Where the table is; a relative path counts from the scenario's own folder.

    Either a `file`, as it stands or made into records by a `recipe`, or a `generator` of synthetic records; `options`
    are the recipe's or the generator's. See `simulations.tables`.
    """

    file: str | None = Field(default=None, min_length=1)
    generator: str | None = None
    recipe: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.file is None) == (self.generator is None):
            raise ValueError("data: give either file or generator")
        if self.recipe is not None and self.file is None:
            raise ValueError("data.recipe makes records of data.file; a generator takes none")
        if self.options and self.generator is None and self.recipe is None:
            raise ValueError("data.options belong to a generator or a recipe; a file takes none")
        return self


class Privacy(Frozen):
    """The budget of every bank, and the mechanism's public constants. The noise follows from them."""

    # JSON has no infinity: a budget of `inf` is written as text, which is read back as the number.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    epsilon: float = Field(default=3.0, gt=0)
    """`inf` switches the noise off."""
    delta: float = Field(default=1e-5, gt=0, lt=1e-2)
    max_grad_norm: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    sample_rate: float = Field(default=1.0, gt=0, le=1)


class FederatedMetrics(Frozen):
    """Score histograms that the banks release, charged to the same budget; see `metarisk_common.plan`."""

    bins: int = Field(default=20, ge=2, le=1000)
    noise_multiplier: float = Field(default=15.0, gt=0, allow_inf_nan=False)
    every: int = Field(default=0, ge=0)


class TimeSplit(Frozen):
    """Nobody learns from a record whose `column`, a number or a date, is above `learn_until`.

    An institution with fewer than `at_least` records up to then takes no part in training.
    """

    column: str = Field(min_length=1)
    at_least: int = Field(default=100, ge=2)
    learn_until: Annotated[int | float | dt.date, Field(union_mode="smart")]


class Splits(Frozen):
    """Institutions that take no part in training: their names, or how many to choose by a hash of their names.

    `later`: values of the public column `by` (a product in a later period, say) that nobody learns from. Where they are
    given, every institution is judged on its records of each of them, those that took part included. `time`: the same
    with a moment: all learn up to it, and every institution is judged on its records after it.
    """

    unseen: Annotated[int, Field(ge=1)] | tuple[str, ...] | None = None
    by: str | None = None
    later: tuple[str, ...] = ()
    time: TimeSplit | None = None

    @property
    def judges_what_came_later(self) -> bool:
        """Whether later records of every institution are judged, and not whole institutions that took no part."""
        return self.by is not None or self.time is not None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.by is None) != (not self.later):
            raise ValueError("by, a public column, and later, values of it that nobody learns from, go together")
        if self.by is not None and self.time is not None:
            raise ValueError("by with later, and time, are two ways to say what came later; give one of them")
        return self

    @field_validator("unseen", mode="before")
    @classmethod
    def _names_in_quotes(cls, value: object) -> object:
        if isinstance(value, list | tuple) and not all(isinstance(name, str) for name in value):
            raise ValueError('write the names in quotes, as ["13", "2"], or give a number of institutions')
        return value


class Evaluation(Frozen):
    """How unseen institutions are judged."""

    k: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 20, 50, 100), min_length=1)
    draws: int = Field(default=10, ge=1)
    seed: int = Field(default=1, ge=0)
    adaptation: Literal["none", "intercept", "head", "sgd", "prox", "prior", "auto"] = "auto"
    """How an initialization is adapted to k labels; see `metarisk_common.adapters`."""
    prior_variance: float = Field(default=0.3, gt=0, le=1e6)
    baselines: bool = True
    field: RiskField = "credit"
    """Whose measures and words are used; see `metarisk_common.yardsticks`."""
    min_positives: int = Field(default=1, ge=1)
    """Positives that the smallest support holds at least; see `metarisk_common.tasks.few_shot_draw`."""
    base_rate: float | None = Field(default=None, gt=0, lt=1)
    """Public share of positives that labels so selected stand for: every method is corrected to it where given."""
    amount: str | None = None
    """Column of what is at stake, for the value captured."""
    day: str | None = None
    """Column of days, as numbers or dates, for alerts a day and for `embargo`."""
    embargo: float | None = Field(default=None, ge=0)
    """Draws in time where given: every label adapted on is known at least so many days before what is judged."""
    least_judged: int = Field(default=50, ge=1)
    """Records that a draw in time leaves to judge by, at least."""

    @field_validator("k")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if 1 in value:
            raise ValueError("k = 1 cannot hold both outcomes; use 0, or 2 and more")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.embargo is not None and self.day is None:
            raise ValueError("embargo needs day, the column that says when a record is of")
        smallest = min((k for k in self.k if k > 0), default=None)
        if smallest is not None and smallest <= self.min_positives:
            raise ValueError(f"min_positives = {self.min_positives} must be below the smallest k above 0, {smallest}")
        return self


class Scenario(Frozen):
    """An experiment. Everything but the name, the data and the schema has a default that suits a scorecard."""

    name: str
    title: str = ""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the banks' noise: reproducible, and therefore NOT PRIVATE. Without it the system's randomness is used."""
    data: DataFile
    columns: Schema = Field(alias="schema")
    model: ModelSpec = ModelSpec()
    training: InnerLoop = InnerLoop(learning_rate=6.0)
    server: OuterLoop = OuterLoop(learning_rate=4.0, momentum=0.8)
    privacy: Privacy = Privacy()
    metrics: FederatedMetrics | None = None
    splits: Splits = Splits()
    evaluation: Evaluation = Evaluation()

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", value):
            raise ValueError(
                "must be lower-case letters, digits and hyphens, at most 63, for folders are named after it"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.task == "segment" and not self.columns.segments:
            raise ValueError('training.task = "segment" needs schema.segment and the public list schema.segments')
        if self.columns.regression and self.evaluation.base_rate is not None:
            raise ValueError("evaluation.base_rate is a share of positives, and the label is a number: leave it out")
        if self.columns.regression and self.evaluation.day is not None and self.evaluation.embargo is None:
            raise ValueError(
                "evaluation.embargo is missing: the label is a number and evaluation.day says when a record is of, so "
                "a draw at random would adapt on what comes after the records judged; say how long, in the unit of "
                "evaluation.day, until a label is known (0: at once)"
            )
        return self

    def plan(self, *, epsilon: float | None = None) -> Plan:
        """Build the training plan, with the noise multiplier that spends the budget over all rounds.

        Args:
            epsilon: in place of the scenario's own; `inf` for no noise and no clipping.

        Raises:
            ConfigError: the scenario's parts do not make a plan together: an algorithm that cannot be private, say.

        """
        privacy = self.privacy
        target = privacy.epsilon if epsilon is None else epsilon
        steps = self.server.rounds * self.training.local_steps
        noise, clip = 0.0, None
        if math.isfinite(target):
            clip = privacy.max_grad_norm
            noise = noise_multiplier_for(
                target, privacy.delta, sample_rate=privacy.sample_rate, steps=steps, others=self._metrics_events()
            )
        mechanism = Mechanism(
            sample_rate=privacy.sample_rate, max_grad_norm=clip, noise_multiplier=noise, delta=privacy.delta
        )
        parts = {
            "name": self.name,
            "data": self.columns,
            "model": self.model,
            "inner": self.training,
            "mechanism": mechanism,
            "outer": self.server,
            "metrics": self._histograms(noise_off=noise == 0),
        }
        return validate(parts, Plan, where=f"scenario '{self.name}'")

    def _histograms(self, *, noise_off: bool = False) -> ScoreHistograms | None:
        metrics = self.metrics
        if metrics is None:
            return None
        noise = 0.0 if noise_off else metrics.noise_multiplier
        return ScoreHistograms(bins=metrics.bins, noise_multiplier=noise, every=metrics.every)

    def _metrics_events(self) -> list[PrivacyEvent]:
        """What the histograms of a whole run cost: it is known before the training's noise is."""
        if self.metrics is None:
            return []
        bare = Plan(
            name=self.name, data=self.columns, mechanism=Mechanism(noise_multiplier=1.0),
            outer=self.server, metrics=self._histograms(),
        )  # fmt: skip
        return [event for event in bare.events() if event != bare.train_event()]

    def joint(self) -> "Scenario":
        """The same experiment as joint training: one step a round, as many steps and the same budget in all."""
        steps = self.server.rounds * self.training.local_steps
        one_step = {"algorithm": "fedavg", "local_steps": 1, "learning_rate": 1.0, "prox_strength": 0.0}
        training = self.training.model_copy(update=one_step)
        # 6 at momentum 0.9 did best for joint training in cross-validation over the training lenders of the loans.
        outer = {
            "rounds": steps,
            "learning_rate": 6.0,
            "optimizer": "momentum",
            "momentum": 0.9,
            "subtract_noise": False,
        }
        server = self.server.model_copy(update=outer)
        return self.model_copy(update={"training": training, "server": server, "metrics": None})


@dataclass(frozen=True)
class Split:
    """Names of institutions that take part and of those that do not."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def load_scenario(path: Path) -> Scenario:
    """Read a scenario.

    Raises:
        ConfigError: one line that names the file and the key.

    """
    return load_toml(path, Scenario)


def built_in(name: str) -> Path:
    """Return the path of a built-in scenario.

    Raises:
        ConfigError: there is none of that name.

    """
    if name not in BUILT_IN:
        raise ConfigError(f"there is no built-in scenario '{name}'; choose one of: {', '.join(sorted(BUILT_IN))}")
    return Path(str(files("simulations"))) / BUILT_IN[name]


def data_path(scenario: Scenario, scenario_path: Path) -> Path:
    """Return the file of the scenario's table; a relative path counts from the folder of the scenario's file.

    Raises:
        ConfigError: its table is generated, and no file.

    """
    if scenario.data.file is None:
        raise ConfigError(f"{scenario_path}: its table comes from generator '{scenario.data.generator}', not of a file")
    return scenario_path.parent / scenario.data.file


def split(scenario: Scenario, institutions: Sequence[str]) -> Split:
    """Decide who takes part, by name alone: nothing of the data and nothing random decides it.

    Raises:
        ConfigError: a named institution is not in the table, or too few are left on either side.

    """
    wanted = scenario.splits.unseen
    if isinstance(wanted, tuple):
        unknown = [name for name in wanted if name not in institutions]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise ConfigError(f"splits.unseen: there is no institution '{unknown[0]}' in the table{more}")
        unseen = tuple(sorted(set(wanted)))
    else:
        count = wanted if wanted is not None else max(1, len(institutions) // 4)
        unseen = tuple(sorted(sorted(institutions, key=lambda name: _digest(scenario.name, name))[:count]))
    seen = tuple(name for name in sorted(institutions) if name not in unseen)
    if not seen or not unseen:
        message = f"the table has {len(institutions)} institution(s); training and evaluation need at least one each"
        raise ConfigError(f"splits: {message}")
    return Split(seen, unseen)


def _digest(scenario: str, institution: str) -> str:
    return hashlib.sha256(f"{scenario}:{institution}".encode()).hexdigest()

"""A comparison: one TOML file that says which methods are trained at which epsilons, and on whom they are judged.

A method is the base scenario with some of its sections changed, and a way to adapt what was learned. Everything else
(table, schema, lenders, draws, budget) is the same for all methods, so that only the method can differ.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from metarisk_common.adapters import METHODS
from metarisk_common.config import Frozen, load_toml, validate
from metarisk_common.errors import ConfigError

from .scenarios import BUILT_IN, Scenario, built_in, load_scenario
from .scenarios import split as scenario_split

LOCAL = ("local-logistic", "local-logistic-binned", "local-lightgbm")
POOLED = ("pooled-logistic", "pooled-lightgbm")
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Epsilon = Annotated[float, Field(gt=0)]


def _once(key: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{key}: one of the values stands twice")


class Overrides(Frozen):
    """Keys of the base scenario's sections that a method sets otherwise."""

    training: dict[str, Any] = Field(default_factory=dict)
    server: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    privacy: dict[str, Any] = Field(default_factory=dict)
    encoding: dict[str, Any] = Field(default_factory=dict)
    """Of the scenario's `[schema.encoding]`: the same columns, made inputs in another way."""

    @field_validator("privacy")
    @classmethod
    def _budget_is_for_all(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"epsilon", "delta"} & value.keys()):
            raise ValueError(f"{taken[0]} is the same for all methods: leave it out, and set 'epsilons' of the method")
        return value


class Adapting(Frozen):
    """How an initialization is adapted to k labels; see `metarisk_common.adapters`."""

    method: str = "prox"
    prior_variance: float = Field(default=0.3, gt=0, le=1e6)

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"there is no such adaptation; choose one of: {', '.join(METHODS)}")
        return value


class MethodSpec(Overrides):
    """One way to learn an initialization and to adapt it."""

    title: str = Field(default="", max_length=80)
    like: str | None = None
    """Another method, with whose changes this one begins; one that only adapts otherwise shares its training."""
    adaptation: Adapting = Adapting()
    epsilons: tuple[Epsilon, ...] | None = None
    """Where it is trained; all of the comparison's where none are given."""
    at: dict[str, Overrides] = Field(default_factory=dict)
    """Further changes at one epsilon, by its text: `[methods.NAME.at.1.server]`."""

    @field_validator("at")
    @classmethod
    def _by_epsilon(cls, value: dict[str, Overrides]) -> dict[str, Overrides]:
        for key in value:
            try:
                good = float(key) > 0
            except ValueError:
                good = False
            if not good:
                raise ValueError("name an epsilon above 0 or inf, as in [methods.NAME.at.3]")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epsilons is not None:
            _once("epsilons", self.epsilons)
            strangers = [key for key in self.at if float(key) not in self.epsilons]
            if strangers:
                raise ValueError(f"at.{strangers[0]}: the method is not trained at that epsilon")
        return self


class Lenders(Frozen):
    """On whom methods are judged.

    `folds`: the scenario's training lenders in turn, each judged by what was learned without it; its unseen lenders
    are not touched, unless `over = "all"` deals them to folds as well. Nobody is judged by what was learned from them
    either way; but settings that were chosen with folds over the training lenders have seen those, so that of `all`
    only the unseen ones had no part in the choice. And whoever chooses by `all` has no lenders left to be judged on.
    `unseen`: the scenario's unseen lenders. `segments`: the training lenders' records of the segments named in
    `unseen`, of which no record is learned from.
    """

    kind: Literal["folds", "unseen", "segments"] = "folds"
    folds: int = Field(default=4, ge=2, le=1000)
    over: Literal["training", "all"] = "training"
    unseen: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "segments") != bool(self.unseen):
            raise ValueError('kind = "segments" goes with unseen = ["..."], the segments that nobody learns from')
        for key in ("folds", "over"):
            if self.kind != "folds" and key in self.model_fields_set:
                raise ValueError(f'{key} goes with kind = "folds"')
        return self


class Judging(Frozen):
    """What methods are judged by. Every method has the same draws of the same records."""

    k: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 10, 20, 50, 100, 200), min_length=1)
    draws: int = Field(default=10, ge=1)
    seed: int = Field(default=1, ge=0)
    gain_k: int = Field(default=50, ge=0)
    """Labels at which the gain of each lender is shown."""
    min_judged: int = Field(default=100, ge=4)
    """Records that must be left to judge by beyond the most labels; whoever has fewer is left out, and named."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 1 in self.k:
            raise ValueError("k = 1 cannot hold both outcomes; use 0, or 2 and more")
        _once("k", self.k)
        if self.gain_k not in self.k:
            raise ValueError(f"gain_k = {self.gain_k} is none of the numbers of labels in k")
        return self


class Comparison(Frozen):
    """Methods x epsilons x seeds (x folds)."""

    name: Name
    title: str = ""
    scenario: str = Field(min_length=1)
    """A built-in scenario's name, or a scenario's TOML file; a relative path counts from this file's folder."""
    reference: str
    """The method that all others are compared with."""
    epsilons: tuple[Epsilon, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(1,), min_length=1)
    """Of the noise: reproducible, so nothing that is learned here protects anyone."""
    split: Lenders = Lenders()
    evaluation: Judging = Judging()
    baselines: tuple[Literal[LOCAL + POOLED], ...] = LOCAL + POOLED  # type: ignore[valid-type]
    methods: dict[Name, MethodSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("epsilons", "seeds", "baselines"):
            _once(key, getattr(self, key))
        taken = sorted(self.methods.keys() & set(LOCAL + POOLED))
        if taken:
            raise ValueError(f"methods.{taken[0]}: is the name of a baseline; choose another")
        if self.reference not in {*self.methods, *self.baselines}:
            raise ValueError(f"reference: '{self.reference}' is none of the methods and baselines")
        for name, method in self.methods.items():
            if method.like is not None and (method.like not in self.methods or self.methods[method.like].like):
                raise ValueError(f"methods.{name}.like: name another method, one that is not itself like another")
            foreign = [key for key in method.at if float(key) not in self.epsilons_of(name)]
            if foreign:
                raise ValueError(f"methods.{name}.at.{foreign[0]}: the method is not trained at that epsilon")
        return self

    def epsilons_of(self, name: str) -> tuple[float, ...]:
        """Return the epsilons at which a method is trained."""
        method = self.methods[name]
        own = self.methods[method.like].epsilons if method.epsilons is None and method.like else method.epsilons
        return self.epsilons if own is None else own


@dataclass(frozen=True)
class Loaded:
    """A comparison with what its file leads to: the base scenario and where that is, for its table's path."""

    comparison: Comparison
    base: Scenario
    base_path: Path

    def scenario(self, method: str, epsilon: float) -> Scenario:
        """Return the base scenario as a method changes it at an epsilon.

        Raises:
            ConfigError: a changed key is unknown, or its value does not fit.

        """
        values = self.base.model_dump(by_alias=True)
        where = f"methods.{method}"
        named = [self.comparison.methods[method].like, method]
        specs = [self.comparison.methods[name] for name in named if name is not None]
        changes = [
            change
            for spec in specs
            for change in (spec, *(more for key, more in spec.at.items() if float(key) == epsilon))
        ]
        for change in changes:
            for section in Overrides.model_fields:
                place = values["schema"] if section == "encoding" else values
                place[section] = {**place[section], **getattr(change, section)}
        values["privacy"]["epsilon"] = epsilon
        values["metrics"] = None
        return validate(values, Scenario, where=where)


@dataclass(frozen=True)
class Part:
    """Who is learned from and who is judged: names of lenders, and the segments that nobody learns from."""

    training: tuple[str, ...]
    judged: tuple[str, ...]
    segments: tuple[str, ...] = ()


def load_comparison(path: Path) -> Loaded:
    """Read a comparison and the scenario that it names, and check that each method can be built.

    Raises:
        ConfigError: one line that names the file and the key.

    """
    comparison = load_toml(path, Comparison)
    known = comparison.scenario in BUILT_IN
    base_path = built_in(comparison.scenario) if known else path.parent / comparison.scenario
    loaded = Loaded(comparison, load_scenario(base_path), base_path)
    if comparison.split.kind == "segments" and loaded.base.columns.segment is None:
        raise ConfigError(f'{path}: split.kind = "segments" needs a scenario whose schema names a segment column')
    for name, method in comparison.methods.items():
        for epsilon in comparison.epsilons_of(name):
            try:
                plan = loaded.scenario(name, epsilon).plan()
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            except ValueError as error:
                raise ConfigError(f"{path}: methods.{name} at epsilon {epsilon:g}: {_reason(error)}") from None
            if method.adaptation.method == "prior" and not plan.outer.learn_prior:
                raise ConfigError(f'{path}: methods.{name}: adaptation "prior" needs server.learn_prior = true')
    return loaded


def parts_of(loaded: Loaded, institutions: Sequence[str]) -> list[Part]:
    """Decide who is learned from and who is judged, by names alone.

    Lenders are dealt to folds in the order of a hash of their names, so sizes of folds differ by one at most.

    Raises:
        ConfigError: there are fewer lenders than folds, or the scenario's own split does not fit the table.

    """
    wanted = loaded.comparison.split
    base = scenario_split(loaded.base, institutions)
    if wanted.kind == "unseen":
        return [Part(base.seen, base.unseen)]
    if wanted.kind == "segments":
        return [Part(base.seen, base.seen, wanted.unseen)]
    lenders = base.seen if wanted.over == "training" else tuple(sorted(institutions))
    if len(lenders) < wanted.folds:
        raise ConfigError(f"split.folds: {wanted.folds} folds need as many lenders, and there are {len(lenders)}")
    dealt = sorted(lenders, key=lambda name: hashlib.sha256(f"{loaded.base.name}/fold:{name}".encode()).hexdigest())
    folds = [tuple(sorted(dealt[number :: wanted.folds])) for number in range(wanted.folds)]
    return [Part(tuple(name for name in lenders if name not in fold), fold) for fold in folds]


def titles(loaded: Loaded) -> Mapping[str, str]:
    """Name every method and baseline as tables do."""
    own = {
        "local-logistic": "Own logistic regression",
        "local-logistic-binned": "Own logistic regression, same inputs",
        "local-lightgbm": "Own LightGBM",
        "pooled-logistic": "Pooled logistic regression",
        "pooled-lightgbm": "Pooled LightGBM (oracle)",
    }
    found = {name: method.title or name for name, method in loaded.comparison.methods.items()}
    return found | {name: own[name] for name in loaded.comparison.baselines}


def _reason(error: ValueError) -> str:
    """Return the text of a validation error without Pydantic's frame."""
    details = getattr(error, "errors", None)
    return str(details()[0]["msg"]).removeprefix("Value error, ") if details is not None else str(error)

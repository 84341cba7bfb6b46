"""The training plan: everything public about a run. Its hash is what a bank approves and every message carries.

No field may derive from a bank's records: sample rate, steps, clip norm and learning rate are constants here,
so that nothing a bank does can depend on a private count (the contract, point 1).
"""

import json
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .config import Frozen, load_toml, validate
from .errors import ConfigError
from .privacy import PrivacyEvent
from .schema import Schema, canonical_hash, canonical_json, left_out_where_unused
from .tasks import WHOLE_INSTITUTION

PROTOCOL: Final = 1
"""Version of plans and messages; both sides refuse any other."""


class ModelSpec(Frozen):
    """`scorecard`: one linear layer on the binned inputs. `mlp`: hidden layers with tanh between."""

    kind: Literal["scorecard", "mlp"] = "scorecard"
    hidden: tuple[int, ...] = ()
    base_rate: float = Field(default=0.18, gt=0, lt=1)
    """Publicly known share of positives: where the output starts."""
    init_seed: int = Field(default=0, ge=0)
    """Public seed of the hidden layers' starting weights: every party must start from the same model."""
    loss: Literal["logistic", "squared"] = "logistic"
    """`squared` (half the squared error) is for a label that is a number; the output then starts at its centre."""
    positive_weight: float = Field(default=1.0, gt=0, le=1e4, allow_inf_nan=False)
    """What a positive record's log-loss is multiplied with: public, for outcomes that are rare. Scores stay the
    probabilities that they are; see `models.weighted_losses`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "scorecard" and self.hidden:
            raise ValueError("a scorecard has no hidden layers: leave out 'hidden' or set kind = \"mlp\"")
        if self.kind == "mlp" and (not self.hidden or min(self.hidden) < 1):
            raise ValueError("an mlp needs hidden = [width, ...] with positive widths")
        if self.loss == "squared" and self.positive_weight != 1:
            raise ValueError('positive_weight does nothing under loss = "squared", which knows no positives')
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_where_unused(handler(self), {"loss": "logistic", "positive_weight": 1.0})


class InnerLoop(Frozen):
    """What a bank does with one order: `local_steps` steps of (private) SGD from the meta-parameters.

    `metarisk_common.algorithms` says what each algorithm makes of them.
    """

    algorithm: Literal["reptile", "fedavg", "prox", "fomaml", "anil", "maml", "meta_sgd"] = "reptile"
    task: Literal["institution", "segment"] = "institution"
    local_steps: int = Field(default=5, ge=1, le=10_000)
    learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Size of a step; under `meta_sgd`, where the learned sizes start."""
    prox_strength: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of the pull towards the meta-parameters in each step of `prox`, and of no other algorithm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.algorithm != "prox" and self.prox_strength:
            raise ValueError(
                f'prox_strength does nothing under algorithm = "{self.algorithm}": leave it out or set '
                'algorithm = "prox"'
            )
        if self.algorithm == "prox" and not self.prox_strength:
            raise ValueError('algorithm = "prox" needs prox_strength above 0; with none it is "reptile"')
        if self.learning_rate * self.prox_strength > 1:
            raise ValueError(
                "learning_rate * prox_strength must be at most 1: beyond, the pull towards the meta-parameters "
                "overshoots them"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_where_unused(handler(self), {"prox_strength": 0.0})

    @property
    def by_episode(self) -> bool:
        """Whether the algorithm adapts on one part of a task's records, the support, and judges on the other."""
        return self.algorithm in {"fomaml", "anil", "maml", "meta_sgd"}

    @property
    def second_order(self) -> bool:
        """Whether the algorithm differentiates through its own steps, which no private step allows."""
        return self.algorithm in {"maml", "meta_sgd"}


class Mechanism(Frozen):
    """One private step: Poisson rate, clip, noise. See `client.dpsgd` for what is released and its sensitivity."""

    sample_rate: float = Field(default=1.0, gt=0, le=1)
    max_grad_norm: float | None = Field(default=0.7, gt=0, allow_inf_nan=False)
    """Per-record L2 clip; none only when there is no noise either."""
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    """Standard deviation of the noise over `max_grad_norm`; 0 means that nothing is private."""
    delta: float = Field(default=1e-5, gt=0, lt=1e-2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_grad_norm is None and self.noise_multiplier > 0:
            raise ValueError("noise without max_grad_norm protects nobody: give a clip norm")
        return self


class OuterLoop(Frozen):
    """What the server does with a round's meta-updates. See `server.robust` for the aggregators."""

    rounds: int = Field(default=20, ge=1, le=100_000)
    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = "momentum"
    learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    subtract_noise: bool = False
    """Whether adam or yogi leaves the banks' noise, whose variance is public, out of its second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds over which the step size rises evenly, before the first one with the schedule's full size."""
    tail_averaging: float = Field(default=0.0, ge=0, le=1)
    """Share of the rounds, the last ones, over whose meta-parameters the run's result is the mean; 0: the last ones."""
    learn_prior: bool = False
    """Whether the last round's record tells how far the banks differ, from the updates that they released."""
    weighting: Literal["declared_size", "equal"] = "declared_size"
    max_declared_size: int = Field(default=1_000_000, ge=1)
    """Largest size that the server believes, so that no bank can outweigh the others by a claim."""
    aggregator: Literal["mean", "median", "trimmed_mean", "norm_bounded_mean"] = "mean"
    trim: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of a round's updates that a trimmed mean cuts at each end of every coordinate, rounded down: of fewer than
    `1 / trim` updates nothing is cut."""
    max_update_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """L2 norm with which an update counts at most in a norm-bounded mean; a larger one is scaled down to it."""
    min_reports: int = Field(default=1, ge=1)
    """Quorum: a round with fewer admitted reports leaves the meta-parameters as they are."""
    deadline_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        chosen = f'aggregator = "{self.aggregator}"'
        if self.aggregator in {"median", "trimmed_mean"} and self.weighting != "equal":
            raise ValueError(
                f'{chosen} needs weighting = "equal": it withstands a number of lying banks because each counts once, '
                "and by weight a bank could buy influence with the size that it declares"
            )
        if self.aggregator == "norm_bounded_mean" and self.max_update_norm is None:
            raise ValueError(f"{chosen} needs max_update_norm, the largest L2 norm with which an update may count")
        if self.aggregator != "norm_bounded_mean" and self.max_update_norm is not None:
            raise ValueError(
                f'max_update_norm does nothing under {chosen}: leave it out or set aggregator = "norm_bounded_mean"'
            )
        if self.aggregator != "trimmed_mean" and self.trim != OuterLoop.model_fields["trim"].default:
            raise ValueError(f'trim does nothing under {chosen}: leave it out or set aggregator = "trimmed_mean"')
        if self.subtract_noise and self.optimizer not in {"adam", "yogi"}:
            raise ValueError(
                f'subtract_noise does nothing under optimizer = "{self.optimizer}", which divides by no second '
                'moment: leave it out or set optimizer = "adam" or "yogi"'
            )
        if self.subtract_noise and self.aggregator != "mean":
            raise ValueError(
                f'subtract_noise needs aggregator = "mean": how much noise is left under {chosen} depends on the '
                "updates themselves and is not known"
            )
        if self.warmup_rounds >= self.rounds:
            raise ValueError("warmup_rounds must be fewer than rounds")
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        came_later = (
            "aggregator", "trim", "max_update_norm", "subtract_noise", "warmup_rounds", "tail_averaging", "learn_prior",
        )  # fmt: skip
        return left_out_where_unused(handler(self), {name: OuterLoop.model_fields[name].default for name in came_later})


class ScoreHistograms(Frozen):
    """Federated metrics: two noised score histograms from each bank, after the last round and at the rounds named.

    `noise_multiplier`: standard deviation of each cell's noise over what one privacy unit can change. The histograms
    count the very records that are learned from. See `client.scoring` for what is released and its sensitivity.
    """

    bins: int = Field(default=20, ge=2, le=1000)
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    every: int = Field(default=0, ge=0)
    """Also after every so many rounds; 0: only after the last."""


class Plan(Frozen):
    """A run, complete: the data's schema, the model, what banks do, what the server does."""

    protocol: Literal[1] = PROTOCOL
    name: str = Field(min_length=1, max_length=100)
    data: Schema
    model: ModelSpec = ModelSpec()
    inner: InnerLoop = InnerLoop()
    mechanism: Mechanism
    outer: OuterLoop = OuterLoop()
    metrics: ScoreHistograms | None = None
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.inner.task == "segment" and not self.data.segments:
            raise ValueError('task = "segment" needs the schema to name a segment column and list its public segments')
        algorithm, mechanism = self.inner.algorithm, self.mechanism
        if self.data.regression != (self.model.loss == "squared"):
            raise ValueError(
                'model.loss must be "squared" where the label is a number (kind = "numeric"), and "logistic" where it '
                "has two outcomes"
            )
        if self.data.regression and self.metrics is not None:
            raise ValueError("metrics are histograms of the scores of two outcomes, and this label is a number")
        if self.data.regression and self.outer.learn_prior:
            raise ValueError("learn_prior knows the curvature of the logistic loss only: leave it out for a number")
        if self.outer.learn_prior and self.model.kind != "scorecard":
            raise ValueError('learn_prior needs kind = "scorecard": a prior is told by the column that a weight is for')
        if self.outer.learn_prior and self.inner.by_episode:
            raise ValueError(
                f'learn_prior cannot read the updates of algorithm = "{algorithm}": leave it out or set algorithm = '
                '"reptile", "fedavg" or "prox"'
            )
        if self.inner.second_order and (mechanism.noise_multiplier > 0 or mechanism.max_grad_norm is not None):
            raise ValueError(
                f'algorithm = "{algorithm}" differentiates through its own steps and cannot be private: it needs '
                "noise_multiplier = 0 and no max_grad_norm (in a scenario, epsilon = inf); the first-order "
                '"fomaml" can be private'
            )
        if algorithm == "anil" and self.model.kind == "scorecard":
            raise ValueError(
                'algorithm = "anil" adapts the head alone, and a scorecard is nothing but head: set '
                'algorithm = "fomaml", which is the same there, or kind = "mlp"'
            )
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return left_out_where_unused(handler(self), {"metrics": None})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of every bank's tasks: the public segments, or "" for all of the bank's records as one."""
        return self.data.segments if self.inner.task == "segment" else (WHOLE_INSTITUTION,)

    @property
    def total_steps(self) -> int:
        """Private steps of a bank that takes part in every round."""
        return self.outer.rounds * self.inner.local_steps

    def evaluates_after(self, round_number: int) -> bool:
        """Whether the banks are asked for score histograms after this round."""
        if self.metrics is None:
            return False
        last = round_number == self.outer.rounds
        return last or (self.metrics.every > 0 and round_number % self.metrics.every == 0)

    def train_event(self) -> PrivacyEvent:
        """What answering one round's training order costs a bank: all its local steps, for every record.

        So it is under `fomaml` and `anil`, too: a record of the support pays for each of these steps, one of the query
        for a single one, and no record is on both sides (`client.episodes`).
        """
        mechanism = self.mechanism
        return PrivacyEvent(
            "poisson_gaussian", mechanism.noise_multiplier, mechanism.sample_rate, self.inner.local_steps
        )

    def evaluate_event(self) -> PrivacyEvent:
        """What answering one order for score histograms costs.

        Raises:
            ValueError: the plan asks for none.

        """
        if self.metrics is None:
            raise ValueError("the plan asks for no score histograms")
        return PrivacyEvent("gaussian_histograms", self.metrics.noise_multiplier, 1.0, 1)

    def events(self) -> list[PrivacyEvent]:
        """What a bank spends that answers every order of the plan."""
        found = []
        for number in range(1, self.outer.rounds + 1):
            found.append(self.train_event())
            if self.evaluates_after(number):
                found.append(self.evaluate_event())
        return found

    def hash(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal: what a bank approves."""
        return canonical_hash(self)

    def to_json(self) -> str:
        """The canonical text whose digest is `hash`."""
        return canonical_json(self)


def read_plan(path: Path) -> Plan:
    """Read a plan from its JSON file, as a run writes it, or from TOML, as a person does; one plan has one hash.

    Raises:
        ConfigError: the file is missing or is no plan of this protocol.

    """
    if path.suffix == ".toml":
        return load_toml(path, Plan)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; a run's folder holds its plan as plan.json") from None
    except (OSError, ValueError):
        raise ConfigError(f"{path}: cannot be read as a plan; expected the JSON that a run writes") from None
    return validate(values, Plan, where=str(path))

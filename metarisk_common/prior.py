"""The learned prior: how far institutions differ in each column's weights, from what they released anyway.

An empirical Bayes estimate, of the kind that ARUBA takes from the spread of tasks (Khodak, Balcan and Talwalkar 2019,
"Adaptive Gradient-Based Meta-Learning Methods", section 3), but with the noise in every figure known and taken out.

A bank b of n records whose weights would best be w_b releases, over R rounds at about the same meta-parameters w,
updates with the mean u_b. To first order, with J the information of a record (below), and for each of a round's K steps
of size a, D = I - a (J + L), L being the pull of `prox` and else 0,

    G = a (I + D + ... + D^(K-1)),    u_b ~ N(G J (w_b - w),  G V G / n + N_b / R),
    N_b = a^2 sum over k < K of D^k (s^2 I + (1 - q) Q / (q n)) D^k,    s^2 = S (z C)^2 / (q n)^2,

where V is the covariance of a record's clipped gradient given its inputs, Q its mean square over all records, s^2 the
known variance of the noise in one step and the term beside it that of Poisson sampling. Then (G J)^-1 u_b estimates
w_b - w without bias, and its covariance is public. With w_b ~ N(w + m, T), T diagonal with one tau^2 for each column's
inputs, tau^2 is what makes these estimates most likely: by restricted maximum likelihood (Patterson and Thompson 1971),
which has no bias from fitting m. For K = 1 and no Poisson sampling this is the mean gradient's law
N(-n H m, n^2 H T H + n H + s^2 I) with H = J.

J and V are public: the mean over records as the schema claims them (`moments`) of p (1 - p) c x x' and of
p (1 - p) c^2 x x', at the learned weights' own p. The c counts what clipping leaves of the difference between the two
outcomes' gradients. Where institutions differ, a record's outcome answers less to the shared weights than one bank's
does to its own: with v = x' T x the slope of the mean over banks is p (1 - p) / sqrt(1 + pi v / 8) (MacKay 1992, "The
Evidence Framework Applied to Classification Networks", equation 10), so both means are taken once more with the T
found. Two passes is a choice, made on simulated worlds where banks' logits differ by 1.1 (one standard deviation):
there one pass found a fifth too little, two 0 to 14% too much, by column, and more passes 7 to 24% too much, because
what an update holds beyond first order passes for spread. With few banks the estimate itself is rough: to a factor of
1.5 with 80.

Columns are taken to be independent, as they are in that sample, so every column is estimated by itself, with the whole
covariance of its own inputs. Columns that go together in truth, as a year as a number and as a category, explain each
other's differences and are both overstated.

Everything here comes of released, noised updates and public constants: post-processing, without cost to privacy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import expit

from .features import Encoder
from .moments import public_inputs
from .params import Params
from .plan import Plan

Array = npt.NDArray[np.float64]

FEWEST: Final = 3
"""Institutions below which nothing is said: a spread around a mean that is fitted, too."""

MOST_INPUTS: Final = 2000
"""Inputs above which nothing is said: the public sample and its moments would take gigabytes."""

_ROWS: Final = 20_000
_WEAKEST: Final = 1e-4
_MOST_DIRECTIONS: Final = 64
_LOG_BOUNDS: Final = (math.log(1e-8), math.log(1e4))
_TRIED: Final = 60
_PASSES: Final = 2


@dataclass(frozen=True)
class LearnedPrior:
    """How far institutions' weights differ, by the column that a weight is for.

    Attributes:
        groups: columns, as in `Encoder.groups`, each once, "intercept" among them.
        tau2: variance of the weights of a group's inputs over institutions; 0 where none can be seen.
        rounds: of the run's last rounds, how many the estimate comes from.
        institutions: how many it comes from.

    """

    groups: tuple[str, ...]
    tau2: tuple[float, ...]
    rounds: int
    institutions: int

    def __post_init__(self) -> None:
        """Refuse what cannot be a prior."""
        if len(self.groups) != len(self.tau2) or len(set(self.groups)) != len(self.groups):
            raise ValueError("a prior needs one tau2 for each group, and each group once")
        if not all(0 <= value < math.inf for value in self.tau2) or min(self.rounds, self.institutions) < 1:
            raise ValueError("a prior needs finite tau2 at or above 0, from at least one round and institution")

    def variances(self, groups_of_inputs: Sequence[str]) -> Array:
        """Give each input's prior variance, (width,) float64, from its group's name (`Encoder.groups`).

        Raises:
            ValueError: the prior knows nothing of a group: it was learned for another schema.

        """
        known = dict(zip(self.groups, self.tau2, strict=True))
        foreign = sorted(set(groups_of_inputs) - known.keys())
        if foreign:
            raise ValueError(f"the learned prior has no group '{foreign[0]}'; it was learned for another schema")
        return np.array([known[group] for group in groups_of_inputs])

    def to_json(self) -> dict[str, Any]:
        """Give a JSON object, which `from_json` takes."""
        return {
            "groups": list(self.groups),
            "tau2": list(self.tau2),
            "rounds": self.rounds,
            "institutions": self.institutions,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            ValueError: it is none of those.

        """
        try:
            groups, tau2 = tuple(str(name) for name in value["groups"]), tuple(float(each) for each in value["tau2"])
            return cls(groups, tau2, int(value["rounds"]), int(value["institutions"]))
        except (KeyError, TypeError):
            raise ValueError("not a learned prior: expected groups, tau2, rounds and institutions") from None


@dataclass(frozen=True)
class Released:
    """What one institution released over the rounds that count: the mean of its updates, and of how many.

    Attributes:
        mean_update: named and shaped as the meta-parameters.
        rounds: how many updates it is the mean of.
        declared_size: public.

    """

    mean_update: Params
    rounds: int
    declared_size: int


def gradient_noise_variance(plan: Plan, declared_size: int) -> float:
    """Variance of the known noise in one coordinate of a step's gradient, the mean over the bank's S tasks.

    `S (z C)^2 / (q n)^2`, for the batch of each task is an S-th of the expected `q n`; 0 for a plan without noise.
    """
    mechanism = plan.mechanism
    if mechanism.max_grad_norm is None:
        return 0.0
    std = mechanism.noise_multiplier * mechanism.max_grad_norm / (mechanism.sample_rate * declared_size)
    return len(plan.tasks) * std**2


def estimate_prior(plan: Plan, meta_params: Params, released: Sequence[Released], *, rounds: int) -> LearnedPrior:
    """Estimate how far institutions differ, for a scorecard learned by reptile, fedavg or prox.

    Args:
        plan: the run's plan.
        meta_params: where the updates were taken, to first order: the learned initialization.
        released: of each institution.
        rounds: how many of the last rounds `released` may come from; for the record only.

    Raises:
        ValueError: fewer than `FEWEST` institutions, more than `MOST_INPUTS` inputs, or a plan whose updates this
            cannot read.

    """
    if plan.model.kind != "scorecard" or plan.inner.by_episode:
        raise ValueError("a prior can be learned for a scorecard under reptile, fedavg or prox only")
    if len(released) < FEWEST:
        raise ValueError(f"a prior needs at least {FEWEST} institutions")
    encoder = Encoder(plan.data)
    if encoder.width > MOST_INPUTS:
        raise ValueError(f"a prior can be learned for at most {MOST_INPUTS} inputs")
    (name,) = meta_params
    x = public_inputs(plan.data, _ROWS)
    slope, variance, square = _record_weights(x, np.asarray(meta_params[name], np.float64).reshape(-1), plan)
    updates = np.array([np.asarray(each.mean_update[name], np.float64).reshape(-1) for each in released])
    places_of = {group: np.array([each == group for each in encoder.groups]) for group in encoder.groups}
    tau2 = dict.fromkeys(places_of, 0.0)
    for _ in range(_PASSES):
        spread = x**2 @ np.array([tau2[group] for group in encoder.groups])
        flatter = 1 / np.sqrt(1 + math.pi / 8 * spread)
        tau2 = {
            group: _tau2_of_group(
                plan, released, updates[:, own], x[:, own], (slope * flatter, variance * flatter, square)
            )
            for group, own in places_of.items()
        }
    return LearnedPrior(tuple(tau2), tuple(tau2.values()), rounds, len(released))


def _tau2_of_group(
    plan: Plan, released: Sequence[Released], updates: Array, x: Array, weights: tuple[Array, Array, Array]
) -> float:
    moments = [x.T @ (weight[:, None] * x) / len(x) for weight in weights]
    return _most_likely(*_estimates(plan, released, updates, *moments))


def _record_weights(x: Array, weights: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """Each record's `p (1 - p) c`, `p (1 - p) c^2` and expected squared residual after clipping, (rows,)."""
    p = expit(x @ weights)
    clip = math.inf if plan.mechanism.max_grad_norm is None else plan.mechanism.max_grad_norm
    norms = np.linalg.norm(x, axis=1)
    of_positive, of_negative = (np.minimum(1.0, clip / (norms * away)) for away in (1 - p, p))
    left = of_positive * (1 - p) + of_negative * p
    clipped_square = of_positive**2 * (1 - p) + of_negative**2 * p
    return p * (1 - p) * left, p * (1 - p) * left**2, p * (1 - p) * clipped_square


def _estimates(
    plan: Plan, released: Sequence[Released], updates: Array, information: Array, covariance: Array, square: Array
) -> tuple[Array, Array]:
    """Every institution's `(G J)^-1 u`, (institutions, d), and its covariance, in the directions that J tells best.

    At most 64 of them: a group of hundreds of inputs is judged by those that its records say most of.
    """
    inner, rate = plan.inner, plan.mechanism.sample_rate
    values, vectors = np.linalg.eigh(information)
    strong = (values > _WEAKEST * values[-1]) & (np.arange(len(values)) >= len(values) - _MOST_DIRECTIONS)
    values, vectors = values[strong], vectors[:, strong]
    v, drawn = (vectors.T @ matrix @ vectors for matrix in (covariance, square))
    powers = (1 - inner.learning_rate * (values + inner.prox_strength)) ** np.arange(inner.local_steps)[:, None]
    gain = inner.learning_rate * powers.sum(axis=0)
    each_step = inner.learning_rate**2 * powers.T @ powers
    per_unit = gain * values
    errors = []
    for one in released:
        noise = gradient_noise_variance(plan, one.declared_size) * np.eye(len(values))
        sampling = (1 - rate) / (rate * one.declared_size) * drawn
        found = np.outer(gain, gain) * v / one.declared_size + each_step * (noise + sampling) / one.rounds
        errors.append(found / np.outer(per_unit, per_unit))
    return updates @ vectors / per_unit, np.array(errors)


def _most_likely(places: Array, errors: Array) -> float:
    """The tau^2 that makes places ~ N(m, errors + tau^2 I) most likely, m restricted out; 0 where none does better."""
    spread, turns = np.linalg.eigh(errors)  # (institutions, d), (institutions, d, d)
    turned = np.einsum("bij,bi->bj", turns, places)

    def cost(tau2: float) -> float:
        precision = 1 / (spread + tau2)
        information = np.einsum("bij,bj,bkj->ik", turns, precision, turns)
        middle = np.linalg.solve(information, np.einsum("bij,bj->i", turns, precision * turned))
        rest = turned - np.einsum("bij,i->bj", turns, middle)
        fit = float(np.sum(precision * rest**2) - np.sum(np.log(precision)))
        return fit + float(np.linalg.slogdet(information)[1])

    tried = np.linspace(*_LOG_BOUNDS, _TRIED)
    best = int(np.argmin([cost(math.exp(value)) for value in tried]))
    around = tried[max(best - 1, 0)], tried[min(best + 1, _TRIED - 1)]
    found = minimize_scalar(lambda value: cost(math.exp(value)), bounds=around, method="bounded")
    return 0.0 if found.fun >= cost(0.0) else math.exp(float(found.x))

"""Adapting a run's initialization to a few labelled records of the bank. What comes out stays inside the bank.

The labels are k records drawn at random from the table. Where that was filled with an eye on the outcome, so that it
has not the portfolio's own share of positives, a base rate says what that is (`metarisk_common.prior_correction`).

Besides the model, `DRAWS` adaptations to random halves of the same labels are kept: a mean over half of the records,
drawn without replacement, varies from draw to draw as much as one over all of them varies from sample to sample
(balanced half samples, McCarthy 1969), so they show which of a model's reasons would have been others with other
labels.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from metarisk_common.adaptation import DEFAULT_TAU2
from metarisk_common.adapters import METHODS, PRIOR_SHARE, Adapted
from metarisk_common.config import validate
from metarisk_common.errors import ConfigError, DataError, IntegrityError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import meta_shapes
from metarisk_common.manifest import JOURNAL_FILE, PARAMS_FILE, STAMP
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.prior import LearnedPrior
from metarisk_common.prior_correction import adapt_selected, offset

from .artifacts import Labels, Method, Model, ModelManifest, Origin, check_name, data_fingerprint, write_model
from .config import Institution
from .dataset import load_dataset, load_source
from .points import PointScale
from .rng import SecureRandom
from .verify import verify_export

DRAWS: Final = 20
"""Adaptations to halves of the labels, kept with every model."""

_PACKAGES: Final = ("metarisk-federated", "torch", "numpy", "scipy", "polars", "safetensors")
_SEED_BITS: Final = 63


@dataclass(frozen=True)
class Start:
    """An initialization, the plan that made it, and the prior that its run has learned, if it has.

    `params`: NumPy arrays by name, the learned rates of `meta_sgd` among them, which `sgd` takes its steps by.
    """

    params: Params
    plan: Plan
    origin: Origin
    prior: LearnedPrior | None


@dataclass(frozen=True)
class Choice:
    """How to adapt.

    `k`: labelled records, None for all; `segment`: of which the records are, None for any; `seed`: chooses the records,
    None for one from the operating system, which is recorded; `base_rate`: the true share of positives where the
    table's is another, None where the table is a plain sample.
    """

    k: int | None
    method: str = "auto"
    segment: str | None = None
    seed: int | None = None
    points: PointScale = field(default_factory=PointScale)
    base_rate: float | None = None


@dataclass(frozen=True)
class _Chosen:
    """`x`: (k, width) and `y`: (k,) labelled records, of `available`; `left_out` rows of the table did not fit.

    `share`: of positives among the available ones, of which the k are a random part.
    """

    x: np.ndarray
    y: np.ndarray
    available: int
    left_out: int
    share: float = 0.0


def read_start(export: Path, key: Path | None) -> Start:
    """Read a signed export's folder with the operator's public key, or a safetensors file, which nobody has signed.

    Raises:
        ConfigError: it is not there, a folder comes without a key, or a file with one.
        IntegrityError: it is not what was signed, or not what an export writes.

    """
    if export.is_dir():
        if key is None:
            raise ConfigError(f"{export}: give the operator's public key as --key, to check what they have signed")
        return _signed(export, key)
    if key is not None:
        raise ConfigError(f"{export}: only an export's folder is signed; name that folder, or leave out --key")
    return _unsigned(export)


def adapt_model(
    institution: Institution,
    start: Start,
    choice: Choice,
    *,
    data: Path | None = None,
    name: str | None = None,
    on_draw: Callable[[int, int], None] | None = None,
) -> Model:
    """Adapt to records of the bank, and write the model as the next version of its name.

    Args:
        institution: the bank's folder.
        start: what to adapt.
        choice: to how many labels, and how.
        data: the table; by default the bank's own.
        name: the model's name without its number; by default made of the plan's.
        on_draw: called with `(done, total)` adaptations.

    Raises:
        ConfigError: the choice does not fit the plan, or the model cannot be written.
        DataError: the table does not fit the plan's schema, or has too few records.

    """
    title = check_name(name) if name is not None else _name_of(start.plan)
    _check(choice, start)
    seed = secrets.randbits(_SEED_BITS) if choice.seed is None else choice.seed
    encoder = Encoder(start.plan.data)
    chosen = _choose(institution, start.plan, choice, data, seed, encoder.width)
    prior = None if start.prior is None else start.prior.variances(encoder.groups)
    total = 1 + DRAWS
    by = _offset(choice.base_rate, chosen)
    adapted = adapt_selected(
        start.plan.model, start.params, chosen.x, chosen.y, by=by, method=choice.method, prior=prior
    )
    draws = []
    for number in range(DRAWS):
        if on_draw is not None:
            on_draw(number + 1, total)
        order = _shuffled(len(chosen.y), seed, "half", number)[: (len(chosen.y) + 1) // 2]
        draws.append(_again(start, adapted, chosen.x[order], chosen.y[order], prior, by))
    manifest = ModelManifest(
        name=title,
        institution=institution.config.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        origin=start.origin,
        labels=Labels(
            fingerprint=data_fingerprint(institution.folder, chosen.x, chosen.y),
            k=len(chosen.y),
            positives=int(chosen.y.sum()),
            available=chosen.available,
            left_out=chosen.left_out,
            segment=choice.segment,
            seed=seed,
        ),
        method=Method(
            asked=choice.method,
            used=adapted.method,
            strength=adapted.strength,
            folds_log_loss={name: float(value) for name, value in adapted.folds_log_loss.items()},
            prior="constant" if start.prior is None else "learned",
            learned_prior=None if start.prior is None else start.prior.to_json(),
            prior_variance=DEFAULT_TAU2,
            base_rate=choice.base_rate,
            offset=by,
        ),
        points=choice.points,
        draws=len(draws),
        versions={package: version(package) for package in _PACKAGES},
    )
    return write_model(institution.folder, title, manifest, start.plan, _doubles(adapted.params), tuple(draws))


def _signed(export: Path, key: Path) -> Start:
    found = verify_export(export, key)
    signed = found.manifest.files
    # Read once more after the check, so held against the signed digest once more.
    content = (export / JOURNAL_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != signed[JOURNAL_FILE].sha256:
        raise IntegrityError(f"{export / JOURNAL_FILE}: was changed while it was read; try again")
    records = [json.loads(line) for line in content.splitlines()]
    said = records[-1].get("learned_prior") if records else None
    origin = Origin(
        sha256=signed[PARAMS_FILE].sha256,
        run_id=found.manifest.run_id,
        plan_hash=found.manifest.plan_hash,
        signed_by=found.key_fingerprint,
        not_private=found.manifest.not_private,
    )
    prior = None if said is None else _prior(export / JOURNAL_FILE, said, found.plan)
    return Start(found.meta_params, found.plan, origin, prior)


def _prior(path: Path, said: Mapping[str, Any], plan: Plan) -> LearnedPrior:
    try:
        prior = LearnedPrior.from_json(said)
        prior.variances(Encoder(plan.data).groups)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise IntegrityError(f"{path}: tells of no prior for the plan's columns; ask the operator") from None
    return prior


def _unsigned(path: Path) -> Start:
    """Read the file that `metarisk-server export` writes: meta-parameters with their plan in the metadata."""
    again = "name a file that `metarisk-server export` has written, or an export's folder"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file or folder; {again}")
    try:
        content = path.read_bytes()
        with safe_open(path, "numpy") as file:
            said = file.metadata() or {}
        params: Params = dict(load(content))
        plan = validate(json.loads(said["plan"]), Plan, where=f"{path}: plan")
        origin = Origin(
            sha256=hashlib.sha256(content).hexdigest(),
            run_id=said["run_id"],
            plan_hash=plan.hash(),
            signed_by=None,
            not_private=said.get("privacy") == STAMP,
        )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, ConfigError):
        raise IntegrityError(f"{path}: is no initialization with its plan; {again}") from None
    shapes = {name: np.shape(value) for name, value in params.items()}
    finite = all(np.isfinite(value).all() for value in params.values())
    if said.get("plan_hash") != plan.hash() or shapes != meta_shapes(plan, Encoder(plan.data).width) or not finite:
        raise IntegrityError(f"{path}: does not hold the parameters of the plan that it names; {again}")
    return Start(params, plan, origin, None)


def _check(choice: Choice, start: Start) -> None:
    if start.plan.data.regression:
        raise ConfigError(
            "the run forecasts a number, and a bank's model is for binary outcomes: it gives probabilities and points; "
            "`metarisk-simulate evaluate` adapts such a run and judges it"
        )
    if choice.method not in METHODS:
        raise ConfigError(f"--method: choose one of {', '.join(METHODS)}")
    if choice.method == "prior" and start.prior is None:
        raise ConfigError(
            "--method prior: the run has learned no prior, or came without its journal; say --method auto, or ask the "
            "operator for an export of a run whose plan says learn_prior"
        )
    if choice.base_rate is not None and not 0 < choice.base_rate < 1:
        raise ConfigError("--base-rate: must lie between 0 and 1, as 0.01 for one record in a hundred")
    if choice.base_rate is not None and choice.k == 0:
        raise ConfigError("--base-rate corrects what labels have taught, and --k 0 asks for none; leave it out")
    if choice.segment is not None and start.plan.data.segment is None:
        raise ConfigError("--segment: the plan's schema names no segment column; leave it out")


def _choose(institution: Institution, plan: Plan, choice: Choice, data: Path | None, seed: int, width: int) -> _Chosen:
    """Draw the labelled records; with k = 0 no table is read."""
    if choice.k == 0:
        return _Chosen(np.empty((0, width), np.float32), np.empty(0, np.float32), 0, 0)
    if data is None:
        path, dataset = institution.table_title, load_source(institution, plan.data, drop_unfit=True)
    else:
        path, dataset = str(data), load_dataset(data, plan.data, institution.config.name, drop_unfit=True)
    rows = np.arange(len(dataset.y))
    of = ""
    if choice.segment is not None and dataset.segment is not None:
        rows = rows[dataset.segment == choice.segment]
        of = f" in segment '{choice.segment}'"
        if not len(rows):
            raise DataError(f"{path}: has no labelled record{of}; check --segment and column '{plan.data.segment}'")
    if not len(rows):
        raise DataError(
            f"{path}: has no labelled record that fits the plan's schema; `metarisk-client check` tells why"
        )
    k = len(rows) if choice.k is None else choice.k
    if k > len(rows):
        raise DataError(f"{path}: has {len(rows)} labelled records{of}, fewer than --k {k}; say --k all for all")
    picked = rows[_shuffled(len(rows), seed, "labels")[:k]]
    return _Chosen(dataset.x[picked], dataset.y[picked], len(rows), dataset.dropped, float(dataset.y[rows].mean()))


def _offset(base_rate: float | None, chosen: _Chosen) -> float:
    if base_rate is None:
        return 0.0
    if not 0 < chosen.share < 1:
        raise DataError(
            "--base-rate: all labelled records have one outcome, so nothing says how they were selected; leave it out, "
            "or add records of the other outcome"
        )
    return offset(chosen.share, base_rate)


def _shuffled(count: int, seed: int, *labels: str | int) -> np.ndarray:
    """Give 0 to `count` - 1 in a random order: that of independent draws."""
    return np.argsort(SecureRandom.seeded(seed, "adapt", *labels).normal(count, 1.0), kind="stable")


def _again(start: Start, adapted: Adapted, x: np.ndarray, y: np.ndarray, prior: np.ndarray | None, by: float) -> Params:
    """Adapt to a draw in the way that was chosen for all labels: what is judged is the model, not the choice."""
    variance = DEFAULT_TAU2
    if adapted.method in {"head", "prox"} and adapted.strength:
        variance = 1 / adapted.strength
    if adapted.method == "prior" and adapted.strength and prior is not None:
        prior = prior / (adapted.strength * PRIOR_SHARE)
    spec = start.plan.model
    again = adapt_selected(spec, start.params, x, y, by=by, method=adapted.method, prior_variance=variance, prior=prior)
    return _doubles(again.params)


def _doubles(params: Params) -> Params:
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


def _name_of(plan: Plan) -> str:
    """Make a folder's name of a plan's."""
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in plan.name.lower())
    return "-".join(filter(None, letters.split("-")))[:64] or "model"

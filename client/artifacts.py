"""A model that a bank has adapted to its own records: a folder under `models`, written once and never sent.

Every adaptation makes a new version, NAME-001 and so on. Beside the parameters it holds what they came from: the
initialization by its digest, the plan, the prior, the method, and a fingerprint of the labelled records. The
parameters depend on those records without any noise, so a folder carries no DP claim: it is readable by its owner
alone, and no order, report or log has a field for any of it.

The fingerprint is HMAC-SHA-256 over the encoded rows and their labels, in an order of its own, under a key that the
bank's folder keeps beside its models. Two models of one bank tell by it whether they come from the same records.
Without the key it tells nothing: a plain digest could be tried out, since few values make up a record.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metarisk_common.config import Frozen, validate
from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.features import Encoder
from metarisk_common.files import read_private, sync_folder, write_new_private
from metarisk_common.initialisation import param_shapes
from metarisk_common.manifest import PLAN_FILE, SignedFile
from metarisk_common.params import Params
from metarisk_common.plan import Plan

from .points import PointScale

MODELS_FOLDER: Final = "models"
MODEL_FILE: Final = "model.json"
ADAPTED_FILE: Final = "params.safetensors"
DRAWS_FILE: Final = "draws.safetensors"
NO_CLAIM: Final = "no DP claim"

_FILES: Final = (ADAPTED_FILE, DRAWS_FILE, PLAN_FILE)
_KEY_FILE: Final = "fingerprint.key"
_KEY_BYTES: Final = 32
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_SHA256: Final = r"^[0-9a-f]{64}$"
_AGAIN: Final = "adapt again, or restore the folder from a copy"


class Origin(Frozen):
    """The initialization that was adapted. `signed_by`: fingerprint of the operator's key, or None: not signed."""

    sha256: str = Field(pattern=_SHA256)
    run_id: str
    plan_hash: str = Field(pattern=_SHA256)
    signed_by: str | None
    not_private: bool


class Labels(Frozen):
    """The labelled records that it was adapted to. Private: counts of the bank's own records."""

    fingerprint: str = Field(pattern=_SHA256)
    k: int = Field(ge=0)
    positives: int = Field(ge=0)
    available: int = Field(ge=0)
    left_out: int = Field(ge=0)
    """Rows of the table that did not fit the schema."""
    segment: str | None
    seed: int = Field(ge=0)
    """Chooses the k records and the draws; it protects nothing."""


class Method(Frozen):
    """How it was adapted; `prior`: "constant", or "learned" with what the run's journal says of it."""

    asked: str
    used: str
    strength: float | None
    folds_log_loss: dict[str, float]
    prior: Literal["constant", "learned"]
    learned_prior: dict[str, Any] | None = None
    prior_variance: float
    base_rate: float | None = Field(default=None, gt=0, lt=1)
    """The true share of positives, where the labels were selected and do not have it."""
    offset: float = Field(default=0.0, allow_inf_nan=False)
    """By how much log odds among the labels lie above the true ones; taken out of the model."""


class ModelManifest(Frozen):
    """`model.json` of an adapted model. Local: nothing in it may leave the bank."""

    format: Literal["metarisk model 1"] = "metarisk model 1"
    claim: Literal["no DP claim"] = NO_CLAIM
    """Made from the bank's records without noise: whoever has the parameters may learn about those records."""
    name: str
    institution: str
    created: str
    """ISO 8601, UTC."""
    origin: Origin
    labels: Labels
    method: Method
    points: PointScale
    draws: int = Field(ge=0)
    """Adaptations to other draws of the same labels, by which the stability of reasons is judged."""
    versions: dict[str, str]
    files: dict[str, SignedFile] = Field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """An adapted model, ready to score.

    `params` and each of `draws`: NumPy float64, named and shaped as the plan's model says.
    """

    folder: Path
    manifest: ModelManifest
    plan: Plan
    params: Params
    draws: tuple[Params, ...]


def data_fingerprint(bank: Path, x: np.ndarray, y: np.ndarray) -> str:
    """Fingerprint labelled records, whatever their order, under the bank's own key, which the first call makes.

    Args:
        bank: the bank's folder.
        x: (rows, width) float32 encoded inputs.
        y: (rows,) labels.

    Raises:
        ConfigError: the key cannot be written or read, or others may read it.
        IntegrityError: the key's file does not hold a key.

    """
    key = _fingerprint_key(models_folder(bank))
    rows = np.column_stack([x.astype("<f4"), np.asarray(y, "<f4")])
    digest = hmac.new(key, np.array(rows.shape, "<u8").tobytes(), hashlib.sha256)
    for row in sorted(row.tobytes() for row in rows):
        digest.update(row)
    return digest.hexdigest()


def models_folder(bank: Path) -> Path:
    """Give the folder of a bank's models, made for its owner alone if it is not there yet.

    Raises:
        ConfigError: it cannot be made.

    """
    folder = bank / MODELS_FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


def check_name(name: str) -> str:
    """Return a model's name if a folder can be called so.

    Raises:
        ConfigError: it cannot.

    """
    if not re.fullmatch(_NAME, name):
        raise ConfigError("--name: use at most 64 letters, digits, - and _, and begin with a letter or a digit")
    return name


def write_model(
    bank: Path, name: str, manifest: ModelManifest, plan: Plan, params: Params, draws: tuple[Params, ...]
) -> Model:
    """Write a model as the next version of its name: whole, or not at all, and never over another.

    `manifest` comes without its name's number and without `files`; both are filled in.

    Raises:
        ConfigError: the folder cannot be written.

    """
    folder = models_folder(bank)
    numbered = {f"{index:02}/{key}": value for index, draw in enumerate(draws) for key, value in draw.items()}
    files = {
        ADAPTED_FILE: save({key: np.ascontiguousarray(value) for key, value in params.items()}),
        DRAWS_FILE: save({key: np.ascontiguousarray(value) for key, value in numbered.items()}),
        PLAN_FILE: plan.to_json().encode(),
    }
    said = {key: SignedFile(size_bytes=len(data), sha256=_digest(data)) for key, data in files.items()}
    try:
        number = 1 + max((_number(path.name, name) for path in folder.iterdir()), default=0)
        while True:
            title = f"{name}-{number:03}"
            complete = manifest.model_copy(update={"name": title, "files": said})
            text = json.dumps(complete.model_dump(mode="json"), indent=1, ensure_ascii=False).encode() + b"\n"
            if _place(folder, title, files | {MODEL_FILE: text}):
                return Model(folder / title, complete, plan, params, draws)
            number += 1
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None


def load_model(folder: Path) -> Model:
    """Read an adapted model, and check that every file is what was written.

    Raises:
        ConfigError: there is no such model, or it cannot be read.
        IntegrityError: a file, named, is missing or was changed.

    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: is no adapted model; `metarisk-client adapt` makes one under {MODELS_FOLDER}/")
    try:
        manifest = validate(json.loads(_read(path)), ModelManifest, where=str(path))
    except (ValueError, RecursionError, ConfigError) as error:
        why = f": {error}" if isinstance(error, ConfigError) else ""
        raise IntegrityError(f"{path}: is not what `adapt` writes{why}; {_AGAIN}") from None
    if set(manifest.files) != set(_FILES):
        raise IntegrityError(f"{path}: does not name exactly {', '.join(_FILES)}; {_AGAIN}")
    content = {name: _read(folder / name) for name in _FILES}
    for name, data in content.items():
        if _digest(data) != manifest.files[name].sha256:
            raise IntegrityError(f"{folder / name}: is not the file that was written; {_AGAIN}")
    plan = _plan(folder / PLAN_FILE, content[PLAN_FILE], manifest)
    shapes = param_shapes(plan.model, Encoder(plan.data).width)
    params = _arrays(folder / ADAPTED_FILE, content[ADAPTED_FILE], shapes)
    numbers = [f"{index:02}" for index in range(manifest.draws)]
    expected = {f"{number}/{key}": shape for number in numbers for key, shape in shapes.items()}
    drawn = _arrays(folder / DRAWS_FILE, content[DRAWS_FILE], expected)
    draws = tuple({key: drawn[f"{number}/{key}"] for key in shapes} for number in numbers)
    return Model(folder, manifest, plan, params, draws)


def _fingerprint_key(folder: Path) -> bytes:
    path = folder / _KEY_FILE
    if not path.exists():
        try:
            write_new_private(path, secrets.token_bytes(_KEY_BYTES))
        except FileExistsError:
            pass  # Another adaptation has just made it.
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    key = read_private(path, "the fingerprints' key", ConfigError(f"{path}: is not here"))
    if len(key) != _KEY_BYTES:
        raise IntegrityError(f"{path}: does not hold the key that was written; delete it, and a new one is made")
    return key


def _place(folder: Path, title: str, files: Mapping[str, bytes]) -> bool:
    """Write a model's folder under its name; False where that is taken."""
    target, draft = folder / title, folder / f".{title}-{secrets.token_hex(8)}"
    if os.path.lexists(target):
        return False
    try:
        draft.mkdir(mode=0o700)
        for name, data in files.items():
            write_new_private(draft / name, data)
        sync_folder(draft)
        try:
            draft.rename(target)  # Fails where another process came first: its folder is not empty.
        except OSError:
            if os.path.lexists(target):
                return False
            raise
        sync_folder(folder)
    finally:
        rmtree(draft, ignore_errors=True)
    return True


def _number(folder: str, name: str) -> int:
    """Tell the version of a folder of this name, or 0 if it is none."""
    found = re.fullmatch(rf"{re.escape(name)}-([0-9]{{3,9}})", folder)
    return int(found[1]) if found else 0


def _plan(path: Path, content: bytes, manifest: ModelManifest) -> Plan:
    try:
        plan = validate(json.loads(content), Plan, where=str(path))
    except (ValueError, ConfigError):
        raise IntegrityError(f"{path}: is no plan that this version knows; {_AGAIN}") from None
    if plan.hash() != manifest.origin.plan_hash:
        raise IntegrityError(f"{path}: is another plan than {MODEL_FILE} names; {_AGAIN}")
    return plan


def _arrays(path: Path, content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    try:
        found: Params = dict(load(content))
    except (SafetensorError, ValueError, KeyError):
        raise IntegrityError(f"{path}: holds no arrays that can be read; {_AGAIN}") from None
    if {name: np.shape(value) for name, value in found.items()} != dict(shapes):
        raise IntegrityError(f"{path}: does not hold the parameters of the plan's model; {_AGAIN}")
    if any(value.dtype != np.float64 or not np.isfinite(value).all() for value in found.values()):
        raise IntegrityError(f"{path}: holds numbers that are not finite; {_AGAIN}")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path}: is missing; {_AGAIN}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""Whether an export is what the consortium's operator signed: every byte of it, before any of it is used.

The signature is checked before the manifest is read, and every file is read once: what is checked is what is used.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from safetensors import SafetensorError
from safetensors.numpy import load

from metarisk_common.config import Model, validate
from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import meta_shapes
from metarisk_common.manifest import (
    JOURNAL_FILE,
    MANIFEST_FILE,
    PARAMS_FILE,
    PLAN_FILE,
    SIGNATURE_FILE,
    SIGNED_FILES,
    STAMP,
    Manifest,
    SignedFile,
    key_fingerprint,
    rounds_by_bank,
    signed_bytes,
)
from metarisk_common.params import Params
from metarisk_common.plan import Plan

_MAX_MANIFEST_BYTES: Final = 16_000_000
_LENGTH_BYTES: Final = 8
_AGAIN: Final = "have the operator send the export again"


@dataclass(frozen=True)
class Verified:
    """An export that holds what its operator signed.

    `meta_params`: the meta-initialization, NumPy arrays in the plan's dtype, named and shaped as the plan's model says.
    `key_fingerprint`: of the key that signed, to compare with what the operator says. `unsigned`: names of what lies in
    the folder besides, of which the signature says nothing.
    """

    folder: Path
    manifest: Manifest
    plan: Plan
    meta_params: Params
    key_fingerprint: str
    unsigned: tuple[str, ...]


def verify_export(folder: Path, public_key_path: Path) -> Verified:
    """Check a signed export against the operator's public key.

    Args:
        folder: what the operator has sent.
        public_key_path: the operator's `signing.pub`, which the bank has had from elsewhere than from that folder.

    Raises:
        ConfigError: the folder or the key is not there, or the key is none.
        IntegrityError: a file, named, is missing or not the one that was signed, or contradicts another.

    """
    key = _read_key(public_key_path)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; name the one that the operator's export wrote")
    if folder.resolve() in public_key_path.resolve().parents:
        raise ConfigError(
            f"{public_key_path}: a key that came with the export proves nothing; name the one that the operator gave "
            "you before"
        )
    manifest = _read_manifest(folder, key, public_key_path)
    content = {name: _read_signed(folder / name, manifest.files[name]) for name in SIGNED_FILES}
    plan = _read_plan(folder / PLAN_FILE, content[PLAN_FILE], manifest)
    params = _read_params(folder / PARAMS_FILE, content[PARAMS_FILE], plan, manifest)
    _check_journal(folder / JOURNAL_FILE, content[JOURNAL_FILE], manifest)
    known = {MANIFEST_FILE, SIGNATURE_FILE, *SIGNED_FILES}
    unsigned = tuple(sorted(path.name for path in folder.iterdir() if path.name not in known))
    return Verified(folder, manifest, plan, params, key_fingerprint(key), unsigned)


def _read_key(path: Path) -> Ed25519PublicKey:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; ask the operator for signing.pub") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: is not an operator's public key; ask the operator for signing.pub")
    return key


def _read_manifest(folder: Path, key: Ed25519PublicKey, public_key_path: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    content = _read(path, _MAX_MANIFEST_BYTES)
    signature = _read(folder / SIGNATURE_FILE, _MAX_MANIFEST_BYTES)
    try:
        key.verify(signature, signed_bytes(content))
    except InvalidSignature:
        raise IntegrityError(
            f"{path}: was changed, or not signed with the key in {public_key_path}; compare that key's fingerprint, "
            f"{key_fingerprint(key)}, with the operator's, and {_AGAIN}"
        ) from None
    manifest = _validated(path, _json(path, content), Manifest)
    if set(manifest.files) != set(SIGNED_FILES):
        raise IntegrityError(f"{path}: does not name exactly {', '.join(SIGNED_FILES)}; {_AGAIN}")
    return manifest


def _read_signed(path: Path, signed: SignedFile) -> bytes:
    content = _read(path, signed.size_bytes)
    if len(content) != signed.size_bytes or hashlib.sha256(content).hexdigest() != signed.sha256:
        raise IntegrityError(f"{path}: is not the file that was signed; {_AGAIN}")
    return content


def _read_plan(path: Path, content: bytes, manifest: Manifest) -> Plan:
    plan = _validated(path, _json(path, content), Plan)
    if plan.hash() != manifest.plan_hash:
        raise IntegrityError(f"{path}: is another plan than {MANIFEST_FILE} names; {_AGAIN}")
    if plan.outer.rounds != manifest.rounds:
        raise IntegrityError(
            f"{path}: has {plan.outer.rounds} rounds, {MANIFEST_FILE} says {manifest.rounds}; {_AGAIN}"
        )
    return plan


def _read_params(path: Path, content: bytes, plan: Plan, manifest: Manifest) -> Params:
    said = _metadata(path, content)
    expected = {"plan": plan.to_json(), "plan_hash": manifest.plan_hash, "run_id": manifest.run_id}
    if manifest.not_private:
        expected["privacy"] = STAMP
    wrong = sorted(key for key in said.keys() | expected.keys() if said.get(key) != expected.get(key))
    if wrong:
        raise IntegrityError(f"{path}: says something else than {MANIFEST_FILE} about '{wrong[0]}'; {_AGAIN}")
    try:
        params: Params = dict(load(content))
    except (SafetensorError, ValueError, KeyError):
        raise IntegrityError(f"{path}: holds no arrays that can be read; {_AGAIN}") from None
    shapes = {name: np.shape(value) for name, value in params.items()}
    if shapes != meta_shapes(plan, Encoder(plan.data).width):
        raise IntegrityError(f"{path}: does not hold the parameters of the plan's model; {_AGAIN}")
    if any(value.dtype != plan.dtype or not np.isfinite(value).all() for value in params.values()):
        raise IntegrityError(f"{path}: holds numbers that are not finite or not {plan.dtype}; {_AGAIN}")
    return params


def _metadata(path: Path, content: bytes) -> Mapping[str, Any]:
    """Read what a safetensors file says of itself: the length of a JSON header, little-endian, and the header."""
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = _json(path, content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    said = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return said if isinstance(said, dict) else {}


def _check_journal(path: Path, content: bytes, manifest: Manifest) -> None:
    records = [_json(path, line) for line in content.splitlines()]
    try:
        banks = rounds_by_bank(records)
        rounds = [record["round"] for record in records]
    except (TypeError, KeyError, AttributeError):
        banks, rounds = {}, []
    if banks != manifest.banks or rounds != list(range(1, manifest.rounds + 1)):
        raise IntegrityError(f"{path}: tells of other rounds or banks than {MANIFEST_FILE}; {_AGAIN}")


def _json(path: Path, content: bytes) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path}: is not what the export writes; {_AGAIN}") from None


def _validated(path: Path, values: object, model: type[Model]) -> Model:
    try:
        return validate(values, model, where=str(path))
    except ConfigError as error:
        raise IntegrityError(f"{error}; it may be of a newer version of this software") from None


def _read(path: Path, limit_bytes: int) -> bytes:
    """Read a file of the export; of one that is longer, a byte more than the limit."""
    if not path.is_file():
        raise IntegrityError(f"{path}: is missing; {_AGAIN}")
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None

"""The result of a finished run, taken out: one safetensors file, or a folder that banks can check, signed.

Either is written whole or not at all, and never over anything.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from safetensors.numpy import save

from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.files import read_private, sync_folder, write_atomically
from metarisk_common.manifest import (
    JOURNAL_FILE,
    MANIFEST_FILE,
    PARAMS_FILE,
    PLAN_FILE,
    SIGNATURE_FILE,
    STAMP,
    Manifest,
    SignedFile,
    rounds_by_bank,
    signed_bytes,
)
from metarisk_common.plan import Plan, read_plan

from .app import is_not_private
from .checkpoint import load_checkpoint
from .config import Server
from .journal import read_journal
from .rounds import CHECKPOINT, JOURNAL
from .state import ServerState

PACKAGES: Final = ("metarisk-federated", "flwr", "numpy", "safetensors", "cryptography")
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True)
class Exported:
    """What was written. `sha256`: of the safetensors file."""

    path: Path
    sha256: str
    plan_hash: str
    not_private: bool


@dataclass(frozen=True)
class _Finished:
    """A run that has played all its rounds."""

    plan: Plan
    state: ServerState
    record: dict[str, Any] | None
    not_private: bool

    def safetensors(self) -> bytes:
        """The meta-parameters in the plan's dtype, with the plan that made them in the file's metadata.

        The same run gives the same bytes, so that whoever has a copy can compare its digest.
        """
        arrays = {name: np.ascontiguousarray(value, self.plan.dtype) for name, value in self.state.meta_params.items()}
        metadata = {"plan": self.plan.to_json(), "plan_hash": self.plan.hash(), "run_id": self.state.run_id}
        if self.not_private:
            metadata["privacy"] = STAMP
        return _in_order(save(arrays, metadata=metadata))


def export_file(run: Path, out: Path) -> Exported:
    """Write a finished run's meta-parameters as one safetensors file.

    Raises:
        ConfigError: the run has not finished, or the file exists already or cannot be written.
        IntegrityError: the run's checkpoint is damaged.

    """
    finished = _finished(run)
    _check_place(out)
    data = finished.safetensors()
    try:
        write_atomically(out, data)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    return Exported(out, _digest(data), finished.plan.hash(), finished.not_private)


def export_bundle(run: Path, out: Path, server: Server | None, *, now: datetime | None = None) -> Exported:
    """Write a finished run's result as a folder: meta-parameters, plan, journal, and the manifest that names them.

    Args:
        run: the run's folder.
        out: the folder to write; it must not exist.
        server: whose key signs the manifest; without one it stays unsigned, and no bank's check will accept it.
        now: the moment that the manifest says; by default, the clock's.

    Raises:
        ConfigError: the run has not finished, the folder exists already or cannot be written, or the signing key is not
            there or open to others.
        IntegrityError: the run's checkpoint or journal, or the signing key, is damaged.

    """
    finished = _finished(run)
    records = _records(run, finished)
    if not rounds_by_bank(records):
        raise ConfigError(f"{run}: every round missed its quorum, so nothing was learned; there is nothing to export")
    key = None if server is None else _signing_key(server.folder.signing_key)
    _check_place(out)
    files = {
        PARAMS_FILE: finished.safetensors(),
        PLAN_FILE: finished.plan.to_json().encode(),
        JOURNAL_FILE: b"".join(json.dumps(record, sort_keys=True).encode() + b"\n" for record in records),
    }
    manifest = Manifest(
        run_id=finished.state.run_id,
        plan_hash=finished.plan.hash(),
        rounds=finished.state.round,
        created=(now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        not_private=finished.not_private,
        banks=rounds_by_bank(records),
        versions={package: version(package) for package in PACKAGES},
        files={name: SignedFile(size_bytes=len(data), sha256=_digest(data)) for name, data in files.items()},
    )
    said = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False).encode() + b"\n"
    files |= {MANIFEST_FILE: said} | ({} if key is None else {SIGNATURE_FILE: key.sign(signed_bytes(said))})
    _write_folder(out, files)
    return Exported(out, manifest.files[PARAMS_FILE].sha256, manifest.plan_hash, finished.not_private)


def _finished(run: Path) -> _Finished:
    plan = read_plan(run / "plan.json")
    found = load_checkpoint(run / CHECKPOINT)
    if found is None or found[0].round < plan.outer.rounds:
        raise ConfigError(f"{run}: the run has not finished; there is nothing to export yet")
    if found[0].plan_hash != plan.hash():
        raise IntegrityError(f"{run}: the checkpoint was made under another plan than its plan.json; restore that file")
    return _Finished(plan, *found, is_not_private(run))


def _records(run: Path, finished: _Finished) -> list[dict[str, Any]]:
    """Read the journal's record of every round; the last may be in the checkpoint only, after a crash."""
    path = run / JOURNAL
    by_round = {record.get("round"): record for record in read_journal(path)}
    if finished.record is not None:
        by_round.setdefault(finished.record["round"], finished.record)
    missing = [number for number in range(1, finished.state.round + 1) if number not in by_round]
    if missing:
        raise IntegrityError(f"{path}: has no record of round {missing[0]}; restore the journal from a copy")
    return [by_round[number] for number in range(1, finished.state.round + 1)]


def _signing_key(path: Path) -> Ed25519PrivateKey:
    missing = ConfigError(f"{path}: is not here; restore it from its backup")
    try:
        key = load_pem_private_key(read_private(path, "the signing key", missing), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IntegrityError(f"{path}: is not the signing key that was written here; restore it from its backup")
    return key


def _check_place(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already; choose another name with --out")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: there is no such folder")


def _write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    draft = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    try:
        try:
            draft.mkdir()
            for name, data in files.items():
                write_atomically(draft / name, data)
            draft.rename(out)
            sync_folder(out.parent)
        except BaseException:
            rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def _in_order(safetensors: bytes) -> bytes:
    """Sort the header, which the library writes in another order each time; the arrays after it stay as they were."""
    start = _LENGTH_BYTES + int.from_bytes(safetensors[:_LENGTH_BYTES], "little")
    header = json.dumps(json.loads(safetensors[_LENGTH_BYTES:start]), sort_keys=True, separators=(",", ":")).encode()
    # Padded so that the arrays lie where processors like them, as the library does.
    header += b" " * (-len(header) % _LENGTH_BYTES)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + safetensors[start:]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

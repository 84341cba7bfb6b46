"""Atomic checkpoints: arrays as safetensors, everything else as a JSON manifest that holds their digest.

Never pickle. A file is written under another name, flushed to the disk and renamed. Arrays have the digest of
their content in their name and the manifest is replaced last, so at every instant it names a complete file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metarisk_common.errors import IntegrityError
from metarisk_common.files import write_atomically

from .state import ServerState

MANIFEST = "checkpoint.json"
FORMAT = 2


def save_checkpoint(folder: Path, state: ServerState, record: dict[str, Any] | None = None) -> None:
    """Write a state, with the journal record of its last round; whatever earlier ones left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"meta/{name}": np.asarray(value, order="C") for name, value in state.meta_params.items()}
    arrays |= {f"optimizer/{name}": np.asarray(value, order="C") for name, value in state.optimizer_state.items()}
    arrays |= {f"tail/{name}": value for name, value in state.tail.items()}
    arrays |= {f"prior/{name}": value for name, value in state.prior.items()}
    data = save(arrays)
    digest = _digest(data)
    name = f"round-{state.round:06d}-{digest[:16]}.safetensors"
    manifest = {
        "format": FORMAT,
        "run_id": state.run_id,
        "plan_hash": state.plan_hash,
        "round": state.round,
        "arrays": name,
        "sha256": digest,
        "declared_sizes": state.declared_sizes,
        "ledgers": {name: list(heard) for name, heard in state.ledgers.items()},
        "record": record,
    }
    write_atomically(folder / name, data)
    sealed = {"manifest": manifest, "sha256": _digest(_canonical(manifest))}
    write_atomically(folder / MANIFEST, json.dumps(sealed, indent=1, sort_keys=True).encode())
    for old in folder.glob("*round-*"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[ServerState, dict[str, Any] | None] | None:
    """Read the newest state and its journal record; None where there is no checkpoint.

    It may be called while another process saves.

    Raises:
        IntegrityError: the manifest or the arrays are damaged, or a digest differs.

    """
    path = folder / MANIFEST
    sealed = _read_manifest(path)
    while sealed is not None:
        try:
            return _read_state(folder, sealed)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            before, sealed = sealed, _read_manifest(path)
            # A newer manifest: the arrays were removed under our eyes because newer ones are complete.
            if sealed == before:
                message = f"{path}: the checkpoint is damaged ({type(error).__name__}); restore it or start a new run"
                raise IntegrityError(message) from None
    return None


def _read_manifest(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({type(error).__name__})") from None


def _read_state(folder: Path, sealed: bytes) -> tuple[ServerState, dict[str, Any] | None]:
    seal = json.loads(sealed)
    manifest = seal["manifest"]
    if _digest(_canonical(manifest)) != seal["sha256"] or manifest["format"] != FORMAT:
        raise ValueError("the manifest is not what was written")
    data = (folder / manifest["arrays"]).read_bytes()
    if _digest(data) != manifest["sha256"]:
        raise ValueError("the arrays are not what was written")
    arrays = load(data)
    state = ServerState(
        run_id=manifest["run_id"],
        plan_hash=manifest["plan_hash"],
        round=manifest["round"],
        meta_params=_under("meta/", arrays),
        optimizer_state=_under("optimizer/", arrays),
        declared_sizes=manifest["declared_sizes"],
        ledgers={name: (counter, receipt) for name, (counter, receipt) in manifest["ledgers"].items()},
        tail=_under("tail/", arrays),
        prior=_under("prior/", arrays),
    )
    return state, manifest["record"]


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

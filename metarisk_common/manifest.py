"""What a signed export holds, and what its signature says: the operator writes it, every bank checks it.

A folder with the meta-initialization, the plan that made it, the journal of the rounds, a manifest that names them with
their digests, and a signature of the manifest.
"""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import ssh_key_fingerprint
from pydantic import Field

from .config import Frozen

MANIFEST_FILE: Final = "manifest.json"
SIGNATURE_FILE: Final = "manifest.sig"
PARAMS_FILE: Final = "initialization.safetensors"
PLAN_FILE: Final = "plan.json"
JOURNAL_FILE: Final = "journal.jsonl"
SIGNED_FILES: Final = (PARAMS_FILE, PLAN_FILE, JOURNAL_FILE)
"""What a manifest names, all of it and nothing else."""

STAMP: Final = "NOT PRIVATE: the noise of this run was seeded or switched off"
"""What every picture of such a run says; in a safetensors' metadata as `privacy`."""

_PURPOSE: Final = b"metarisk export manifest 1\0"
_SHA256: Final = r"^[0-9a-f]{64}$"


class SignedFile(Frozen):
    """A file of the export: its length and the SHA-256 of its content, hexadecimal."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Manifest(Frozen):
    """`manifest.json`. Every field is public."""

    format: Literal["metarisk export 1"] = "metarisk export 1"
    run_id: str
    plan_hash: str = Field(pattern=_SHA256)
    rounds: int = Field(ge=0)
    created: str
    """ISO 8601, UTC."""
    not_private: bool
    """Whether the run's noise was seeded or switched off, so that the result protects nobody."""
    banks: dict[str, int]
    """In how many rounds each bank's update went into the result."""
    versions: dict[str, str]
    """Of the software that made the export, by distribution."""
    files: dict[str, SignedFile]


def signed_bytes(manifest: bytes) -> bytes:
    """What the signature is over: the very bytes of `manifest.json`, after words that stand before nothing else.

    So no other message that the key may ever sign can pass for a manifest.
    """
    return _PURPOSE + manifest


def key_fingerprint(key: Ed25519PublicKey) -> str:
    """Shorten the operator's key to what two people compare over the telephone, in the form that SSH prints."""
    return "SHA256:" + b64encode(ssh_key_fingerprint(key, hashes.SHA256())).decode().rstrip("=")


def rounds_by_bank(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count from a journal's records the rounds in which each bank's update went into the result, by name."""
    counts = Counter(name for record in records if record["quorum"] for name in record["admitted"])
    return dict(sorted(counts.items()))

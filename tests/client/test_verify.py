"""A signed export at the bank: whatever was changed on the way is noticed, and named."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from client.signing import sign as sign_ledger
from client.verify import verify_export
from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.manifest import signed_bytes
from metarisk_common.plan import Plan
from server.checkpoint import load_checkpoint
from server.config import Server, load_server
from server.manifest import export_bundle
from server.setup import init

FILES = ["initialization.safetensors", "journal.jsonl", "manifest.json", "manifest.sig", "plan.json"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return load_server(init(tmp_path_factory.mktemp("operator") / "consortium", name="Verbund").path)


@pytest.fixture(scope="module")
def exported(finished_run: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "export"
    export_bundle(finished_run, out, server)
    return out


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to attack."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.fixture(scope="module")
def key(server: Server) -> Path:
    return server.folder.signing_public_key


def private_key(server: Server) -> Ed25519PrivateKey:
    found = load_pem_private_key(server.folder.signing_key.read_bytes(), None)
    assert isinstance(found, Ed25519PrivateKey)
    return found


def sign_again(export: Path, server: Server, **changes: Any) -> None:
    """Write the manifest that a careless operator would, over whatever the files hold now, and sign it rightly."""
    said = json.loads((export / "manifest.json").read_bytes()) | changes
    for name in said["files"]:
        data = (export / name).read_bytes()
        said["files"][name] = {"size_bytes": len(data), "sha256": sha256(data).hexdigest()}
    content = json.dumps(said).encode()
    (export / "manifest.json").write_bytes(content)
    (export / "manifest.sig").write_bytes(private_key(server).sign(signed_bytes(content)))


def test_what_the_operator_signed_is_believed(exported: Path, key: Path, finished_run: Path) -> None:
    verified = verify_export(exported, key)
    assert verified.unsigned == ()
    assert verified.plan == Plan.model_validate_json((finished_run / "plan.json").read_bytes())
    assert verified.manifest.rounds == verified.plan.outer.rounds == 12
    assert verified.manifest.not_private
    assert len(verified.manifest.banks) == 4
    assert verified.key_fingerprint.startswith("SHA256:")
    found = load_checkpoint(finished_run / "checkpoint")
    assert found is not None
    for name, value in found[0].meta_params.items():
        np.testing.assert_array_equal(verified.meta_params[name], value.astype(np.float32))


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_every_flipped_byte_of_what_is_signed_is_noticed(export: Path, key: Path, name: str) -> None:
    whole = (export / name).read_bytes()
    for place in range(len(whole)):
        flip = (0x01, 0x20, 0x80)[place % 3]
        (export / name).write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match=r"manifest\.json: was changed"):
            verify_export(export, key)


@pytest.mark.parametrize("name", ["initialization.safetensors", "journal.jsonl", "plan.json"])
@given(data=st.data())
def test_every_flipped_byte_of_a_file_is_noticed(
    exported: Path, key: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    export = Path(shutil.copytree(exported, tmp_path_factory.mktemp("flipped") / "export"))
    whole = (export / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    (export / name).write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    with pytest.raises(IntegrityError, match=f"{name}: is not the file that was signed"):
        verify_export(export, key)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["missing", "empty", "shorter", "longer", "a folder", "another's"])
def test_every_file_is_named_that_is_not_the_one(export: Path, key: Path, name: str, change: str) -> None:
    path = export / name
    whole = path.read_bytes()
    path.unlink()
    if change == "a folder":
        path.mkdir()
    elif change != "missing":
        other = (export / next(other for other in FILES if other != name)).read_bytes()
        path.write_bytes({"empty": b"", "shorter": whole[:-1], "longer": whole + b"\n", "another's": other}[change])
    named = "manifest.json" if name == "manifest.sig" and change not in {"missing", "a folder"} else name
    with pytest.raises(IntegrityError, match=named):
        verify_export(export, key)


# Keys and signatures.


def test_another_key_is_refused_and_both_are_told_apart(export: Path, key: Path, tmp_path: Path) -> None:
    other = load_server(init(tmp_path / "other", name="Verbund").path)
    with pytest.raises(IntegrityError, match="compare that key's fingerprint, SHA256:") as caught:
        verify_export(export, other.folder.signing_public_key)
    assert verify_export(export, key).key_fingerprint not in str(caught.value)
    # An attacker who signs everything anew with a key of their own gets no further.
    sign_again(export, other)
    with pytest.raises(IntegrityError, match="not signed with the key"):
        verify_export(export, key)


def test_a_key_that_came_with_the_export_proves_nothing(export: Path, key: Path, tmp_path: Path) -> None:
    other = load_server(init(tmp_path / "other", name="Verbund").path)
    sign_again(export, other)
    shutil.copy(other.folder.signing_public_key, export / "signing.pub")
    with pytest.raises(ConfigError, match="came with the export"):
        verify_export(export, export / "signing.pub")
    (tmp_path / "link.pub").symlink_to(export / "signing.pub")
    with pytest.raises(ConfigError, match="came with the export"):
        verify_export(export, tmp_path / "link.pub")


def test_a_signature_of_another_kind_of_message_is_refused(export: Path, key: Path, server: Server) -> None:
    manifest = (export / "manifest.json").read_bytes()
    private = private_key(server)
    for signature in (
        private.sign(manifest),
        private.sign(sha256(manifest).digest()),
        private.sign(signed_bytes(sha256(manifest).digest())),
        private.sign(b"metarisk export manifest 2\0" + manifest),
        bytes.fromhex(sign_ledger(private, "loans", 1, manifest.decode())),
        bytes(64),
        private.sign(signed_bytes(manifest)).hex().encode(),
    ):
        (export / "manifest.sig").write_bytes(signature)
        with pytest.raises(IntegrityError, match="was changed, or not signed"):
            verify_export(export, key)


def test_a_manifest_of_another_export_is_refused(
    export: Path, exported: Path, key: Path, server: Server, finished_run: Path
) -> None:
    # Signed by the operator, of another run: its files are other files.
    sign_again(export, server, run_id="another run")
    with pytest.raises(IntegrityError, match="'run_id'"):
        verify_export(export, key)
    shutil.copy(exported / "manifest.json", export)
    with pytest.raises(IntegrityError, match="was changed"):
        verify_export(export, key)


def not_operator_keys() -> dict[str, bytes]:
    edwards = Ed25519PrivateKey.generate()
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    return {
        "private": edwards.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "EC": other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "raw": edwards.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
        "empty": b"",
    }


@pytest.mark.parametrize(("kind", "content"), not_operator_keys().items(), ids=["private", "EC", "raw", "empty"])
def test_what_is_no_operators_key_is_refused(exported: Path, tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "signing.pub"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"ask the operator for signing\.pub"):
        verify_export(exported, path)


def test_what_is_not_there_is_named(exported: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.pub: there is no such file"):
        verify_export(exported, tmp_path / "absent.pub")
    for folder in (tmp_path / "absent", key):
        with pytest.raises(ConfigError, match="no such folder"):
            verify_export(folder, key)


# What is signed must agree with itself.


def test_what_else_lies_in_the_folder_is_named(export: Path, key: Path) -> None:
    (export / "model.pkl").write_bytes(b"x")
    (export / "more").mkdir()
    assert verify_export(export, key).unsigned == ("model.pkl", "more")


def rewritten(change: Callable[[dict[str, Any], dict[str, str]], object], data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + length])["__metadata__"]
    arrays: dict[str, Any] = dict(load(data))
    change(arrays, said)
    return save(arrays, metadata=said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _, said: said.update(plan_hash="0" * 64), "'plan_hash'"),
        (lambda _, said: said.update(run_id="another"), "'run_id'"),
        (lambda _, said: said.update(plan=said["plan"].replace("consumer", "business")), "'plan'"),
        (lambda _, said: said.pop("privacy"), "'privacy'"),
        (lambda _, said: said.update(more="x"), "'more'"),
        (lambda _, said: said.clear(), "'plan'"),
        (
            lambda arrays, _: arrays.update({"points.weight": arrays["points.weight"][:, :-1].copy()}),
            "parameters of the",
        ),
        (lambda arrays, _: arrays.update(more=np.zeros(1, np.float32)), "parameters of the"),
        (lambda arrays, _: arrays["points.weight"].__setitem__((0, 0), np.nan), "not finite"),
        (lambda arrays, _: arrays.update({"points.weight": arrays["points.weight"].astype(np.float64)}), "not float32"),
    ],
)
def test_an_initialization_that_contradicts_the_rest_is_refused_though_signed(
    export: Path, key: Path, server: Server, change: Callable[[dict[str, Any], dict[str, str]], object], said: str
) -> None:
    path = export / "initialization.safetensors"
    path.write_bytes(rewritten(change, path.read_bytes()))
    sign_again(export, server)
    with pytest.raises(IntegrityError, match=r"initialization\.safetensors: .*" + said):
        verify_export(export, key)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_is_refused_though_signed(
    export: Path, key: Path, server: Server, content: bytes
) -> None:
    (export / "initialization.safetensors").write_bytes(content)
    sign_again(export, server)
    with pytest.raises(IntegrityError, match=r"initialization\.safetensors"):
        verify_export(export, key)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"plan_hash": "0" * 64}, r"plan\.json: is another plan"),
        ({"rounds": 11}, r"plan\.json: has 12 rounds"),
        ({"banks": {"Lender A": 12}}, r"journal\.jsonl: tells of other"),
        ({"not_private": False}, r"initialization\.safetensors: .* 'privacy'"),
        ({"format": "metarisk export 2"}, r"manifest\.json: key 'format'.*newer version"),
        ({"more": 1}, r"manifest\.json: unknown key 'more'"),
        ({"files": {}}, r"manifest\.json: does not name exactly"),
    ],
)
def test_a_manifest_that_contradicts_the_rest_is_refused_though_signed(
    export: Path, key: Path, server: Server, changes: dict[str, Any], named: str
) -> None:
    sign_again(export, server, **changes)
    with pytest.raises(IntegrityError, match=named):
        verify_export(export, key)


def test_a_manifest_cannot_name_files_elsewhere(export: Path, key: Path, server: Server, tmp_path: Path) -> None:
    files = json.loads((export / "manifest.json").read_bytes())["files"]
    shutil.copy(export / "plan.json", tmp_path / "plan.json")
    sign_again(export, server, files={**files, "../plan.json": files["plan.json"]})
    with pytest.raises(IntegrityError, match="does not name exactly"):
        verify_export(export, key)


@pytest.mark.parametrize("line", [b"[]\n", b"{}\n", b"not json\n", b'{"quorum": true, "admitted": 3, "round": 1}\n'])
def test_a_journal_that_is_none_is_refused_though_signed(export: Path, key: Path, server: Server, line: bytes) -> None:
    path = export / "journal.jsonl"
    path.write_bytes(path.read_bytes() + line)
    sign_again(export, server)
    with pytest.raises(IntegrityError, match=r"journal\.jsonl"):
        verify_export(export, key)

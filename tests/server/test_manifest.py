"""A finished run's result, taken out: whole or not at all, and signed over every byte."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from safetensors import safe_open
from safetensors.numpy import load_file

from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.manifest import Manifest, rounds_by_bank, signed_bytes
from metarisk_common.plan import read_plan
from server.checkpoint import load_checkpoint, save_checkpoint
from server.config import Server, load_server
from server.journal import read_journal
from server.manifest import export_bundle, export_file
from server.setup import init

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return load_server(init(tmp_path_factory.mktemp("operator") / "consortium", name="Verbund").path)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    kept = ("checkpoint", "journal.jsonl", "plan.json", "run.json")
    (tmp_path / "run").mkdir()
    for name in kept:
        source = finished_run / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "run" / name)
    return tmp_path / "run"


def said_by(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return found


def test_a_bundle_holds_what_came_of_the_run_and_says_so(finished_run: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "export"
    exported = export_bundle(finished_run, out, server, now=NOW)
    assert sorted(path.name for path in out.iterdir()) == [
        "initialization.safetensors", "journal.jsonl", "manifest.json", "manifest.sig", "plan.json",
    ]  # fmt: skip
    plan, said = read_plan(finished_run / "plan.json"), Manifest(**said_by(out))
    info = json.loads((finished_run / "run.json").read_bytes())
    assert (said.run_id, said.plan_hash, said.rounds, said.created) == (
        info["run_id"], plan.hash(), 12, "2026-03-01T12:30:00+00:00",
    )  # fmt: skip
    assert said.not_private is exported.not_private is True
    assert said.versions["flwr"] == version("flwr")
    for name, file in said.files.items():
        data = (out / name).read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (file.size_bytes, file.sha256)
    assert exported.sha256 == said.files["initialization.safetensors"].sha256
    assert sha256((out / "plan.json").read_bytes()).hexdigest() == exported.plan_hash == plan.hash()
    journal = read_journal(out / "journal.jsonl")
    assert journal == read_journal(finished_run / "journal.jsonl")
    assert said.banks == Counter(name for record in journal for name in record["admitted"])
    assert set(said.banks.values()) == {12}


def test_the_signature_is_over_the_manifests_very_bytes(finished_run: Path, server: Server, tmp_path: Path) -> None:
    export_bundle(finished_run, tmp_path / "export", server)
    key = load_pem_public_key(server.folder.signing_public_key.read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    signature = (tmp_path / "export" / "manifest.sig").read_bytes()
    assert len(signature) == 64
    # Raises where it is not.
    key.verify(signature, b"metarisk export manifest 1\0" + (tmp_path / "export" / "manifest.json").read_bytes())


def test_a_file_and_a_bundle_hold_the_same_parameters(finished_run: Path, server: Server, tmp_path: Path) -> None:
    alone = export_file(finished_run, tmp_path / "alone.safetensors")
    bundle = export_bundle(finished_run, tmp_path / "export", server)
    assert (tmp_path / "alone.safetensors").read_bytes() == (bundle.path / "initialization.safetensors").read_bytes()
    assert (alone.sha256, alone.plan_hash, alone.not_private) == (bundle.sha256, bundle.plan_hash, bundle.not_private)
    # And always the same bytes, so that their digest can be compared.
    assert {export_file(finished_run, tmp_path / f"{number}").sha256 for number in range(5)} == {alone.sha256}
    found = load_checkpoint(finished_run / "checkpoint")
    assert found is not None
    exported = load_file(alone.path)
    assert exported.keys() == found[0].meta_params.keys()
    for name, value in found[0].meta_params.items():
        np.testing.assert_array_equal(exported[name], value.astype(np.float32))
    with safe_open(alone.path, "numpy") as file:
        said = file.metadata()
    assert said["privacy"].startswith("NOT PRIVATE")
    assert said["plan_hash"] == alone.plan_hash


def test_a_private_run_is_not_stamped(run: Path, tmp_path: Path) -> None:
    info = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps({**info, "not_private": False}))
    assert export_bundle(run, tmp_path / "export", None).not_private is False
    assert said_by(tmp_path / "export")["not_private"] is False
    with safe_open(tmp_path / "export" / "initialization.safetensors", "numpy") as file:
        assert "privacy" not in file.metadata()


def test_without_an_operators_folder_nothing_is_signed(finished_run: Path, tmp_path: Path) -> None:
    export_bundle(finished_run, tmp_path / "export", None)
    assert not (tmp_path / "export" / "manifest.sig").exists()
    assert (tmp_path / "export" / "manifest.json").exists()


def test_a_bank_is_counted_where_its_update_went_into_the_result() -> None:
    records = [
        {"round": 1, "quorum": True, "admitted": ["B", "A"]},
        {"round": 2, "quorum": False, "admitted": ["A"]},
        {"round": 3, "quorum": True, "admitted": ["A"]},
    ]
    assert list(rounds_by_bank(records).items()) == [("A", 2), ("B", 1)]


def test_the_round_that_only_the_checkpoint_has_is_in_the_bundle(run: Path, tmp_path: Path) -> None:
    journal = run / "journal.jsonl"
    whole = read_journal(journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    # Killed between the last checkpoint and the journal's line.
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    export_bundle(run, tmp_path / "export", None)
    assert read_journal(tmp_path / "export" / "journal.jsonl") == whole
    journal.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(IntegrityError, match="no record of round 4"):
        export_bundle(run, tmp_path / "again", None)


Export = Callable[[Path, Path], object]


@pytest.fixture(params=["file", "bundle"])
def export(request: pytest.FixtureRequest, server: Server) -> Export:
    return export_file if request.param == "file" else lambda run, out: export_bundle(run, out, server)


def test_nothing_is_ever_written_over(export: Export, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(ConfigError, match="exists already"):
            export(finished_run, tmp_path / name)
    with pytest.raises(ConfigError, match="no such folder"):
        export(finished_run, tmp_path / "no" / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_only_what_is_finished_and_whole_is_exported(export: Export, run: Path, tmp_path: Path) -> None:
    found = load_checkpoint(run / "checkpoint")
    assert found is not None
    state, record = found
    out = tmp_path / "export"
    other = json.loads((run / "plan.json").read_bytes()) | {"name": "another"}
    (tmp_path / "kept.json").write_bytes((run / "plan.json").read_bytes())
    (run / "plan.json").write_text(json.dumps(other))
    with pytest.raises(IntegrityError, match="another plan"):
        export(run, out)
    shutil.copy(tmp_path / "kept.json", run / "plan.json")
    shutil.rmtree(run / "checkpoint")
    with pytest.raises(ConfigError, match="has not finished"):
        export(run, out)
    save_checkpoint(run / "checkpoint", type(state)(**{**vars(state), "round": 11}), record)
    with pytest.raises(ConfigError, match="has not finished"):
        export(run, out)
    (arrays,) = (run / "checkpoint").glob("*.safetensors")
    arrays.write_bytes(arrays.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="damaged"):
        export(run, out)
    assert not out.exists()


def test_a_full_disk_leaves_nothing(
    export: Export, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, iter(range(1, 100))

    def fail(handle: int) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        export(finished_run, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_signing_key_must_be_the_operators_alone(finished_run: Path, tmp_path: Path) -> None:
    server = load_server(init(tmp_path / "consortium", name="Verbund").path)
    path, out = server.folder.signing_key, tmp_path / "export"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        export_bundle(finished_run, out, server)
    path.chmod(0o600)
    path.write_bytes(server.folder.ca_key.read_bytes())
    with pytest.raises(IntegrityError, match="not the signing key"):
        export_bundle(finished_run, out, server)
    path.unlink()
    with pytest.raises(ConfigError, match="backup"):
        export_bundle(finished_run, out, server)
    assert not out.exists()


def test_what_is_signed_begins_with_its_purpose() -> None:
    assert signed_bytes(b"{}") == b"metarisk export manifest 1\0{}"

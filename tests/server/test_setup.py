"""The operator's folder: whole or not there, the owner's alone, and read back as it was asked for."""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from hypothesis import given
from hypothesis import strategies as st

from metarisk_common.config import validate
from metarisk_common.errors import ConfigError, MetariskError
from server import setup
from server.certificates import certificate_names, check_certificate, days_left
from server.config import ServerConfig, ServerFolder, load_server
from server.enrolment import history
from server.setup import init


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    return init(tmp_path / "deep" / "consortium", name="Verbund", names=["hub.example.org", "192.0.2.7"])


def everything(folder: ServerFolder) -> Iterator[Path]:
    yield folder.path
    yield from (path for path in folder.path.rglob("*") if not path.is_symlink())


def test_everything_that_the_layout_names_is_there(folder: ServerFolder) -> None:
    for path in (folder.config_file, folder.ca_certificate, folder.ca_key, folder.certificate, folder.certificate_key,
                 folder.superexec_secret, folder.signing_key, folder.signing_public_key, folder.enrolment):  # fmt: skip
        assert path.is_file(), path
    for path in (folder.home, folder.runs):
        assert path.is_dir(), path
    assert not folder.database.exists()
    assert history(folder) == ()
    check_certificate(folder)
    assert days_left(folder) in {396, 397}
    assert set(certificate_names(folder)) == {"localhost", "127.0.0.1", "::1", "hub.example.org", "192.0.2.7"}
    assert [path.name for path in folder.path.parent.iterdir()] == ["consortium"]


def test_the_secrets_are_what_their_readers_want_and_new_every_time(folder: ServerFolder, tmp_path: Path) -> None:
    secret = folder.superexec_secret.read_bytes()
    assert len(bytes.fromhex(secret.decode("ascii"))) == 32
    assert secret == secret.strip()
    private = load_pem_private_key(folder.signing_key.read_bytes(), None)
    public = load_pem_public_key(folder.signing_public_key.read_bytes())
    assert isinstance(private, Ed25519PrivateKey)
    assert isinstance(public, Ed25519PublicKey)
    assert private.public_key() == public
    other = init(tmp_path / "other", name="Verbund")
    for path in (folder.superexec_secret, folder.signing_key, folder.ca_key, folder.certificate_key):
        assert path.read_bytes() != (other.path / path.relative_to(folder.path)).read_bytes()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o377])
def test_only_the_owner_may_read_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = init(tmp_path / "consortium", name="Verbund")
    finally:
        os.umask(before)
    for path in everything(folder):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_no_secret_is_open_to_others_even_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, modes = os.fchmod, []

    def watched(handle: int, mode: int) -> None:
        modes.append(os.fstat(handle).st_mode & 0o777)
        original(handle, mode)

    monkeypatch.setattr(os, "fchmod", watched)
    before = os.umask(0)
    try:
        init(tmp_path / "consortium", name="Verbund")
    finally:
        os.umask(before)
    assert set(modes) == {0o600}


def test_the_configuration_is_read_back_and_explains_every_key(tmp_path: Path) -> None:
    asked = {
        "outside_host": "192.0.2.7",
        "outside_port": 19092,
        "inside_port": 19093,
        "metrics_port": 0,
    }
    folder = init(tmp_path / "c", name='A "quoted" \\ Verbund', names=["hub.example.org"], **asked)  # type: ignore[arg-type]
    config = load_server(folder.path).config
    assert config.name == 'A "quoted" \\ Verbund'
    assert (config.outside.host, config.outside.port, config.outside.names) == (
        "192.0.2.7",
        19092,
        ("hub.example.org",),
    )
    assert (config.inside.port, config.metrics.port) == (19093, 0)
    text = folder.config_file.read_text(encoding="utf-8")
    written = tomllib.loads(text)
    # Every key that the configuration knows stands there, under a comment.
    assert written.keys() == ServerConfig.model_fields.keys()
    for section in ("outside", "inside", "metrics"):
        assert written[section].keys() == type(getattr(config, section)).model_fields.keys()
    assert max(map(len, text.splitlines())) <= 120
    assert init(tmp_path / "d", name="x").path == (tmp_path / "d").resolve()
    assert load_server(tmp_path / "d").config == ServerConfig(name="x")


@given(
    name=st.text(min_size=1, max_size=100),
    host=st.text(min_size=1, max_size=30),
    names=st.lists(st.text(max_size=20), max_size=3),
)
def test_any_text_survives_the_configuration(name: str, host: str, names: list[str]) -> None:
    values = {"name": name, "outside": {"host": host, "names": names}}
    config = validate(values, ServerConfig, where="test")
    try:
        text = setup._toml(config)
        assert validate(tomllib.loads(text), ServerConfig, where="test") == config
    except (tomllib.TOMLDecodeError, UnicodeEncodeError):
        assert any(0xD800 <= ord(letter) < 0xE000 for letter in "".join([name, host, *names]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"names": ["https://hub.example.org"]}, "names: 'https://hub.example.org' is the address of a page"),
        ({"names": ["hub.example.org:9092"]}, "has a port"),
        ({"outside_port": 0}, "outside.port"),
        ({"inside_port": 9092}, "must differ"),
        ({"outside_host": ""}, "outside.host"),
        ({"name": ""}, "'name'"),
        ({"name": "two\nlines"}, "name"),
    ],
)
def test_what_cannot_be_meant_leaves_nothing_behind(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        init(tmp_path / "consortium", **{"name": "Verbund", **wrong})
    assert list(tmp_path.iterdir()) == []
    assert ".consortium-" not in str(caught.value)


def test_a_folder_in_use_is_left_alone(folder: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in everything(folder) if path.is_file()}
    with pytest.raises(ConfigError, match="not empty"):
        init(folder.path, name="again")
    assert {path: path.read_bytes() for path in everything(folder) if path.is_file()} == before
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="is not a folder"):
            init(tmp_path / name, name="x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="current folder"):
        init(Path(), name="x")
    monkeypatch.chdir(tmp_path)
    assert load_server(init(Path("empty"), name="x").path).config.name == "x"
    with pytest.raises(ConfigError, match="cannot be laid out here"):
        init(tmp_path / "file" / "under", name="x")


def test_whatever_goes_wrong_nothing_half_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, done, number = os.fsync, False, 0
    while not done:
        number += 1
        calls = iter(range(1, 1000))

        def fail(handle: int, calls: Iterator[int] = calls, number: int = number) -> None:
            if next(calls) == number:
                raise OSError(28, "No space left on device")
            original(handle)

        monkeypatch.setattr(os, "fsync", fail)
        try:
            init(tmp_path / "consortium", name="Verbund")
            done = True
        except MetariskError as error:
            assert "No space left" in str(error)  # noqa: PT017 - until it succeeds
            left = [path.name for path in tmp_path.iterdir()]
            # The last of all is the name itself, after it was given.
            assert left in ([], ["consortium"])
            shutil.rmtree(tmp_path / "consortium", ignore_errors=True)
    assert number > 10


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_no_secret_enters_a_repository(folder: ServerFolder) -> None:
    (folder.runs / "run-1").mkdir()
    (folder.runs / "run-1" / "plan.json").write_text("{}")
    folder.database.touch()
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder.path, check=True, capture_output=True)
    listed = subprocess.run(["git", "ls-files"], cwd=folder.path, check=True, capture_output=True, text=True).stdout
    assert listed.split() == [".gitignore", "certificates/ca.pem", "server.toml", "signing.pub"]

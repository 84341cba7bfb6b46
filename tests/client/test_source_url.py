"""The file of a database's URL: its owner's alone, or refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from client.cli import app
from client.config import InstitutionConfig
from client.source_sql import read_url
from metarisk_common.config import validate
from metarisk_common.errors import ConfigError
from metarisk_common.plan import Plan

URL = "postgresql://bank@host/loans"


def test_a_file_with_the_url_must_be_closed_to_others(tmp_path: Path) -> None:
    secret = tmp_path / "db.url"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_url(secret)
    secret.write_text(URL)
    for mode in (0o640, 0o604, 0o620, 0o601):
        secret.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600") as caught:
            read_url(secret)
        assert URL not in str(caught.value)
    secret.chmod(0o600)
    assert read_url(secret) == URL
    (tmp_path / "link").symlink_to(secret)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_url(tmp_path / "link")
    with pytest.raises(ConfigError, match="is no file"):
        read_url(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="is no file"):
        read_url(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "db.url"
    secret.write_text(URL)
    secret.chmod(0o600)
    shutil.chown(secret, "nobody")
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_url(secret)


URLS = ["postgresql+psycopg://bank:s3cr3t@host/loans", "sqlite:///s3cr3t.db", "mysql://bank:s3cr3t*?[@host/x.csv"]


@pytest.mark.parametrize("url", URLS)
def test_the_url_itself_in_place_of_its_file_is_refused_and_not_repeated(url: str) -> None:
    values = {"name": "A", "declared_size": 100, "policy": {"epsilon": 1.0, "delta": 1e-5}}
    values["table"] = {"url_file": url, "table": "loans"}
    with pytest.raises(ConfigError, match=r"key 'table\.url_file': names the file that holds") as told:
        validate(values, InstitutionConfig, where="institution.toml")
    assert "s3cr3t" not in str(told.value)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("option", ["--data", "--from"])
def test_a_url_in_place_of_a_table_s_file_is_not_repeated(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, plan: Plan, option: str, url: str
) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    given = ("--name", "A", "--declared-size", 1000, "--epsilon", 1)
    extra = ("--plan", tmp_path / "plan.json") if option == "--from" else ()
    code, out, err = call(app, "init", tmp_path / "bank", *given, option, url, *extra, "--yes")
    assert (code, out) == (2, "")
    assert "--url-env or --url-file" in err
    assert "s3cr3t" not in err
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("where", ["data = ", "[table]\nfile = "])
def test_a_url_in_place_of_a_file_in_the_configuration_is_not_repeated(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, plan: Plan, where: str, url: str
) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    policy = "policy = { epsilon = 1.0, delta = 1e-5 }"
    text = f'name = "A"\ndeclared_size = 1000\n{policy}\n{where}"{url}"\n'
    (tmp_path / "institution.toml").write_text(text, encoding="utf-8")
    code, out, err = call(app, "check", tmp_path, "--plan", tmp_path / "plan.json")
    assert code == 2
    assert "s3cr3t" not in out + err

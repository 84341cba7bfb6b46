"""The file of a database's URL: its owner's alone, or refused."""

import os
import shutil
from pathlib import Path

import pytest

from client.source_sql import read_url
from metarisk_common.errors import ConfigError

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

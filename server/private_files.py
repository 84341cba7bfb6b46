"""Files and folders of the operator that nobody else may read, whatever the umask, and a lock between commands."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from metarisk_common.errors import ConfigError, IntegrityError, MetariskError

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path) -> None:
    """Make a folder of mode 0700; one that is there already is made so."""
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by one of mode 0600, so that a crash leaves the old content or the new one, on the disk."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    try:
        # A handle, not a path: no one else may read it even for a moment.
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_private(path: Path, missing: str) -> bytes:
    """Read a private key or another secret.

    Args:
        path: the file.
        missing: what to do where it is missing, for the message.

    Raises:
        ConfigError: it is missing, cannot be read, or may be read by others.

    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: is not here; {missing}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & _OTHERS:
        raise ConfigError(f"{path}: is open to others; make it yours alone: chmod 600")
    return content


def read_public(path: Path, missing: str) -> bytes:
    """Read a file that is no secret but must be there.

    Raises:
        IntegrityError: it is missing.
        ConfigError: it cannot be read.

    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path}: is not here; {missing}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock against every other command that takes it, for the block; a process that ends lets go of it.

    Raises:
        MetariskError: the lock's folder cannot be written, here or within the block.

    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(handle, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except OSError as error:
        raise MetariskError(f"{path.parent}: cannot be written: {error.strerror}") from None


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that are whole or not there, whatever a crash; and files that are for their owner's eyes alone."""

import os
import stat
from pathlib import Path
from typing import Final

from .errors import ConfigError, MetariskError

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a crash at any instant leaves the old content or the new one, on the disk."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_new_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600, whatever the umask, at a path that is free, and onto the disk.

    Raises:
        FileExistsError: the path is not free; a link counts, wherever it leads.

    """
    # A handle, not a path: no one else may read it even for a moment.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(handle, "wb") as file:  # noqa: PTH123 - as above
        os.fchmod(handle, 0o600)
        file.write(data)
        file.flush()
        os.fsync(handle)


def read_private(path: Path, what: str, missing: MetariskError) -> bytes:
    """Read a private key or another secret; `what` it is, for the message.

    Raises:
        MetariskError: `missing`, if it is not there.
        ConfigError: it cannot be read, or may be read by others.

    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except FileNotFoundError:
        raise missing from None
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be read: {error.strerror}") from None
    if mode & _OTHERS:
        raise ConfigError(f"{path}: {what} is open to others; make it yours alone: chmod 600")
    return content


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

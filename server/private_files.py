"""Files and folders of the operator that nobody else may read, whatever the umask, and a lock between commands."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from metarisk_common.files import sync_folder, write_new_private


def private_folder(path: Path) -> None:
    """Make a folder of mode 0700; one that is there already is made so."""
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by one of mode 0600, so that a crash leaves the old content or the new one, on the disk."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    try:
        write_new_private(draft, data)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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

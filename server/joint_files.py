"""Private files of one folder that change at one instant, like a key and its certificate.

Each is a link through `current`, itself a link to the folder that holds one version of all of them. Replacing a link is
atomic, so whatever a crash, the files are all of one version.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Final

from metarisk_common.files import sync_folder

from .private_files import private_folder, write_private

_CURRENT: Final = "current"
_VERSION: Final = "version-"


def replace_together(place: Path, contents: Mapping[str, bytes]) -> None:
    """Give files of a folder new content, all at once, each of mode 0600; older versions are removed.

    Args:
        place: the folder; nobody else changes it meanwhile.
        contents: what each is to hold, by its name; the same names at every call.

    Raises:
        OSError: the folder cannot be written; then every file is as it was.

    """
    if not all((place / name).is_symlink() for name in contents):
        _take_in(place, list(contents))
    version = _write_version(place, contents)
    _link(place / _CURRENT, version)
    for old in place.glob(f"{_VERSION}*"):
        if old.name != version:
            rmtree(old)


def _take_in(place: Path, names: list[str]) -> None:
    """Turn what stands in the files' places into links to the same content, so that all can change at once."""
    present = {name: (place / name).read_bytes() for name in names if (place / name).exists()}
    if len(present) == len(names):
        _link(place / _CURRENT, _write_version(place, present))
    for name in names:
        _link(place / name, f"{_CURRENT}/{name}")


def _write_version(place: Path, contents: Mapping[str, bytes]) -> str:
    version = f"{_VERSION}{secrets.token_hex(8)}"
    private_folder(place / version)
    for name, data in contents.items():
        write_private(place / version / name, data)
    return version


def _link(path: Path, target: str) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(path)
    sync_folder(path.parent)

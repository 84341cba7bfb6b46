"""Which files a table's path means: one file, or a folder or pattern of Parquet files, partitioned or not."""

import os
import re
from pathlib import Path
from typing import Final

from metarisk_common.errors import DataError

_SUFFIXES: Final = (".csv", ".parquet")
_ADDRESS: Final = re.compile(r"(^|/)[A-Za-z][A-Za-z0-9+.-]+:/")  # a path makes one slash of two
_NO_VALUE: Final = "__HIVE_DEFAULT_PARTITION__"


def is_address(path: Path | str) -> bool:
    """Tell whether what was given for a path is a URL; one of a database holds a password, which no message may."""
    return _ADDRESS.search(str(path)) is not None


def _refuse_address(path: Path) -> None:
    if is_address(path):
        raise DataError(
            "a URL was given where the path of a file belongs; of a database, name the variable or file that holds it: "
            "--url-env or --url-file, or url_env or url_file in section table of institution.toml"
        )


def check_file(path: Path) -> None:
    """Raise where a path cannot be a table in one file. Whether its content is one is for a reader to say.

    Raises:
        DataError: it is a URL, its suffix is another, there is no such file, or this user may not look.

    """
    _refuse_address(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path}: only .csv and .parquet files are read; export the table as one of them")
    try:
        there = path.is_file()
    except OSError:
        raise DataError(f"{path}: may not be read by this user; change the file's permissions") from None
    if not there:
        raise DataError(f"{path}: there is no such file; check the path, and that the table was exported")


def is_many(path: Path) -> bool:
    """Tell whether a path is a folder or a pattern, which only section `[table]` takes.

    Raises:
        DataError: it is a URL, or this user may not look.

    """
    _refuse_address(path)
    try:
        return path.is_dir() or (any(sign in str(path) for sign in "*?[") and not path.exists())
    except OSError:
        raise DataError(f"{path}: may not be read by this user; change the permissions of its folder") from None


def files_of(path: Path) -> tuple[Path, list[Path]]:
    """List the Parquet files of a folder or pattern in the order of their names, and say where their names begin.

    Hidden files are left out, and marks such as _SUCCESS, which other tools leave there.

    Raises:
        DataError: there is none, or this user may not look into a folder that may have some.

    """

    def stop(error: OSError) -> None:
        raise error

    root, pattern = path, "**/*.parquet"
    if not path.is_dir():
        root = next(parent for parent in path.parents if not any(sign in str(parent) for sign in "*?["))
        pattern = str(path.relative_to(root))
    try:
        # A glob passes over what may not be listed, without a word.
        for _, folders, _ in os.walk(root, onerror=stop):
            folders[:] = [name for name in folders if root == path and name[0] not in "._"]
        found = [file for file in root.glob(pattern) if file.is_file()]
    except OSError as error:
        place = error.filename or root
        raise DataError(f"{place}: may not be read by this user; change the folder's permissions") from None
    files = sorted(file for file in found if not any(part[0] in "._" for part in file.relative_to(root).parts))
    if not files:
        raise DataError(f"{path}: has no Parquet file; check the path, and that the table was exported")
    return root, files


def partition_of(file: Path, root: Path) -> dict[str, str | None]:
    """Read the columns that the names of folders give, year=2015; each is text, so that a code "01" keeps its zero."""
    pairs = (part.split("=", 1) for part in file.relative_to(root).parts[:-1] if "=" in part)
    return {_unquoted(name): None if value == _NO_VALUE else _unquoted(value) for name, value in pairs}


def _unquoted(text: str) -> str:
    """Undo a partition name's percent signs (RFC 3986, section 2.1), without a library that can open addresses."""
    plain = re.sub(rb"%([0-9A-Fa-f]{2})", lambda found: bytes([int(found[1], 16)]), text.encode())
    return plain.decode(errors="replace")

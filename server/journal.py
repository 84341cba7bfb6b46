"""The journal: one JSON line a round, enough to reconstruct who took part in what. Append-only, flushed to disk."""

import json
import os
from pathlib import Path
from typing import Any

from metarisk_common.errors import IntegrityError
from metarisk_common.files import write_atomically


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return every complete record; a last line that a crash cut short is left out.

    Raises:
        IntegrityError: a line before the last is no record, which no crash can do.

    """
    return [json.loads(line) for line in _complete_lines(path)]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one record and wait until it is on the disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def mend_journal(path: Path, last: dict[str, Any] | None) -> None:
    """After a crash: drop a torn line, and add the record that the checkpoint holds but the journal does not.

    Raises:
        IntegrityError: a line before the last is no record.

    """
    lines = _complete_lines(path)
    complete = b"".join(line + b"\n" for line in lines)
    if path.exists() and path.read_bytes() != complete:
        write_atomically(path, complete)
    if last is not None and all(json.loads(line)["round"] != last["round"] for line in lines):
        append_record(path, last)


def _complete_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    # A record ends with its line break: what follows the last one was cut short, even where it happens to parse.
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        if not _is_record(line):
            raise IntegrityError(f"{path}: line {number} is not what was written; restore the journal from a copy")
    return lines


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False

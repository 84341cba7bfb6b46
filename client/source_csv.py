"""CSV files of any size, cut between records a block at a time, so that memory stays that of one block.

Whether a separator or a line's end stands within quotes is the parity of the quotes before it, which NumPy finds for a
whole block at once. So a row that was cut short is found in a file of gigabytes within seconds.
"""

from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from metarisk_common.errors import DataError

BLOCK_BYTES: Final = 8 << 20
_LONGEST_RECORD: Final = 8
"""Blocks that one record may fill: beyond that a quote was never closed."""

_QUOTE, _NEWLINE, _RETURN = 34, 10, 13


@dataclass(frozen=True)
class Block:
    """Whole records of a CSV file: `text` with the header before them, and how many `records` there are."""

    text: bytes
    records: int


@dataclass(frozen=True)
class _Cut:
    """Where the records of a piece of a file end, and how many cells each has, `(records,)` both; no cells: blank."""

    ends: np.ndarray
    cells: np.ndarray


def csv_blocks(path: Path, separator: str = ",", block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield the file in blocks of whole records; the first is the header alone, with no records.

    Raises:
        DataError: the file is empty or not UTF-8, or a row has fewer or more cells than the header: Polars would fill
            up a row that was cut short.
        OSError: it cannot be read.

    """
    with path.open("rb") as file:
        header, width, line = b"", 0, 1
        for piece, cut in _pieces(file, path, ord(separator), block_bytes):
            _check_text(piece, path, line)
            if b"\0" in piece:
                number = line + piece.count(b"\n", 0, piece.index(b"\0"))
                raise DataError(
                    f"{path}: holds NUL bytes (near line {number}); the file was damaged while it was written, or is "
                    "UTF-16: export the table again, as UTF-8"
                )
            start, first = 0, 0
            if not header:
                first, start, width = 1, int(cut.ends[0]), int(cut.cells[0])
                header = piece[:start] if piece[:start].endswith(b"\n") else piece[:start] + b"\n"
                yield Block(header, 0)
            wrong = np.flatnonzero((cut.cells[first:] != width) & (cut.cells[first:] != 0))
            if len(wrong):
                which = first + int(wrong[0])
                number = line + piece.count(b"\n", 0, int(cut.ends[which]) - 1)
                raise DataError(
                    f"{path}: line {number} has {cut.cells[which]} cells and the header has {width}; "
                    "the file may have been cut short, or a cell with a comma lacks its quotes"
                )
            line += piece.count(b"\n")
            if len(cut.ends) > first:
                yield Block(header + piece[start:], len(cut.ends) - first)
        if not header:
            raise DataError(f"{path}: is empty; export the table again with a header and one row for each record")


def check_csv(path: Path) -> None:
    """Raise where a file is no CSV in UTF-8 with commas, or a row has fewer or more cells than the header.

    Raises:
        DataError: as `csv_blocks`.

    """
    for _ in csv_blocks(path):
        pass


def _pieces(file: BinaryIO, path: Path, separator: int, block_bytes: int) -> Iterator[tuple[bytes, _Cut]]:
    """Cut the file into pieces that hold whole records."""
    rest, begun = b"", False
    while True:
        block = file.read(block_bytes)
        if not begun:
            block, begun = block.removeprefix(BOM_UTF8), True
        data = rest + block
        if not data:
            return
        cut = _cut(data, separator, last=not block)
        end = int(cut.ends[-1]) if len(cut.ends) else 0
        if end:
            yield data[:end], cut
        rest = data[end:]
        if rest and (not block or len(rest) > _LONGEST_RECORD * block_bytes):
            raise DataError(f"{path}: can't be read as CSV: a quote is never closed; export the table again")


def _cut(data: bytes, separator: int, *, last: bool) -> _Cut:
    """Find the records' ends, those of the file's last piece included though it has no end of line."""
    cells = np.frombuffer(data, np.uint8)
    newlines, separators = cells == _NEWLINE, cells == separator
    closed = True
    if b'"' in data:
        inside = np.bitwise_xor.accumulate(cells == _QUOTE)
        newlines &= ~inside
        separators &= ~inside
        closed = not bool(inside[-1])
    ends = np.flatnonzero(newlines) + 1
    if last and closed and data and (not len(ends) or ends[-1] != len(data)):
        ends = np.append(ends, len(data))
    counts = np.diff(np.searchsorted(np.flatnonzero(separators), ends), prepend=0) + 1
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    length = ends - starts
    blank = (length == 1) & newlines[starts] if len(ends) else np.zeros(0, np.bool_)
    if len(ends):
        blank |= (length == 2) & (cells[starts] == _RETURN)  # noqa: PLR2004 - a return and a newline
    return _Cut(ends, np.where(blank, 0, counts))


def _check_text(piece: bytes, path: Path, line: int) -> None:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + piece.count(b"\n", 0, error.start)
        raise DataError(f"{path}: is not UTF-8 text (near line {number}); save or export it as UTF-8") from None

"""The journal: one line a round, whole after any crash, and never silently shorter."""

import json
from pathlib import Path
from typing import Any

import pytest

from metarisk_common.errors import IntegrityError
from server.journal import append_record, mend_journal, read_journal


def record(number: int) -> dict[str, Any]:
    return {"round": number, "admitted": ["Bank A", "Kölner\u2028Bank\n"], "seconds": 0.5, "mean_update_norm": None}


def written(folder: Path, *numbers: int) -> Path:
    path = folder / "journal.jsonl"
    for number in numbers:
        append_record(path, record(number))
    return path


def rounds(path: Path) -> list[int]:
    return [entry["round"] for entry in read_journal(path)]


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2, 3)
    assert read_journal(path) == [record(1), record(2), record(3)]
    assert path.read_bytes().count(b"\n") == 3


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "absent.jsonl") == []
    mend_journal(tmp_path / "absent.jsonl", None)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for length in range(second, len(whole)):
        path.write_bytes(whole[:length])
        assert rounds(path) == [1]
        mend_journal(path, record(2))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\xff\xfe", b"{", b"3"])
def test_whatever_a_crash_left_behind_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = written(tmp_path, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert rounds(path) == [1, 2]
    mend_journal(path, record(2))
    assert path.read_bytes() == whole


def test_mending_adds_the_round_that_only_the_checkpoint_has(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2)
    mend_journal(path, record(3))
    assert rounds(path) == [1, 2, 3]
    assert read_journal(path)[-1] == record(3)


def test_mending_twice_is_mending_once(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2)
    for _ in range(2):
        mend_journal(path, record(3))
    assert rounds(path) == [1, 2, 3]


def test_mending_starts_a_journal_that_was_never_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    mend_journal(path, record(1))
    assert rounds(path) == [1]


def test_a_whole_journal_is_not_touched(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2)
    before = path.stat()
    mend_journal(path, record(2))
    mend_journal(path, None)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", [b"\0\0\0", b'{"round": 2', b"3", b"", b"\xff"])
def test_damage_before_the_last_line_is_no_crash(tmp_path: Path, damage: bytes) -> None:
    """Leaving it out would lose the rounds after it, and mending would make the loss permanent."""
    path = written(tmp_path, 1, 2, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + lines[2])
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match="line 2"):
        read_journal(path)
    with pytest.raises(IntegrityError, match="line 2"):
        mend_journal(path, record(3))
    assert path.read_bytes() == before


def test_mending_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, 1, 2)
    torn = path.read_bytes() + b'{"rou'
    path.write_bytes(torn)

    def crash(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match=r"^$"):
        mend_journal(path, record(3))
    assert path.read_bytes() == torn


def test_records_are_ascii_lines_of_json(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    text = path.read_bytes()
    assert text.isascii()
    assert len(text.splitlines()) == 1
    assert json.loads(text) == record(1)

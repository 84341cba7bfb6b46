"""Checkpoints: the same bits again, damage noticed, and a whole file at every instant."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metarisk_common.errors import IntegrityError
from metarisk_common.files import write_atomically
from server import checkpoint
from server.checkpoint import MANIFEST, load_checkpoint, save_checkpoint
from server.optimizers import adam, momentum, sgd
from server.state import ServerState

META = {"body.0.weight": np.arange(6.0).reshape(2, 3) / 7, "head.bias": np.array([-1.5])}
RECORD = {"round": 3, "admitted": ["Bank A", "Kölner Bank"], "quorum": True, "mean_update_norm": None, "seconds": 0.5}


def state_of(name: str = "adam", round_number: int = 3) -> ServerState:
    optimizer = {"sgd": sgd(), "momentum": momentum(0.9), "adam": adam()}[name]
    optimizer_state, meta = optimizer.apply(optimizer.init(META), META, META, 0.1)
    return ServerState("run-1", "ab" * 32, round_number, meta, optimizer_state, {"Bank A": 100, "Kölner Bank": 7})


def same(a: ServerState, b: ServerState) -> bool:
    if replace(a, meta_params={}, optimizer_state={}) != replace(b, meta_params={}, optimizer_state={}):
        return False
    pairs = [(a.meta_params, b.meta_params), (a.optimizer_state, b.optimizer_state)]
    return all(
        one.keys() == two.keys()
        and all(
            one[key].dtype == two[key].dtype
            and one[key].shape == two[key].shape
            and one[key].tobytes() == two[key].tobytes()
            for key in one
        )
        for one, two in pairs
    )


def loaded(folder: Path) -> ServerState:
    found = load_checkpoint(folder)
    assert found is not None
    return found[0]


def arrays_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("record", [None, RECORD])
def test_what_was_saved_comes_back(tmp_path: Path, name: str, record: dict[str, object] | None) -> None:
    save_checkpoint(tmp_path / "deep" / "down", state_of(name), record)
    found = load_checkpoint(tmp_path / "deep" / "down")
    assert found is not None
    assert same(found[0], state_of(name))
    assert found[1] == record


def test_transposed_and_single_numbers_come_back(tmp_path: Path) -> None:
    state = replace(state_of(), meta_params={"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(2.5)})
    save_checkpoint(tmp_path, state)
    found = loaded(tmp_path).meta_params
    assert found["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["b"].shape == ()


def test_nothing_saved_is_nothing(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "absent") is None


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".round-000001-0123.safetensors.new").write_bytes(b"left by a crash")
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, state_of(round_number=number))
    assert loaded(tmp_path).round == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_before_the_manifest_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even for two states of one round, as after a restart with other replies."""
    save_checkpoint(tmp_path, state_of())

    def crash(path: Path, data: bytes) -> None:
        if path.name == MANIFEST:
            raise OSError
        write_atomically(path, data)

    monkeypatch.setattr("server.checkpoint.write_atomically", crash)
    other = replace(state_of(), meta_params={name: value + 1 for name, value in META.items()})
    with pytest.raises(OSError, match=r"^$"):
        save_checkpoint(tmp_path, other)
    assert same(loaded(tmp_path), state_of())


def test_a_reader_whose_checkpoint_is_replaced_reads_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `metarisk-server status` beside a running server: the arrays it was about to read are gone."""
    save_checkpoint(tmp_path, state_of(round_number=1))
    overtaken: list[bool] = []

    def overtake(folder: Path, sealed: bytes) -> tuple[ServerState, dict[str, object] | None]:
        if not overtaken:
            overtaken.append(True)
            other = replace(state_of(round_number=2), meta_params={"a": np.ones(2)})
            save_checkpoint(folder, other)
        return read_state(folder, sealed)

    read_state = checkpoint._read_state
    monkeypatch.setattr(checkpoint, "_read_state", overtake)
    assert loaded(tmp_path).round == 2


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(), RECORD)
    for path in (tmp_path / MANIFEST, arrays_of(tmp_path)):
        good = path.read_bytes()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(IntegrityError):
                load_checkpoint(tmp_path)
        path.write_bytes(good)
    assert same(loaded(tmp_path), state_of())


@pytest.mark.parametrize("keep", [0, 1, 7, 100])
@pytest.mark.parametrize("which", ["manifest", "arrays"])
def test_a_truncated_file_is_noticed(tmp_path: Path, which: str, keep: int) -> None:
    save_checkpoint(tmp_path, state_of())
    path = tmp_path / MANIFEST if which == "manifest" else arrays_of(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match="damaged"):
        load_checkpoint(tmp_path)


def test_missing_arrays_are_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of())
    arrays_of(tmp_path).unlink()
    with pytest.raises(IntegrityError) as error:
        load_checkpoint(tmp_path)
    assert str(tmp_path / MANIFEST) in str(error.value)


def test_arrays_of_another_checkpoint_are_noticed(tmp_path: Path) -> None:
    for name, number in (("a", 1), ("b", 2)):
        save_checkpoint(tmp_path / name, state_of(round_number=number))
    other = replace(state_of(), meta_params={name: value + 1 for name, value in META.items()})
    save_checkpoint(tmp_path / "b", other)
    arrays_of(tmp_path / "a").write_bytes(arrays_of(tmp_path / "b").read_bytes())
    with pytest.raises(IntegrityError):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"manifest": {}, "sha256": ""}', '{"manifest": 3}'])
def test_a_manifest_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(IntegrityError):
        load_checkpoint(tmp_path)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_the_manifest_is_for_people_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(), RECORD)
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))["manifest"]
    assert (manifest["run_id"], manifest["round"], manifest["record"]) == ("run-1", 3, RECORD)


SAVER = """
import sys
from pathlib import Path
import numpy as np
from server.checkpoint import save_checkpoint
from server.state import ServerState

folder, number = Path(sys.argv[1]), int(sys.argv[2])
while True:
    number += 1
    arrays = {"a": np.full(20_000, float(number))}
    for _ in range(2):
        save_checkpoint(folder, ServerState("run-1", "ab", number // 2, arrays, arrays), {"number": number})
    if number % 5 == 0:
        print(number, flush=True)
"""


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """kill -9 into a loop of saves, and reading all the while: there is always a whole checkpoint, and it is recent."""
    random = np.random.default_rng(11)
    number = 0
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = int(process.stdout.readline())
            # A number of reads instead of a time: each finds a whole checkpoint while the saver goes on.
            for _ in range(int(random.integers(1, 40))):
                check_whole(tmp_path, said)
            process.kill()
        number = check_whole(tmp_path, said)
    assert number >= 50


def check_whole(folder: Path, at_least: int) -> int:
    found = load_checkpoint(folder)
    assert found is not None
    state, record = found
    assert record is not None
    number = int(record["number"])
    assert number >= at_least
    assert state.round == number // 2
    for arrays in (state.meta_params, state.optimizer_state):
        assert np.array_equal(arrays["a"], np.full(20_000, float(number)))
    return number

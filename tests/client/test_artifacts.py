"""The folder of an adapted model: private, whole, never overwritten, and nothing but what was written."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.artifacts import Labels, Method, Model, ModelManifest, Origin, data_fingerprint, load_model, write_model
from client.points import PointScale
from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.plan import Plan

FILES = ["draws.safetensors", "model.json", "params.safetensors", "plan.json"]


def manifest_for(plan: Plan) -> ModelManifest:
    return ModelManifest(
        name="loans", institution="Lender A", created="2026-11-23T10:00:00+00:00",
        origin=Origin(sha256="ab" * 32, run_id="run", plan_hash=plan.hash(), signed_by=None, not_private=False),
        labels=Labels(fingerprint="cd" * 32, k=2, positives=1, available=9, left_out=0, segment=None, seed=1),
        method=Method(asked="auto", used="prox", strength=3.0, folds_log_loss={}, prior="constant", prior_variance=0.3),
        points=PointScale(), draws=2, versions={},
    )  # fmt: skip


@pytest.fixture
def write(tmp_path: Path, plan: Plan) -> Callable[..., Model]:
    params = {
        name: np.asarray(value, np.float64) + 0.5
        for name, value in initial_params(plan, Encoder(plan.data).width).items()
    }

    def call(name: str = "loans") -> Model:
        return write_model(tmp_path, name, manifest_for(plan), plan, params, (params, {**params}))

    return call


def test_a_model_reads_as_it_was_written(write: Callable[..., Model]) -> None:
    written = write()
    found = load_model(written.folder)
    assert found.manifest == written.manifest
    assert found.plan == written.plan
    assert len(found.draws) == 2
    for name, value in written.params.items():
        np.testing.assert_array_equal(found.params[name], value)
        np.testing.assert_array_equal(found.draws[1][name], value)
    assert json.loads((written.folder / "model.json").read_bytes())["claim"] == "no DP claim"


def test_only_the_owner_may_read_any_of_it(write: Callable[..., Model], tmp_path: Path) -> None:
    folder = write().folder
    assert sorted(path.name for path in folder.iterdir()) == FILES
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "models").rglob("*")}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}
    assert stat.S_IMODE((tmp_path / "models").stat().st_mode) == 0o700


def test_every_model_is_a_new_version(write: Callable[..., Model], tmp_path: Path) -> None:
    names = [write().folder.name, write().folder.name, write("other").folder.name]
    (tmp_path / "models" / "loans-007").symlink_to("nowhere")
    names.append(write().folder.name)
    assert names == ["loans-001", "loans-002", "other-001", "loans-008"]


def test_a_version_that_another_process_takes_meanwhile_stays_as_it_is(
    write: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if target.name == "loans-001" and not target.exists():
            target.mkdir()
            (target / "model.json").write_text("theirs", encoding="utf-8")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert write().folder.name == "loans-002"
    assert (tmp_path / "models" / "loans-001" / "model.json").read_text(encoding="utf-8") == "theirs"
    assert [path.name for path in (tmp_path / "models").iterdir() if path.name.startswith(".")] == []


def test_a_write_that_fails_leaves_nothing(
    write: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.artifacts.sync_folder", full)
    with pytest.raises(ConfigError, match="models: cannot be written: No space left"):
        write()
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(write: Callable[..., Model], name: str) -> None:
    path = write().folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(IntegrityError, match=name):
        load_model(path.parent)
    path.unlink()
    missing = (ConfigError, "no adapted model") if name == "model.json" else (IntegrityError, f"{name}: is missing")
    with pytest.raises(missing[0], match=missing[1]):
        load_model(path.parent)


def test_a_fingerprint_is_of_the_records_and_not_of_their_order(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(30, 5)).astype(np.float32), random.integers(0, 2, 30).astype(np.float32)
    order = random.permutation(30)
    first = data_fingerprint(tmp_path, x, y)
    assert data_fingerprint(tmp_path, x[order], y[order]) == first
    assert data_fingerprint(tmp_path, x, 1 - y) != first
    assert data_fingerprint(tmp_path, x[:29], y[:29]) != first
    other = tmp_path / "another-bank"
    other.mkdir()
    assert data_fingerprint(other, x, y) != first, "a fingerprint without a key of the bank's own can be tried out"
    assert stat.S_IMODE((tmp_path / "models" / "fingerprint.key").stat().st_mode) == 0o600
    (tmp_path / "models" / "fingerprint.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"fingerprint\.key.*open to others"):
        data_fingerprint(tmp_path, x, y)


def test_points_follow_their_known_answers() -> None:
    scale = PointScale()
    # Odds of 50, 100 and 25 good to one bad: the base, and 20 points more or less.
    logits = -np.log(np.array([50.0, 100.0, 25.0, 1.0]))
    assert scale.points(logits).tolist() == [600, 620, 580, 487]
    other = PointScale(base_score=660, base_odds=72, pdo=40)
    assert other.points(-np.log([72.0, 144.0, 18.0])).tolist() == [660, 700, 580]
    assert (round(PointScale().factor, 4), round(PointScale().offset, 4)) == (28.8539, 487.1229)

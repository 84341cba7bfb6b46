"""The bundle that starts a run: no code, the same bytes everywhere, and what others would slip in is seen."""

import io
import zipfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarisk_common.bundle import LARGEST, app_bundle, build_bundle, digest, surplus


def names(bundle: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def test_our_bundle_holds_its_description_and_the_licence() -> None:
    assert sorted(names(app_bundle())) == [".info/CONTENT", "LICENSE", "pyproject.toml"]
    assert surplus(app_bundle()) == []


def test_its_bytes_are_the_same_every_time_and_owe_nothing_to_a_compressor() -> None:
    bundle = app_bundle()
    assert digest(bundle) == digest(app_bundle())
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.date_time == (1980, 1, 1, 0, 0, 0)


@pytest.mark.parametrize(
    "name",
    [
        "client/__init__.py", "client.py", "metarisk_common/bundle.py", "sitecustomize.py", "torch.pth", "secrets.toml",
        "../client/app.py", "LICENSE/../client.py", "pyproject.toml/x", "client/app.cpython-311-x86_64.so", "license",
    ],
)  # fmt: skip
def test_whatever_else_lies_in_a_bundle_is_named(name: str) -> None:
    files = {"pyproject.toml": b"", "LICENSE": b"", name: b"raise SystemExit"}
    assert surplus(build_bundle(files)) == [name]


def test_a_name_that_stands_twice_is_found_by_the_digest() -> None:
    """A second `pyproject.toml` is no surplus name; but no bundle with one is ever approved."""
    buffer = io.BytesIO(app_bundle())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("pyproject.toml", "other = 1")
    assert surplus(buffer.getvalue()) == []
    assert digest(buffer.getvalue()) != digest(app_bundle())


@given(st.binary(max_size=300))
def test_what_is_no_archive_is_refused_with_a_constant(content: bytes) -> None:
    try:
        surplus(content)
    except ValueError as error:
        assert str(error) == "not an archive"  # noqa: PT017 - most random bytes are none, an empty archive is one


def test_a_bundle_larger_than_any_without_code_is_not_even_opened() -> None:
    with pytest.raises(ValueError, match="larger than any"):
        surplus(app_bundle() + bytes(LARGEST))


def test_flower_takes_it_for_a_bundle() -> None:
    from flwr.cli import config_utils  # noqa: PLC0415

    flower: Any = config_utils
    assert flower.validate_config(flower.get_fab_config(app_bundle()), check_module=False)[:2] == (True, [])

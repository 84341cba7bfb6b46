"""Mistakes in a file: one line that names the file and the key, and repeats no value."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from metarisk_common.config import Frozen, load_toml, read_toml, validate
from metarisk_common.errors import ConfigError
from metarisk_common.plan import Plan

CANARY = "CANARY40211"


class Inner(Frozen):
    steps: int = Field(default=1, ge=1)
    kind: Literal["a", "b"] = "a"


class Outer(Frozen):
    name: str = Field(max_length=20)
    rate: float = Field(gt=0, allow_inf_nan=False)
    inner: Inner = Inner()
    widths: tuple[int, ...] = ()


GOOD = 'name = "x"\nrate = 0.5\n'


def complaint(folder: Path, text: str | bytes, model: type[Frozen] = Outer) -> str:
    path = folder / "some.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as error:
        load_toml(path, model)
    message = str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert CANARY not in message
    return message.removeprefix(f"{path}: ")


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text(GOOD + "widths = [3, 4]\n[inner]\nsteps = 7\n", encoding="utf-8")
    assert load_toml(path, Outer) == Outer(name="x", rate=0.5, inner=Inner(steps=7), widths=(3, 4))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('nmae = "x"\nrate = 0.5\n', "unknown key 'nmae'; did you mean 'name'? (and 1 more problem)"),
        (GOOD + f'zzzzqq = "{CANARY}"\n', "unknown key 'zzzzqq'"),
        (GOOD + "[inner]\nstep = 3\n", "unknown key 'inner.step'; did you mean 'steps'?"),
        (GOOD + f'[inner]\nkidn = "{CANARY}"\n', "unknown key 'inner.kidn'; did you mean 'kind'?"),
        (f'name = "{CANARY}"\n', "key 'rate' is missing"),
        ("", "key 'name' is missing (and 1 more problem)"),
        (f'name = "{CANARY * 3}"\nrate = 0.5\n', "key 'name': String should have at most 20 characters"),
        (
            f'name = "x"\nrate = "{CANARY}"\n',
            "key 'rate': Input should be a valid number, unable to parse string as a number",
        ),
        ("name = 40211\nrate = 0.5\n", "key 'name': Input should be a valid string"),
        ('name = "x"\nrate = -40211\n', "key 'rate': Input should be greater than 0"),
        ('name = "x"\nrate = nan\n', "key 'rate': Input should be a finite number"),
        (GOOD + "inner = 3\n", "key 'inner': Input should be a valid dictionary or instance of Inner"),
        (GOOD + f'[inner]\nkind = "{CANARY}"\n', "key 'inner.kind': Input should be 'a' or 'b'"),
        (GOOD + "[inner]\nsteps = 2.5\n", "key 'inner.steps': Input should be a valid integer, got a number with "),
        (GOOD + f'widths = [1, "{CANARY}"]\n', "key 'widths.1': Input should be a valid integer, unable to parse "),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, text: str, said: str) -> None:
    found = complaint(tmp_path, text)
    assert found.startswith(said)
    assert "40211" not in found
    assert len(found) == len(said) or said.endswith(" ")


@pytest.mark.parametrize(
    "text",
    [
        f"name = {CANARY}\n",
        f'name = "{CANARY}\n',
        f'name = "{CANARY}\\q"\n',
        f"[{CANARY}\n",
        f'name = "{CANARY}"\nname = "{CANARY}"\n',
        f'name = "{CANARY}" "{CANARY}"\n',
        f'name = """{CANARY}',
    ],
)
def test_broken_toml_is_named_by_its_line(tmp_path: Path, text: str) -> None:
    found = complaint(tmp_path, text)
    assert found.startswith("is not valid TOML: ")
    assert "line" in found or "end of document" in found


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    assert complaint(tmp_path, b'name = "\xff\xfe"\n') == "is not UTF-8 text; a TOML file is"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file") as error:
        read_toml(tmp_path / "absent.toml")
    assert str(tmp_path / "absent.toml") in str(error.value)
    with pytest.raises(ConfigError, match="is a folder, not a TOML file"):
        read_toml(tmp_path)


COLUMN = {"kind": "numeric", "name": "amount", "lower": 0, "upper": 1}


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"kind": CANARY}, "key 'data.columns.0': is of no known kind; expected one of 'numeric', 'categorical'"),
        ({"kind": None}, "key 'data.columns.0': is of no known kind; expected one of 'numeric', 'categorical'"),
        ({"lower": CANARY}, "key 'data.columns.0.lower': Input should be a valid number"),
        ({"lwoer": 0}, "unknown key 'data.columns.0.lwoer'; did you mean 'lower'?"),
        ({"lower": 2}, "key 'data.columns.0': column 'amount': lower must be below upper"),
    ],
)
def test_a_column_is_named_as_the_file_has_it(column: dict[str, object], said: str) -> None:
    """Pydantic's own place of it, `columns.0.numeric.lower`, is a key that no file has."""
    data = {"label": {"name": "default"}, "institution": "bank", "columns": [{**COLUMN, **column}]}
    with pytest.raises(ConfigError) as error:
        validate({"name": "x", "data": data, "mechanism": {"noise_multiplier": 1.0}}, Plan, where="plan")
    assert str(error.value).startswith(f"plan: {said}")
    assert CANARY not in str(error.value)


@pytest.mark.parametrize("key", ["kind", "name", "upper"])
def test_a_column_that_lacks_a_key(key: str) -> None:
    column = {name: value for name, value in COLUMN.items() if name != key}
    data = {"label": {"name": "default"}, "institution": "bank", "columns": [COLUMN, column]}
    with pytest.raises(ConfigError) as error:
        validate({"name": "x", "data": data, "mechanism": {"noise_multiplier": 1.0}}, Plan, where="plan")
    assert str(error.value) == f"plan: key 'data.columns.1.{key}' is missing"


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_what_is_no_table_at_all(values: object) -> None:
    with pytest.raises(ConfigError, match=r"^here: key 'the file': "):
        validate(values, Outer, where="here")


def test_a_value_does_not_change() -> None:
    found = Outer(name="x", rate=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        found.name = "y"

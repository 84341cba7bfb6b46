"""From TOML to frozen models: unknown keys are refused, and every message names the file, the key and the way out."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class Frozen(BaseModel):
    """A value: immutable, no unknown keys, and no error of validation repeats what was given."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML; the message names the file and the line.

    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{path}: there is no such file"
    except IsADirectoryError:
        message = f"{path}: is a folder, not a TOML file"
    except PermissionError:
        message = f"{path}: may not be read by this user"
    except UnicodeDecodeError:
        message = f"{path}: is not UTF-8 text; a TOML file is"
    except tomllib.TOMLDecodeError as error:
        message = f"{path}: is not valid TOML: {error}"
    raise ConfigError(message) from None


def load_toml(path: Path, model: type[Model]) -> Model:
    """Read and validate a TOML file.

    Raises:
        ConfigError: with one line that names the file and the first offending key.

    """
    return validate(read_toml(path), model, where=str(path))


def validate(values: object, model: type[Model], *, where: str) -> Model:
    """Build `model` from parsed values; `where` opens the message of the error.

    Raises:
        ConfigError: naming the first offending key and what it must be; the value itself is not repeated.

    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, model, values)}") from None


def toml_text(text: str) -> str:
    """Write a text as TOML does, in quotes, whatever characters it holds."""
    # JSON's escapes are TOML's, but for those of characters beyond 16 bits, which TOML wants as they are.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def explain(error: ValidationError, model: type[BaseModel], values: object) -> str:
    """One line on the first problem of a validation error, and how many more there are."""
    problems = _innermost(error.errors(include_url=False, include_input=False))
    # An unknown key is most often a typing error that also makes another key "missing": show it first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    kind, place = first["type"], first["loc"]
    if kind == "union_tag_not_found":
        kind, place = "missing", (*place, first["ctx"]["discriminator"].strip("'"))
    key = _key(place, values, missing=kind == "missing")
    if kind == "extra_forbidden":
        text = f"unknown key '{key}'{_suggest(place, model)}"
    elif kind == "missing":
        text = f"key '{key}' is missing"
    elif kind == "union_tag_invalid":
        # Pydantic's own message repeats the value.
        text = f"key '{key}': is of no known kind; expected one of {first['ctx']['expected_tags']}"
    else:
        text = f"key '{key}': {first['msg'].removeprefix('Value error, ')}"
    more = len(problems) - 1
    return f"{text} (and {more} more problem{'s' if more > 1 else ''})" if more else text


def _innermost(problems: list[Any]) -> list[Any]:
    # Pydantic says of a list with a bad item that it is too short as well; that is no news.
    places = [problem["loc"] for problem in problems]
    return [
        problem
        for problem, place in zip(problems, places, strict=True)
        if not any(len(place) < len(other) and other[: len(place)] == place for other in places)
    ]


def _key(place: tuple[int | str, ...], values: Any, *, missing: bool) -> str:  # noqa: ANN401 - whatever a file holds
    parts = []
    for index, part in enumerate(place):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            # No key of the file, but the kind of column that Pydantic took an item for; or the one that is missing.
            if not (missing and index == len(place) - 1):
                continue
        parts.append(str(part))
    return ".".join(parts) or "the file"


def _suggest(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known: set[str] = set()
    pending: list[type[BaseModel]] = [model]
    seen: set[type[BaseModel]] = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        known.update(current.model_fields)
        for field in current.model_fields.values():
            pending.extend(_models_in(field.annotation))
    close = difflib.get_close_matches(str(location[-1]), sorted(known), n=1)
    if not close:
        return ""
    return "; it belongs in another section" if close[0] == location[-1] else f"; did you mean '{close[0]}'?"


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type expression of any kind
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for part in getattr(annotation, "__args__", ()):
        found.extend(_models_in(part))
    return found

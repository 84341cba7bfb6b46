"""Logs: one JSON line a record, whoever wrote it, without a row's value and without a secret.

What keeps them so, in the order in which a record meets it:

* A line holds scalars: text, numbers, times, paths. Anything else that a call hands over (a table, an array, a list, a
  dict, an object) is named by its type, so that no row and no order can be printed by way of an argument.
* An exception is its class, and where it was raised: `file:line in function`. Its text is left out, for that is where
  libraries quote what they choked on; only a MetariskError's is kept, which is safe by its contract. Where a call has
  put the text of an exception, that it names or that is being handled, into its message already, it is taken out again.
* Secrets are masked and what is long is cut, as `redaction` says; JSON escapes what could forge a line.

This guards against accidents. It cannot know a number that a call hands over by itself for a row's.
"""

import errno
import json
import logging
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, MutableMapping
from datetime import UTC, date, datetime, time, timedelta
from enum import Enum
from numbers import Integral, Real
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final, TextIO
from uuid import UUID

import structlog

from .errors import MetariskError
from .redaction import MASK, clean, is_secret

Scalar = str | int | float | bool | None

_MOST_FRAMES, _MOST_CAUSES, _MOST_KEYS = 30, 8, 50
_TELLING, _PIECE = 3, 12
"""An exception's argument of so many characters is looked for in a message; and so much of its text is no accident."""
_CHATTY: Final = ("httpcore", "httpx")  # One line a request, and a node asks every few seconds.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message", "asctime", "taskName", "color_message", "_logger", "_name",
}  # fmt: skip


def set_up(process: str, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Turn every record of this process into a JSON line on `stream`, by default standard error.

    All handlers that loggers have so far are replaced, Flower's and uvicorn's among them: call it after importing
    those, and start uvicorn with `log_config=None`. What would print an uncaught exception logs it instead. Calling it
    again replaces what the first call did. structlog's own loggers end in the same place.

    Args:
        process: what this process is, such as "hub" or "worker"; stands in every line.
        stream: where the lines go.
        level: records below it are left out, whatever a logger's own level.

    """
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setLevel(level)
    handler.setFormatter(_Formatter(process))
    root = logging.getLogger()
    for logger in (root, *list(root.manager.loggerDict.values())):
        if isinstance(logger, logging.Logger):
            for old in tuple(logger.handlers):
                logger.removeHandler(old)
            logger.propagate = True
    root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines; where that fails there is nowhere to say so, and the standard way would print the arguments."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing: a full disk or a closed stream must not stop the work that was logged."""


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Renders a record as one JSON line, and never raises."""

    def __init__(self, process: str) -> None:
        self._process = process
        super().__init__(processors=[self._line, structlog.processors.JSONRenderer(default=_type_name)])

    def format(self, record: logging.LogRecord) -> str:
        """Render a record, or where that fails, that there was one."""
        try:
            return super().format(self._safe(record))
        except Exception as error:  # noqa: BLE001 - a log call never stops the work
            event = f"a record could not be rendered ({type(error).__name__})"
            return json.dumps({**self._head(record), "event": event})

    def _safe(self, record: logging.LogRecord) -> logging.LogRecord:
        """Copy a record of the standard library, its message rendered; structlog's have a dict for a message."""
        copy = logging.makeLogRecord(vars(record))
        if not hasattr(record, "_logger"):
            copy.msg, copy.args = _message(record), ()
        return copy

    def _head(self, record: logging.LogRecord) -> dict[str, Any]:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return {
            "time": moment.replace("+00:00", "Z"), "level": record.levelname.lower(), "logger": record.name,
            "process": self._process,
        }  # fmt: skip

    def _line(self, _: object, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Build the line: what logging knows, what the call has given, and the exception."""
        record: logging.LogRecord = fields.pop("_record")
        fields.pop("_from_structlog")
        error = _exception(fields.pop("exc_info", None))
        given = {key: value for key, value in vars(record).items() if key not in _STANDARD} | dict(fields)
        event = given.pop("event", "")
        given.pop("stack_info", None)
        raised = _raised(error, *given.values())
        line = {**self._head(record), "event": event if isinstance(event, str) else _scalar(event, raised)}
        line["event"] = clean(str(line["event"]))
        for key, value in list(given.items())[:_MOST_KEYS]:
            name = clean(str(key))[:100]
            line[f"{name}_" if name in line or name == "exception" else name] = _field(name, value, raised)
        if error is not None:
            line["exception"] = _described(error)
        return line


def _message(record: logging.LogRecord) -> str:
    """Render a record's message without the text of any exception that it could be about."""
    arguments = record.args or ()
    values = tuple(arguments.values()) if isinstance(arguments, dict) else tuple(arguments)
    raised = _raised(_exception(record.exc_info), record.msg, *values)
    template = _without(record.msg, raised, pieces=False) if isinstance(record.msg, str) else _scalar(record.msg, ())
    if not values:
        return str(template)
    try:
        if isinstance(arguments, dict):
            return str(template) % {key: _scalar(value, raised) for key, value in arguments.items()}
        return str(template) % tuple(_scalar(value, raised) for value in values)
    except (TypeError, ValueError, KeyError):
        return f"{template} [its arguments are left out: they do not fit]"


def _scalar(value: object, raised: tuple[BaseException, ...]) -> Scalar:
    """Give a value that holds nothing but itself: a scalar as it is, anything else by its type."""
    scalar: Scalar = _type_name(value)
    match value:
        case None | bool():
            scalar = value
        case Enum():
            scalar = value.name
        case str():
            scalar = _without(str(value), raised, pieces=True)
        case Integral():
            scalar = int(value)
        case Real():
            scalar = float(value) if math.isfinite(value) else str(float(value))
        case PurePath() | UUID() | date() | time() | timedelta():
            scalar = str(value)
        case BaseException():
            scalar = _summary(value)
        case type():
            scalar = f"{value.__module__}.{value.__qualname__}".removeprefix("builtins.")
        case list() | tuple() | set() | frozenset() | dict() | bytes() | bytearray():
            scalar = f"<{type(value).__name__} of {len(value)}>"
    return scalar


def _field(key: str, value: object, raised: tuple[BaseException, ...]) -> Scalar:
    """Give a structured field's value, masked if its key says that it is a secret."""
    scalar = _scalar(value, raised)
    if scalar is None or isinstance(scalar, bool):
        return scalar
    if is_secret(key, scalar):
        return MASK
    return clean(scalar) if isinstance(scalar, str) else scalar


def _type_name(value: object) -> str:
    kind = type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"


def _summary(error: BaseException) -> str:
    """Name an exception in a message: its class, the system's error constant, or a MetariskError's own text."""
    if isinstance(error, MetariskError):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    constant = errno.errorcode.get(number) if isinstance(number, int) else None
    return f"{type(error).__name__}({constant})" if constant else type(error).__name__


def _described(error: BaseException, depth: int = 0) -> dict[str, Any]:
    """Describe an exception by its class and frames, the one that caused it, and the members of a group."""
    kind = type(error)
    description: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")}
    if isinstance(error, MetariskError):
        description["text"] = clean(str(error))
    description["frames"] = _frames(error.__traceback__)
    if depth < _MOST_CAUSES:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is not None:
            description["cause"] = _described(cause, depth + 1)
        if isinstance(error, BaseExceptionGroup):
            description["group"] = [_described(member, depth + 1) for member in error.exceptions[:_MOST_CAUSES]]
    return description


def _frames(trace: TracebackType | None) -> list[str]:
    """List where an exception came through, innermost last; without the lines of code, which could hold a constant."""
    frames = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(trace)]
    return [f"{'/'.join(PurePath(file).parts[-2:])}:{line} in {name}" for file, line, name in frames[-_MOST_FRAMES:]]


def _exception(given: object) -> BaseException | None:
    """Find the exception that `exc_info` means, in any of its forms."""
    if isinstance(given, BaseException):
        return given
    if isinstance(given, tuple):
        return next((part for part in given if isinstance(part, BaseException)), None)
    return sys.exception() if given else None


def _raised(*given: object) -> tuple[BaseException, ...]:
    """List the exceptions that a message could quote: those given, the one being handled, and what caused them.

    Not what a MetariskError came from: its text may quote that, by its contract.
    """
    found: dict[int, BaseException] = {}
    pending = [error for error in (*given, sys.exception()) if isinstance(error, BaseException)]
    while pending and len(found) < _MOST_CAUSES:
        error = pending.pop()
        if id(error) in found or isinstance(error, MetariskError):
            continue
        found[id(error)] = error
        pending.extend(part for part in (error.__cause__, error.__context__) if part is not None)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
    return tuple(found.values())


def _quotable(error: BaseException) -> Iterator[str]:
    """Yield the texts by which an exception could be quoted, longest first."""
    try:
        whole, shown = str(error), repr(error)
    except Exception:  # noqa: BLE001 - an exception that cannot show itself cannot be quoted either
        return
    parts = [] if isinstance(error, OSError) else [part for part in error.args if isinstance(part, str)]
    lines = [line.strip() for text in (whole, *parts) for line in text.splitlines()]
    long = {text for text in (*parts, *lines) if len(text) >= _TELLING}
    yield from sorted(filter(None, {whole.strip(), shown, *long}), key=len, reverse=True)


def _without(text: str, raised: tuple[BaseException, ...], *, pieces: bool) -> str:
    """Take out of a text what it quotes of the exceptions; with `pieces`, all of a text that is a part of a quote."""
    for error in raised:
        name = f"[{type(error).__name__}]"
        for quote in _quotable(error):
            if pieces and len(text) >= _PIECE and text in quote and not _is_of_the_system(error, text):
                return name
            if quote not in text:
                continue
            start, end = r"(?<!\w)" if quote[0].isalnum() else "", r"(?!\w)" if quote[-1].isalnum() else ""
            text = re.sub(start + re.escape(quote) + end, name, text)
    return text


def _is_of_the_system(error: BaseException, text: str) -> bool:
    return isinstance(error, OSError) and isinstance(error.errno, int) and text == os.strerror(error.errno)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("metarisk").critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    if not issubclass(caught.exc_type, SystemExit):
        logging.getLogger("metarisk").critical("uncaught exception in a thread", exc_info=caught.exc_value)


def _unraisable(caught: "sys.UnraisableHookArgs") -> None:
    logging.getLogger("metarisk").error("an exception could not be raised", exc_info=caught.exc_value)

"""The logs: one JSON line a record, and in none of them a row's value or a secret, however a call goes about it."""

import asyncio
import functools
import gc
import io
import json
import logging
import re
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import flwr.app  # noqa: F401 - Flower's logger is there, with its own handler, before anything is set up
import numpy as np
import polars as pl
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from metarisk_common import logs
from metarisk_common.errors import DataError, MetariskError
from metarisk_common.redaction import MASK

ROW = "Ms Vantongeren 40211.57"
ROWS = pl.DataFrame({"name": [ROW], "income": [40211.57]})

log = logging.getLogger("metarisk.client")


class Lines(io.StringIO):
    """What was logged."""

    def read_all(self) -> list[dict[str, Any]]:
        text = self.getvalue()
        assert text == "" or text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def only(self) -> dict[str, Any]:
        (line,) = self.read_all()
        return line


@pytest.fixture
def untouched() -> Iterator[None]:
    """Logging as it was, once the test is over."""
    root = logging.getLogger()
    loggers = [root, *(item for item in root.manager.loggerDict.values() if isinstance(item, logging.Logger))]
    before = {logger: (list(logger.handlers), logger.level, logger.propagate) for logger in loggers}
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    for logger, (handlers, level, propagate) in before.items():
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    structlog.reset_defaults()


@pytest.fixture
def lines(untouched: None) -> Lines:
    stream = Lines()
    logs.set_up("worker", stream=stream)
    return stream


# The line.


def test_a_record_is_one_json_line(lines: Lines) -> None:
    log.info("round %d of %d", 3, 12, extra={"run": "sba-001", "seconds": 0.25, "folder": Path("bank")})
    line = lines.only()
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info", "logger": "metarisk.client", "process": "worker", "event": "round 3 of 12",
        "run": "sba-001", "seconds": 0.25, "folder": "bank",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["flwr", "uvicorn.error", "uvicorn.access", "asyncio", "metarisk.server"])
def test_whoever_logs_ends_in_the_same_place_once(untouched: None, name: str) -> None:
    own, stream = io.StringIO(), Lines()
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler(own))
    logger.propagate = False
    logger.setLevel(logging.DEBUG)  # as Flower's is
    logs.set_up("hub", stream=io.StringIO())
    logs.set_up("hub", stream=stream)
    logger.warning("hello")
    logger.debug("too much")
    assert [line["event"] for line in stream.read_all()] == ["hello"]
    assert own.getvalue() == ""


def test_structlog_warnings_and_a_level_of_ones_own(untouched: None) -> None:
    stream = Lines()
    logs.set_up("hub", stream=stream, level=logging.WARNING)
    structlog.get_logger("metarisk.x").info("left out")
    structlog.get_logger("metarisk.x").warning("said", round=3, rows=ROWS, password="hunter2")  # noqa: S106 - no secret
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    first, second = stream.read_all()
    assert (first["event"], first["round"], first["password"]) == ("said", 3, MASK)
    assert first["rows"] == "<polars.dataframe.frame.DataFrame>"
    assert "careful" in second["event"]


@given(st.text(max_size=60), st.text(min_size=1, max_size=20))
def test_no_text_forges_a_line(text: str, key: str) -> None:
    formatter = logs._Formatter("worker")
    record = logging.makeLogRecord({"name": "x", "msg": text, "levelname": "INFO", f"{key} ": text})
    line = formatter.format(record)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["process"] == "worker"


def test_an_extra_takes_no_key_that_is_not_its_own(lines: Lines) -> None:
    log.info("x", extra={"level": "critical", "logger": "y", "time": "never", "event": "forged", "exception": "none"})
    line = lines.only()
    assert (line["level"], line["logger"], line["event"]) == ("info", "metarisk.client", "x")
    assert (line["level_"], line["exception_"]) == ("critical", "none")


class Hostile:
    def __repr__(self) -> str:
        raise ValueError(ROW)


@pytest.mark.parametrize(
    "call",
    [
        lambda: log.info("%d of %d", ROW, 3),
        lambda: log.info("%d of %d", 3),  # noqa: PLE1206
        lambda: log.info("%s", ROWS.row(0), ROW),  # noqa: PLE1205
        lambda: log.info("%(missing)s", {"row": ROW}),
        lambda: log.info("%r %s", Hostile(), Hostile()),
        lambda: log.info(Hostile()),
        lambda: log.info("100% of %s", ROW),  # noqa: PLE1206
        lambda: log.info("x", exc_info=True),  # noqa: LOG014
        lambda: log.info("x", exc_info=(None, None, None)),
        lambda: log.info("x", stack_info=True),
    ],
)
def test_a_bad_call_raises_nothing_and_tells_nothing(
    lines: Lines, call: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("worker", stream=lines)  # again, for pytest has handlers of its own by now, which would raise
    call()
    assert ROW not in lines.getvalue()
    assert "could not be rendered" not in lines.only()["event"]
    assert capfd.readouterr().err == ""


def test_a_line_or_stream_that_fails_stops_nobody(lines: Lines, capfd: pytest.CaptureFixture[str]) -> None:
    log.info("x", extra={"n": 10**5000})
    assert lines.only()["event"] == "a record could not be rendered (ValueError)"
    lines.close()
    log.error("row %s", ROW)
    assert capfd.readouterr().err == ""


def test_numbers_that_json_lacks_are_text(lines: Lines) -> None:
    log.info("x", extra={"a": float("nan"), "b": float("-inf"), "c": np.float32(0.5), "d": np.int64(3), "e": None})
    line = lines.only()
    assert [line[key] for key in "abcde"] == ["nan", "-inf", 0.5, 3, None]


# Exceptions: a row's value stands in none.


def cast() -> None:
    pl.Series("name", [ROW]).cast(pl.Int64)


def chained() -> None:
    try:
        cast()
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"could not read {error}") from error


def in_context() -> None:
    try:
        cast()
    except pl.exceptions.PolarsError:
        raise RuntimeError("another") from None


def grouped() -> None:
    raise ExceptionGroup("several", [ValueError(ROW), KeyError(ROW)])


def noted() -> None:
    error = TypeError("bad")
    error.add_note(ROW)
    raise error


def told() -> None:
    try:
        cast()
    except pl.exceptions.PolarsError as error:
        raise DataError("column 'name' does not fit") from error


def looked_up() -> None:
    incomes: dict[str, float] = {}
    del incomes[ROW]


def converted() -> None:
    float(ROW)


RAISERS = [cast, chained, in_context, grouped, noted, told, looked_up, converted]
CALLS: dict[str, Callable[[Exception], None]] = {
    "exception": lambda _: log.exception("it failed"),  # noqa: LOG004 - called in one
    "%s": lambda error: log.error("it failed: %s", error),
    "%r": lambda error: log.error("it failed: %r", error),
    "message": log.error,
    "text": lambda error: log.error("it failed: %s", str(error)),
    "f-string": lambda error: log.error(f"it failed: {error}"),  # noqa: G004 - as other libraries do
    "repr in f-string": lambda error: log.error(f"it failed: {error!r}"),  # noqa: G004
    "first line": lambda error: log.error("it failed: %s", str(error).partition("\n")[0]),
    "piece": lambda error: log.error("it failed: %s", str(error)[-30:-1]),
    "args": lambda error: log.error("it failed: %s %s", error.args, error.args[0]),
    "traceback": lambda _: log.error(traceback.format_exc()),
    "extra": lambda error: log.error("it failed", extra={"error": error, "text": str(error), "args_": error.args}),
    "exc_info": lambda error: log.error("it failed", exc_info=error),
    "dict": lambda error: log.error({"query": "insert", "data": ROWS.rows(), "exception": error}),
    "mapping": lambda error: log.error("%(error)s of %(row)s", {"error": error, "row": ROWS.row(0)}),
    "structlog": lambda error: structlog.get_logger("x").exception(error, error=error, row=ROWS.row(0)),
}


@pytest.mark.parametrize("raiser", RAISERS)
@pytest.mark.parametrize("call", CALLS)
def test_no_exception_tells_a_rows_value(lines: Lines, raiser: Callable[[], None], call: str) -> None:
    try:
        raiser()
    except Exception as error:  # noqa: BLE001 - of every kind
        CALLS[call](error)
    written = lines.getvalue()
    assert len(lines.read_all()) == 1
    assert not [part for part in ("Vantongeren", "40211") if part in written]


@pytest.mark.parametrize(
    "value",
    [ROWS, ROWS["name"], ROWS.row(0), ROWS.rows(), ROWS.to_dicts(), {ROW}, np.array([ROW]), ROW.encode(), iter([ROW]),
     functools.partial(print, ROW)],
)  # fmt: skip
def test_what_holds_more_than_itself_is_named_by_its_type(lines: Lines, value: object) -> None:
    log.error("one %s, two %r", value, value, extra={"three": value})
    log.error(value)
    assert not [part for part in ("Vantongeren", "40211") if part in lines.getvalue()]
    assert type(value).__name__ in lines.getvalue()


def test_an_exception_is_its_class_and_where_it_was_raised(lines: Lines) -> None:
    try:
        chained()
    except ValueError:
        log.exception("it failed")
    described = lines.only()["exception"]
    assert (described["class"], described.get("text")) == ("ValueError", None)
    assert re.fullmatch(r"common/test_logs\.py:\d+ in chained", described["frames"][-1])
    assert described["cause"]["class"] == "polars.exceptions.InvalidOperationError"


def test_the_text_of_our_own_errors_is_kept(lines: Lines) -> None:
    try:
        told()
    except MetariskError as error:
        log.exception("refused: %s", error)  # noqa: TRY401 - as a careless call does
    line = lines.only()
    assert line["event"] == "refused: column 'name' does not fit"
    assert line["exception"]["text"] == "column 'name' does not fit"
    assert set(line["exception"]["cause"]) == {"class", "frames"}


def test_an_error_of_our_own_may_quote_what_it_came_from(lines: Lines) -> None:
    try:
        try:
            json.loads("{")
        except ValueError as error:
            raise MetariskError(f"plan.json: {error}") from error
    except MetariskError as error:
        log.error("%s; %s", error, str(error))  # noqa: TRY400 - the text is what is tested
    assert lines.only()["event"].count("Expecting property name") == 2


def test_what_the_system_says_is_kept(lines: Lines, tmp_path: Path) -> None:
    try:
        (tmp_path / "absent").open()
    except OSError as error:
        log.warning("cannot be read: %s, %s", error, error.strerror)
    assert lines.only()["event"] == "cannot be read: FileNotFoundError(ENOENT), No such file or directory"


def test_an_exception_that_nobody_fetched_is_told_by_asyncio_without_its_text(lines: Lines) -> None:
    async def fail() -> None:
        raise ValueError(ROW)

    async def forget() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.wait([task])

    asyncio.run(forget())
    gc.collect()
    assert lines.only()["exception"]["class"] == "ValueError"
    assert "Vantongeren" not in lines.getvalue()


def test_uncaught_exceptions_are_lines_too() -> None:
    program = (
        "import threading, sys\n"
        "from metarisk_common import logs\n"
        "logs.set_up('worker')\n"
        f"def fail(): float({ROW!r})\n"
        "class Odd:\n    def __del__(self): fail()\n"
        "Odd()\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "fail()\n"
    )
    root = Path(logs.__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [line["exception"]["class"] for line in told] == ["ValueError"] * 3
    assert "Vantongeren" not in ended.stderr


def test_secrets_are_masked_wherever_they_stand_in_a_line(lines: Lines) -> None:
    private = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\n-----END PRIVATE KEY-----"
    extra = {"note": f"token={'Zm9v' * 8}", "signing_key": "Zm9v" * 8, "password": "hunter2"}
    log.info("sent %s", private, extra=extra)
    log.error("failed: %s", MetariskError(f"not a key: {private}"), exc_info=MetariskError(private))
    assert not [part for part in ("MIGH", "Zm9v", "hunter2") if part in lines.getvalue()]
    assert [line["event"] for line in lines.read_all()] == [f"sent {MASK}", f"failed: not a key: {MASK}"]

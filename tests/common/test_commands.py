"""What becomes of a mistake: one line on standard error and the exit code that the class of the error has."""

import subprocess
import sys
from importlib.metadata import version

import click
import pytest
import typer

from metarisk_common.commands import progress_bar, run_app, show_version
from metarisk_common.errors import (
    BudgetExhaustedError,
    ConfigError,
    DataError,
    IntegrityError,
    MetariskError,
    ProtocolError,
    RefusedError,
)

app = typer.Typer(pretty_exceptions_enable=False)

ERRORS = {
    "metarisk": (MetariskError, 1),
    "protocol": (ProtocolError, 1),
    "config": (ConfigError, 2),
    "data": (DataError, 2),
    "refused": (RefusedError, 3),
    "budget": (BudgetExhaustedError, 4),
    "integrity": (IntegrityError, 5),
}


@app.callback()
def common(_: bool = typer.Option(False, "--version", callback=show_version, is_eager=True)) -> None:  # noqa: FBT001, FBT003 - a flag
    pass


@app.command("fail")
def fail(kind: str) -> None:
    raise ERRORS[kind][0]("the file is wrong; write another")


@app.command("end")
def end(code: int) -> None:
    raise typer.Exit(code)


@app.command("interrupt")
def interrupt() -> None:
    raise KeyboardInterrupt


@app.command("break")
def break_down() -> None:
    raise ZeroDivisionError


@app.command("talk")
def talk(lines: int) -> None:
    for _ in range(lines):
        typer.echo("x" * 100)


@app.command("answer")
def answer() -> int:
    return 0


def code_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["metarisk-test", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("kind", ERRORS)
def test_each_error_has_its_code(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch, "fail", kind) == ERRORS[kind][1]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: the file is wrong; write another\n"


def test_every_error_of_the_tree_was_tried() -> None:
    tree, classes = [MetariskError], set()
    while tree:
        found = tree.pop()
        classes.add(found)
        tree += found.__subclasses__()
    ours = {found for found in classes if found.__module__ == MetariskError.__module__}
    assert ours == {error for error, _ in ERRORS.values()}


@pytest.mark.parametrize(
    "arguments", [("fail",), ("fail", "--colour"), ("gossip",), ("end", "three"), ("answer", "to", "everything")]
)
def test_wrong_usage(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: metarisk-test" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_command_may_choose_its_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(monkeypatch, "end", str(code)) == code


@pytest.mark.parametrize("arguments", [("answer",), ("--help",), ("fail", "--help")])
def test_done(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(monkeypatch, *arguments) == 0


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(monkeypatch, "interrupt") == 130
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_while_somebody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise click.Abort

    monkeypatch.setattr(sys.modules[__name__], "app", stop)
    assert code_of(monkeypatch) == 130


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["metarisk-test", "break"])
    with pytest.raises(ZeroDivisionError):
        run_app(app)


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"metarisk-federated {version('metarisk-federated')}\n"


PROGRAM = """
import typer
from metarisk_common.commands import run_app
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def talk() -> None:
    while True:
        typer.echo("x" * 100)
run_app(app)
"""


def test_a_reader_who_leaves_is_no_error() -> None:
    """As in `metarisk-server status ... | head`: no traceback, and the program ends."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"x" * 100 + b"\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("quiet", [True, False])
def test_there_is_no_bar_where_there_is_no_terminal(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: FBT001 - a parameter
    with progress_bar("training", quiet=quiet) as advance:
        advance(1, 2)
        advance(2, 2)
    assert capsys.readouterr() == ("", "")

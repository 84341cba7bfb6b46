"""What the three command lines share: what becomes of a mistake, the version, and a progress bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import MetariskError

INTERRUPTED = 130


def run_app(app: typer.Typer) -> None:
    """Run a Typer app and end the process with the right exit code.

    0 done, 1 failed, 2 usage or configuration, 3 refused by policy, 4 budget exhausted, 5 integrity broken, and
    130 after Ctrl-C. Only a defect of the program itself may show a traceback.
    """
    try:
        code = app(standalone_mode=False)
    except MetariskError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        # Typer makes this code of a Ctrl-C inside a command, and says nothing.
        _say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def show_version(value: bool) -> None:  # noqa: FBT001 - Typer calls it with the flag's value
    """Print the distribution's version and end, if the flag was given."""
    if value:
        typer.echo(f"metarisk-federated {version('metarisk-federated')}")
        raise typer.Exit


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error while the block runs, on a terminal only; call the yielded `(done, total)`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _say(message: str) -> None:
    typer.echo(f"error: {message}", err=True)

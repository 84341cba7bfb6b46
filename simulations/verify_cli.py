"""`metarisk-simulate verify`: the experiment with published figures, run again; what disagrees is wrong.

A training is a draw, too: with other tasks and first weights the error after five steps is from 0.11 to 0.25, far
beyond what 600 test tasks leave open. So several are made, and what is held to the known figure is their mean, with an
interval (Student's t) over trainings.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from metarisk_common.commands import progress_bar
from metarisk_common.intervals import estimate

if TYPE_CHECKING:
    from metarisk_common.params import Params

    from .sinusoids import Protocol

QUICK_MAML = 10_000


@dataclass(frozen=True)
class Known:
    """A figure that is known beforehand: an interval that the measured one must meet."""

    what: str
    steps: int
    low: float
    high: float
    said: str
    below: bool = False
    """Whether the measured interval must lie below `high` instead."""
    never_below: float = 0.0
    """What the measured interval of no training may reach down to, whatever the mean over trainings is."""


@dataclass(frozen=True)
class Figure:
    """A measured error beside the known one: mean, half its 95% interval, and whether the two intervals meet.

    `trainings`: the error of each; with one alone the interval is over test tasks.
    """

    what: str
    steps: int
    measured: float
    half: float
    known: str
    passed: bool
    trainings: tuple[float, ...] = ()


REPTILE_KNOWN = (
    Known("Reptile", 0, 4.08, 4.68, "4.38"),
    Known("Reptile", 1, 0.65, 0.79, "0.72 +- 0.07"),
    Known("Reptile", 5, 0.121, 0.151, "0.136 +- 0.015"),
    # Over three seeds; each of them has an interval of its own, as wide as that after five steps.
    Known("Reptile", 32, 0.14 - 0.015, 0.20 + 0.015, "0.14 to 0.20, +- 0.015"),
)
# What has learned to adapt is far below 1 by then.
CONTROL_KNOWN = (Known("joint training (must fail)", 32, 4.3, 4.3, "4.3", never_below=3.0),)
MAML_KNOWN = (
    Known("MAML", 0, 2.89, 3.33, "3.11"),
    Known("MAML", 1, 0.342, 0.412, "0.377 +- 0.035"),
    Known("MAML", 10, 0.132, 0.192, "0.162 +- 0.030"),
)
# What the same network reaches when it is pretrained on all tasks, instead of learned to adapt, is known, too.
MAML_QUICK_KNOWN = (
    MAML_KNOWN[0],
    Known("MAML, 10,000 iterations", 10, 0.0, 1.7, "pretrained: 1.7 to 1.8", below=True),
)


def verify(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks and first weights of the first training.")] = 1,
    trainings: Annotated[int, typer.Option(min=1, help="How many, each with the next seed.")] = 5,
    thorough: Annotated[bool, typer.Option("--thorough", help="All 70,000 iterations of MAML: minutes.")] = False,  # noqa: FBT002 - a flag
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Learn sinusoids and hold the errors to the published ones; exit code 1 where one disagrees.

    Two trainings have an interval that is too wide to fail: make one, for a look, or at least five.
    """
    iterations = None if thorough else QUICK_MAML
    figures = pooled(
        [measure(seed=seed + number, maml_iterations=iterations, quiet=as_json) for number in range(trainings)]
    )
    if as_json:
        typer.echo(
            json.dumps({"seed": seed, "trainings": trainings, "figures": [asdict(figure) for figure in figures]})
        )
    else:
        Console().print(table(figures))
    if not all(figure.passed for figure in figures):
        raise typer.Exit(1)


def measure(*, seed: int, maml_iterations: int | None = None, quiet: bool = False) -> list[Figure]:
    """Learn the sinusoids by Reptile, jointly, and by MAML; `maml_iterations` of None are all that were published."""
    from . import sinusoids  # noqa: PLC0415 - Torch, for which --help need not wait

    figures: list[Figure] = []
    with progress_bar("Reptile", quiet=quiet) as advance:
        learned = sinusoids.train_reptile(seed=seed, told=advance)
    figures += _judged_all(REPTILE_KNOWN, sinusoids.REPTILE, learned, seed)
    with progress_bar("joint training", quiet=quiet) as advance:
        joint = sinusoids.train_jointly(seed=seed, told=advance)
    figures += _judged_all(CONTROL_KNOWN, sinusoids.REPTILE, joint, seed)
    with progress_bar("MAML", quiet=quiet) as advance:
        iterations = sinusoids.MAML_ITERATIONS if maml_iterations is None else maml_iterations
        maml = sinusoids.train_maml(seed=seed, iterations=iterations, told=advance)
    known = MAML_KNOWN if maml_iterations is None else MAML_QUICK_KNOWN
    return figures + _judged_all(known, sinusoids.MAML, maml, seed)


def pooled(trainings: Sequence[Sequence[Figure]]) -> list[Figure]:
    """Judge the mean over trainings by an interval over them; one training stands as it is.

    No interval is narrower than a training's own over its tasks: the known figure is of as few. The joint control must
    stay untrained in every training, and MAML be better than pretraining in every one.
    """
    if len(trainings) == 1:
        return list(trainings[0])
    figures = []
    for known, each in zip(_all_known(trainings[0]), zip(*trainings, strict=True), strict=True):
        values = np.array([figure.measured for figure in each])
        found = estimate(values)
        low = found["ci95"][0]
        assert low is not None  # noqa: S101 - two trainings at least
        half = max(found["mean"] - low, float(np.mean([one.half for one in each])))
        figure = judged(known, found["mean"], half)
        every = all(one.measured - one.half > known.never_below and (one.passed or not known.below) for one in each)
        figures.append(replace(figure, passed=figure.passed and every, trainings=tuple(map(float, values))))
    return figures


def _all_known(figures: Sequence[Figure]) -> list[Known]:
    of = {
        (known.what, known.steps): known for known in (*REPTILE_KNOWN, *CONTROL_KNOWN, *MAML_KNOWN, *MAML_QUICK_KNOWN)
    }
    return [of[figure.what, figure.steps] for figure in figures]


def judged(known: Known, measured: float, half: float) -> Figure:
    """Hold one measured error to the known one: the two intervals must meet, so that too good a figure fails, too."""
    if known.below:
        passed = measured + half < known.high
    else:
        passed = measured - half <= known.high and measured + half >= known.low
    return Figure(known.what, known.steps, measured, half, known.said, passed)


def table(figures: Sequence[Figure]) -> Table:
    """Lay the figures out beside the known ones."""
    over = "trainings" if figures[0].trainings else "tasks"
    shown = Table(title=f"Sinusoids: error on 600 new tasks after steps on 10 points, 95% interval over {over}")
    for heading in ("learned by", "steps", "measured", "known", "", *(["each"] if figures[0].trainings else [])):
        narrow = heading in ("steps", "measured")
        shown.add_column(heading, justify="right" if narrow else "left", no_wrap=narrow)
    for figure in figures:
        shown.add_row(
            figure.what,
            str(figure.steps),
            f"{figure.measured:.3f} +- {figure.half:.3f}",
            figure.known,
            "PASS" if figure.passed else "FAIL",
            *([" ".join(f"{value:.2f}" for value in figure.trainings)] if figure.trainings else []),
        )
    return shown


def _judged_all(known: Sequence[Known], protocol: "Protocol", params: "Params", seed: int) -> list[Figure]:
    from .sinusoids import errors  # noqa: PLC0415 - as above

    found = errors(params, protocol, [item.steps for item in known], seed=seed)
    return [judged(item, found[item.steps].mean, found[item.steps].half) for item in known]

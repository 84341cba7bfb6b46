"""`metarisk-simulate world`, `differences` and `mixed`: where tasks differ strongly, and where domains meet."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from metarisk_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .contest import Row

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Epsilon = Annotated[float, typer.Option(help="Budget of every lender; inf: no noise and no clipping.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise and of the draws of labels: NOT PRIVATE.")]


def world(
    name: Annotated[str, typer.Argument(help="sign-flip: an interaction whose sign flips between lenders.")],
    out: Annotated[Path, typer.Option(help="Folder for world.parquet and world.toml.")] = Path("world"),
    lenders: Annotated[int, typer.Option(min=20, help="Lenders, of whom 16 take no part.")] = 40,
    records: Annotated[int, typer.Option(min=50, help="Records of each lender.")] = 2000,
    shared: Annotated[float, typer.Option(min=0, help="Strength of the effects that all lenders share.")] = 0.5,
    own: Annotated[float, typer.Option(min=0, help="Strength of the interaction whose sign flips.")] = 2.5,
    flips: Annotated[str, typer.Option(help="Whose sign it is: institution, or segment of one.")] = "institution",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world.")] = 3,
) -> None:
    """Write a SYNTHETIC credit world as a table and the scenario that `run` and `compare` take."""
    from . import worlds  # noqa: PLC0415 - Torch, for which --help need not wait

    if name not in worlds.WORLDS:
        raise ConfigError(f"there is no world '{name}'; choose one of: {', '.join(worlds.WORLDS)}")
    if flips == "institution":
        chosen = worlds.World(lenders, records, shared, own, "institution", seed)
    elif flips == "segment":
        chosen = worlds.World(lenders, records, shared, own, "segment", seed)
    else:
        raise ConfigError(f"--flips {flips}: choose institution or segment")
    path = worlds.write(chosen, name, out)
    typer.echo(f"SYNTHETIC: {lenders} lenders of {records} records each. Next: metarisk-simulate run {path}")


def differences(
    data: Annotated[str, typer.Argument(help="sign-flip, a synthetic world; or loans, real ones, by lender x sector.")],
    epsilon: Epsilon = 3.0,
    seed: Seed = 1,
    world_seed: Annotated[int, typer.Option(min=0, help="Seed of the synthetic world.")] = 3,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Meta-learning against joint training, each plus the same adaptation, where tasks differ strongly."""
    from . import sectors, worlds  # noqa: PLC0415 - as above

    _check_epsilon(epsilon)
    contests: dict[str, tuple[str, Callable[[], list[Row]]]] = {
        "sign-flip": (
            "SYNTHETIC world sign-flip",
            lambda: worlds.hold(worlds.World(seed=world_seed), epsilon=epsilon, seed=seed),
        ),
        "loans": ("Loans by lender x sector", lambda: sectors.hold(epsilon=epsilon, seed=seed)),
    }
    if data not in contests:
        raise ConfigError(f"there is no contest on '{data}'; choose one of: {', '.join(contests)}")
    title, hold = contests[data]
    _show({f"{title}, epsilon {epsilon:g}": hold()}, worlds.RIVAL, epsilon, as_json=as_json)


def mixed(
    model: Annotated[str, typer.Option(help="scorecard, mlp, or both.")] = "both",
    epsilon: Epsilon = 3.0,
    target_lenders: Annotated[int, typer.Option(min=1, max=40, help="Lenders of the target that take part.")] = 10,
    seed: Seed = 1,
    as_json: AsJson = False,  # noqa: FBT002 - a flag
) -> None:
    """Whether lenders to new businesses learn from lenders to existing ones, through the columns that both have."""
    from . import mixed as cross  # noqa: PLC0415 - as above

    _check_epsilon(epsilon)
    if model not in ("scorecard", "mlp", "both"):
        raise ConfigError(f"--model {model}: choose scorecard, mlp or both")
    tables = {
        f"{what}, {target_lenders} target lenders, epsilon {epsilon:g}": cross.hold(
            cross.Setup(kind, epsilon, target_lenders=target_lenders, seed=seed)
        )
        for kind, what in (("scorecard", "Additive model, common columns"), ("mlp", "Shared mlp body, ANIL"))
        if model in (kind, "both")
    }
    _show(tables, cross.RIVAL, epsilon, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: metarisk-simulate world sign-flip --out world")(world)
    app.command(epilog="Example: metarisk-simulate differences sign-flip --epsilon 3")(differences)
    app.command(epilog="Example: metarisk-simulate mixed --epsilon 3")(mixed)


def _check_epsilon(epsilon: float) -> None:
    if not epsilon > 0:
        raise ConfigError("--epsilon: must be above 0; inf switches the noise off")


def _show(tables: "Mapping[str, Sequence[Row]]", rival: str, epsilon: float, *, as_json: bool) -> None:
    from .contest import table, verdict  # noqa: PLC0415 - as above

    if as_json:
        held = {title: [asdict(row) for row in rows] for title, rows in tables.items()}
        # JSON has no infinity: without noise there is no epsilon.
        answer = {"epsilon": epsilon if math.isfinite(epsilon) else None, "not_private": True, "tables": held}
        typer.echo(json.dumps(answer, allow_nan=False))
        return
    console = Console(width=120)
    for title, rows in tables.items():
        console.print(table(title, rows, rival))
        console.print(verdict(rows, rival), markup=False, highlight=False)
    console.print("NOT PRIVATE: noise and draws come from seeds, so that the table can be repeated.", highlight=False)

"""Synthetic credit worlds with strong differences between tasks: what meta-learning is for, and how much it brings.

SYNTHETIC data, all of it drawn here from public constants; nothing in it says anything about a real borrower. The
world's default odds are `shared` times effects that all lenders have, plus `own` times an interaction whose sign is the
task's. Joint training finds the first part and averages the second to nothing; what can still be learned together is
*which* interaction matters, so that a few labels give a new lender's sign.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import numpy as np
import polars as pl

from client.dataset import Dataset, from_frame
from metarisk_common.files import write_atomically
from metarisk_common.plan import InnerLoop, OuterLoop
from metarisk_common.table import split_by_institution

from . import contest
from .scenarios import Scenario, load_scenario, split

WORLDS: Final = {"sign-flip": "sign_flip.toml"}
"""Worlds by name, and the scenario of each."""

COLUMNS: Final = ("debt_ratio", "income_rank", "inquiries", "utilisation", "history", "tenure")
PRODUCTS: Final = ("card", "instalment")
KS: Final = (0, 20, 50, 100)
VARIANCES: Final = (3.0, 30.0)
RIVAL: Final = "joint"
_INTERCEPT: Final = -0.8
_SHARED: Final = (4.0, -3.0, 2.0)


@dataclass(frozen=True)
class World:
    """A world's public constants. `flips`: whose sign it is, a lender's or that of each of its products."""

    lenders: int = 40
    records: int = 2000
    shared: float = 0.5
    own: float = 2.5
    flips: Literal["institution", "segment"] = "institution"
    seed: int = 3


def scenario_path(name: str) -> Path:
    """Return the path of a world's scenario, which stands in the package."""
    return Path(str(files("simulations"))) / WORLDS[name]


def draw(world: World) -> pl.DataFrame:
    """Draw the table of the sign-flip world.

    Log-odds of default are `-0.8 + shared (4 debt - 3 income + 2 inquiries, centred) + own s sign(utilisation - 1/2)
    sign(history - 1/2)` with s = +1 or -1, evenly and independently for each lender (or each lender's product).
    """
    random = np.random.default_rng(world.seed)
    tables = []
    for lender in range(world.lenders):
        x = random.uniform(size=(world.records, len(COLUMNS)))
        product = random.integers(len(PRODUCTS), size=world.records)
        signs = random.choice([-1.0, 1.0], size=len(PRODUCTS))
        sign = signs[product] if world.flips == "segment" else signs[0]
        centred = x - 0.5
        logit = _INTERCEPT + world.shared * (centred[:, : len(_SHARED)] @ np.array(_SHARED))
        logit += world.own * sign * np.sign(centred[:, 3]) * np.sign(centred[:, 4])
        y = random.uniform(size=world.records) < 1 / (1 + np.exp(-logit))
        tables.append(
            pl.DataFrame(
                {
                    "lender": [f"lender-{lender:03}"] * world.records,
                    "product": np.array(PRODUCTS)[product],
                    **{name: x[:, column] for column, name in enumerate(COLUMNS)},
                    "defaulted": y.astype(np.int64),
                }
            )
        )
    return pl.concat(tables)


def write(world: World, name: str, folder: Path) -> Path:
    """Write `world.parquet` and `world.toml`, a scenario for `metarisk-simulate run`; return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(world).write_parquet(folder / "world.parquet")
    text = scenario_path(name).read_text(encoding="utf-8")
    path = folder / "world.toml"
    write_atomically(path, text.replace('task = "institution"', f'task = "{world.flips}"').encode())
    return path


def trained_and_unseen(scenario: Scenario, frame: pl.DataFrame) -> tuple[list[Dataset], list[Dataset]]:
    """Cut a table into the data sets of lenders that take part and of those that do not."""
    tables = split_by_institution(frame, scenario.columns, scenario.name)
    parts = split(scenario, tuple(tables))
    seen, unseen = (
        [from_frame(tables[name], scenario.columns, name, scenario.name) for name in names]
        for names in (parts.seen, parts.unseen)
    )
    return seen, unseen


def variants(base: Scenario, *, private: bool) -> dict[str, Scenario]:
    """Return who enters the contest on the sign-flip world: joint training, ANIL, first-order MAML and Reptile.

    Steps were chosen on worlds of other seeds. With privacy there are fewer of them, for each one costs.
    """
    outer = base.server.model_dump()

    def entry(algorithm: str, steps: int, rate: float, rounds: int, **server: float | str) -> Scenario:
        inner = InnerLoop.model_validate({"algorithm": algorithm, "local_steps": steps, "learning_rate": rate})
        chosen = OuterLoop.model_validate({**outer, "rounds": rounds, **server})
        return base.model_copy(update={"training": inner, "server": chosen})

    joint = entry("fedavg", 1, 1.0, 100, learning_rate=4.0)
    if private:
        return {
            RIVAL: joint,
            "anil": entry("anil", 5, 8.0, 40, learning_rate=4.0),
            "fomaml": entry("fomaml", 3, 8.0, 60, learning_rate=3.0),
            "reptile": entry("reptile", 10, 5.0, 20, learning_rate=1.0, momentum=0.5),
        }
    return {
        RIVAL: joint,
        "anil": entry("anil", 10, 5.0, 60, learning_rate=4.0),
        "fomaml": entry("fomaml", 3, 8.0, 60, learning_rate=1.0),
        "reptile": entry("reptile", 20, 5.0, 20, learning_rate=1.0, momentum=0.5),
    }


def hold(
    world: World,
    *,
    epsilon: float,
    entries: Mapping[str, Scenario] | None = None,
    draws: int = 2,
    seed: int = 1,
    ks: tuple[int, ...] = KS,
) -> list[contest.Row]:
    """Hold the contest on the sign-flip world; `entries`, the rival among them, stand in for `variants`.

    Everything follows from the seeds: of the world, of the banks' noise and of the draws.
    """
    base = load_scenario(scenario_path("sign-flip"))
    entries = variants(base, private=math.isfinite(epsilon)) if entries is None else entries
    seen, unseen = trained_and_unseen(base, draw(world))
    learned = {}
    for name, variant in entries.items():
        plan = variant.plan(epsilon=epsilon)
        learned[name] = plan, contest.learn(plan, seen, seed=seed)
    methods = contest.entrants(learned, VARIANCES)
    return contest.judge(methods, RIVAL, contest.judging_sets(unseen), ks, draws=draws, seed=seed)

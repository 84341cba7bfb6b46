"""Loans by lender x sector: every sector of a lender a task of its own, against joint training on the same records."""

from dataclasses import replace
from typing import Final

import numpy as np

from client.dataset import Dataset, read_table
from metarisk_common.plan import InnerLoop

from . import contest
from .scenarios import Scenario, built_in, data_path, load_scenario
from .worlds import RIVAL, trained_and_unseen

SECTORS: Final = ("retail", "manufacturing", "hospitality", "other_services", "health", "construction")
KS: Final = (0, 20, 50)
VARIANCES: Final = (0.3, 3.0)


def tasks_of(dataset: Dataset, room: int) -> list[Dataset]:
    """Cut an unseen lender's records into one set for each sector that has `room` records and both outcomes."""
    found = []
    for sector in SECTORS:
        rows = np.flatnonzero(dataset.segment == sector)
        name = f"{dataset.institution} / {sector}"
        found.append(replace(dataset, institution=name, x=dataset.x[rows], y=dataset.y[rows], segment=None))
    return [each for each in found if contest.can_be_judged(each, room)]


def variants() -> dict[str, Scenario]:
    """Return joint training and, with lender x sector as tasks, Reptile and first-order MAML; all by equal steps."""
    base = load_scenario(built_in("credit"))
    columns = base.columns.model_copy(update={"segments": SECTORS})

    def entry(algorithm: str, steps: int, rate: float, rounds: int, server_rate: float, momentum: float) -> Scenario:
        inner = InnerLoop.model_validate(
            {"algorithm": algorithm, "task": "segment", "local_steps": steps, "learning_rate": rate}
        )
        server = base.server.model_copy(update={"rounds": rounds, "learning_rate": server_rate, "momentum": momentum})
        changed = {"columns": columns, "training": inner, "server": server, "metrics": None}
        return base.model_copy(update=changed)

    return {
        RIVAL: entry("fedavg", 1, 1.0, 100, 6.0, 0.9),
        "reptile": entry("reptile", 5, 6.0, 20, 4.0, 0.8),
        "fomaml": entry("fomaml", 2, 6.0, 50, 6.0, 0.9),
    }


def hold(
    *, epsilon: float, most: int = 1000, draws: int = 10, seed: int = 1, ks: tuple[int, ...] = KS
) -> list[contest.Row]:
    """Hold the contest; every sector of an unseen lender with enough records is judged as one institution.

    Sectors of one lender are no independent sample: read the intervals as those of tasks like these, of lenders like
    these. `most` bounds the records used of a training lender, its first ones.
    """
    path = built_in("credit")
    entries = variants()
    base = entries[RIVAL]
    seen, unseen = trained_and_unseen(base, read_table(data_path(base, path)))
    seen = [_first(dataset, most) for dataset in seen]
    learned = {}
    for name, variant in entries.items():
        plan = variant.plan(epsilon=epsilon)
        learned[name] = plan, contest.learn(plan, seen, seed=seed)
    judged = [task for dataset in unseen for task in tasks_of(dataset, max(ks) + 50)]
    methods = contest.entrants(learned, VARIANCES)
    return contest.judge(methods, RIVAL, contest.judging_sets(judged), ks, draws=draws, seed=seed)


def _first(dataset: Dataset, most: int) -> Dataset:
    segment = None if dataset.segment is None else dataset.segment[:most]
    return replace(dataset, x=dataset.x[:most], y=dataset.y[:most], segment=segment)

"""A comparison carried out: every cell (method, epsilon, seed, fold) is one file, so that a killed run goes on.

trained/DIGEST.safetensors   meta-parameters, by what they depend on: plan, records, lenders, seed, versions
cells/DIGEST.json            scores, by that and by how methods were adapted and judged

Training is `vector.train`, the functions of a real round without its messages, with noise from a seed: NOT PRIVATE.
A change of the program itself is not noticed where the versions stay the same: take a new folder for that.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from metarisk_common.errors import IntegrityError
from metarisk_common.evaluation import PLACE, EpisodeScore, Method, run_episodes
from metarisk_common.features import Encoder
from metarisk_common.files import write_atomically
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec, Plan

from . import baselines, vector
from .compare_data import (
    check_segments,
    declared_sizes,
    judged_sets,
    open_world,
    pooled,
    too_small,
    training_tables,
    training_tasks,
)
from .comparison import Adapting, Loaded, Part, parts_of
from .inprocess import worker_pool
from .runfolder import PACKAGES

BASELINES = "baselines"
"""Stands for the method in the key of the cell that holds what depends on neither epsilon nor seed."""

Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Key:
    """Which cell: a method at an epsilon (None: none of its own), with a seed, in a fold counted from 0."""

    method: str
    epsilon: float | None
    seed: int
    fold: int


@dataclass(frozen=True)
class Cell:
    """A cell, the file of its scores, and how the method adapts."""

    key: Key
    digest: str
    adapting: Adapting


@dataclass(frozen=True)
class Job:
    """What one worker does at once: train a plan (None: fit baselines), and judge every method that starts from it."""

    folder: Path
    loaded: Loaded
    part: Part
    plan: Plan | None
    trained: str
    seed: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Outcome:
    """Scores by cell, lenders (or segments of lenders) too small to be judged, and the plans by method and epsilon."""

    scores: Mapping[Key, Sequence[EpisodeScore]]
    left_out: tuple[str, ...]
    plans: Mapping[tuple[str, float], Plan]


def carry_out(
    loaded: Loaded, folder: Path, *, workers: int = 1, on_progress: Callable[[int, int], None] | None = None
) -> Outcome:
    """Train and judge whatever has no file yet, and return the scores of all.

    Args:
        loaded: the comparison.
        folder: where cells are kept; those that are there are not computed again.
        workers: processes; 0 and 1 do all the work in this one.
        on_progress: called with (jobs done, jobs in all), a job being one training and what starts from it.

    Raises:
        ConfigError: a method's keys, the folds or the segments do not fit.
        DataError: the table does not fit the schema, or nobody can be judged.
        IntegrityError: a file of the folder is damaged.

    """
    world = open_world(loaded.base_path)
    parts = parts_of(loaded, list(world.tables))
    for part in parts:
        check_segments(world, part)
    for name in ("cells", "trained"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs, plans = _jobs(loaded, folder, parts)
    todo = [job for job in jobs if not all(_cell_path(folder, cell).exists() for cell in job.cells)]
    done = len(jobs) - len(todo)
    if on_progress is not None:
        on_progress(done, len(jobs))
    for _ in _results(todo, workers):
        done += 1
        if on_progress is not None:
            on_progress(done, len(jobs))
    cells = [cell for job in jobs for cell in job.cells]
    small = sorted({name for part in parts for name in too_small(world, part, loaded.comparison.evaluation)})
    scores = {cell.key: _read_cell(_cell_path(folder, cell)) for cell in cells}
    return Outcome(_in_order(scores, loaded), tuple(small), plans)


def without_chance(plan: Plan) -> bool:
    """Whether every seed gives the same: no noise, no sampling, no split of a task's records."""
    mechanism = plan.mechanism
    return mechanism.noise_multiplier == 0 and mechanism.sample_rate == 1 and not plan.inner.by_episode


def work(job: Job) -> None:
    """Do a job and write its cells' files."""
    torch.set_num_threads(1)
    judging = job.loaded.comparison.evaluation
    world = open_world(job.loaded.base_path)
    sets = judged_sets(world, job.part, judging, world.scenario.columns if job.plan is None else job.plan.data)
    names = {cell: cell.key.method for cell in job.cells}
    if job.plan is None:
        methods = {job.cells[0]: _baselines(job)}
    else:
        params, prior = _trained(job, job.plan)
        spec = job.plan.model
        methods = {cell: [shared(names[cell], spec, params, cell.adapting, prior)] for cell in job.cells}
    for cell, own in methods.items():
        found = run_episodes(sets, own, judging.k, draws=judging.draws, seed=judging.seed)
        write_atomically(_cell_path(job.folder, cell), _cell_text(cell, found).encode())


def _jobs(loaded: Loaded, folder: Path, parts: Sequence[Part]) -> tuple[list[Job], dict[tuple[str, float], Plan]]:
    """List the jobs, and the plans by method and epsilon. Methods with one plan share their training."""
    comparison = loaded.comparison
    plans = {
        (name, epsilon): loaded.scenario(name, epsilon).plan()
        for name in comparison.methods
        for epsilon in comparison.epsilons_of(name)
    }
    jobs: list[Job] = []
    for fold, part in enumerate(parts):
        records = _records_digest(loaded, part)
        judged = [records, list(part.judged), comparison.evaluation.model_dump_json(exclude={"gain_k"})]
        if comparison.baselines:
            digest = _digest(BASELINES, *judged, list(comparison.baselines))
            only = Cell(Key(BASELINES, None, 0, fold), digest, Adapting())
            jobs.append(Job(folder, loaded, part, None, digest, 0, (only,)))
        together: dict[tuple[str, int], list[Cell]] = defaultdict(list)
        chosen: dict[str, Plan] = {}
        for (name, epsilon), plan in plans.items():
            for seed in comparison.seeds[:1] if without_chance(plan) else comparison.seeds:
                trained = _digest("trained", plan.hash(), seed, records)
                adapting = comparison.methods[name].adaptation
                # Of two methods that differ in nothing but their name the scores are the same, and the name is not.
                digest = _digest("cell", trained, name, adapting.model_dump_json(), *judged)
                together[trained, seed].append(Cell(Key(name, epsilon, seed, fold), digest, adapting))
                chosen[trained] = plan
        for (trained, seed), cells in together.items():
            jobs.append(Job(folder, loaded, part, chosen[trained], trained, seed, tuple(cells)))
    return jobs, plans


def _results(jobs: Sequence[Job], workers: int) -> Iterable[None]:
    if min(workers, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    with worker_pool(min(workers, len(jobs))) as pool:
        waiting = [pool.submit(work, job) for job in jobs]
        for future in as_completed(waiting):
            yield future.result()


def _trained(job: Job, plan: Plan) -> tuple[Params, Matrix | None]:
    """Return the meta-parameters and, where the plan learns one, the prior variance of each input."""
    path = job.folder / "trained" / f"{job.trained}.safetensors"
    if not path.exists():
        world, encoder = open_world(job.loaded.base_path), Encoder(plan.data)
        banks, sizes = training_tasks(world, job.part, plan), declared_sizes(world, job.part)
        learned = vector.learn(plan, banks, sizes, width=encoder.width, seed=job.seed)
        arrays = {f"params/{name}": np.ascontiguousarray(value) for name, value in learned.meta_params.items()}
        if learned.prior is not None:
            arrays["prior"] = learned.prior.variances(encoder.groups)
        write_atomically(path, save(arrays))
    try:
        arrays = load_file(path)
    except SafetensorError:
        raise IntegrityError(f"{path}: is damaged; remove it, and it is made again") from None
    params = {name.removeprefix("params/"): value for name, value in arrays.items() if name.startswith("params/")}
    return params, arrays.get("prior")


def _baselines(job: Job) -> list[Method]:
    chosen = job.loaded.comparison.baselines
    own: dict[str, Callable[[], Method]] = {
        "local-logistic": baselines.LocalLogistic,
        "local-logistic-binned": baselines.LocalLogisticBinned,
        "local-lightgbm": baselines.LocalLightGBM,
    }
    methods = [own[name]() for name in chosen if name in own]
    fitted: dict[str, Callable[[Matrix, Matrix], Method]] = {
        "pooled-logistic": baselines.pooled_logistic,
        "pooled-lightgbm": baselines.pooled_lightgbm,
    }
    wanted = [name for name in chosen if name in fitted]
    if wanted:
        raw, y = pooled(open_world(job.loaded.base_path), job.part)
        methods.extend(fitted[name](raw, y) for name in wanted)
    return methods


def shared(name: str, spec: ModelSpec, params: Params, how: Adapting, prior: Matrix | None) -> Method:
    """Return an initialization as a method that is adapted to the k labels as a comparison says."""
    return baselines.ModelInitialization(
        name, spec, params, method=how.method, prior_variance=how.prior_variance, prior=prior
    )


def _records_digest(loaded: Loaded, part: Part) -> str:
    """Digest what is learned from: the table, the schema that encodes it, and whose records of it."""
    world = open_world(loaded.base_path)
    return _digest(
        world.digest,
        loaded.base.columns.model_dump_json(),
        sorted(training_tables(world, part)),
        list(part.segments),
        {package: version(package) for package in PACKAGES},
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _cell_path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.digest}.json"


def _cell_text(cell: Cell, scores: Sequence[EpisodeScore]) -> str:
    """Write scores column by column, beside what they are of: JSON gives every float back as it was."""
    rows = [score.to_json() for score in scores]
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    epsilon = cell.key.epsilon
    told = None if epsilon is None or math.isinf(epsilon) else epsilon
    about = {"method": cell.key.method, "epsilon": told, "seed": cell.key.seed, "fold": cell.key.fold + 1}
    return json.dumps({"not_private": True, "cell": about, "scores": columns}, allow_nan=False)


def _read_cell(path: Path) -> list[EpisodeScore]:
    try:
        columns = json.loads(path.read_bytes())["scores"]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [EpisodeScore(**{name: row.pop(name) for name in PLACE}, values=row) for row in rows]
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: is damaged; remove it, and it is made again with --resume") from None


def _in_order(scores: Mapping[Key, list[EpisodeScore]], loaded: Loaded) -> dict[Key, list[EpisodeScore]]:
    """Put cells in the order of the file, whatever order they were made in: baselines last."""
    names = [*loaded.comparison.methods, BASELINES]
    order = sorted(scores, key=lambda key: (names.index(key.method), key.epsilon or 0.0, key.seed, key.fold))
    return {key: scores[key] for key in order}

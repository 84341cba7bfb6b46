"""From a prepared folder to trained initializations: the federation itself, and its rivals."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from client.app import close_banks
from client.dataset import load_dataset
from client.ledger import Ledger
from client.training import tasks_for
from metarisk_common.errors import ConfigError, IntegrityError, MetariskError
from metarisk_common.features import Encoder
from metarisk_common.files import write_atomically
from metarisk_common.params import Params
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent, epsilon
from server.app import RUN_FOLDER_KEY
from server.app import app as server_app
from server.checkpoint import load_checkpoint
from server.journal import read_journal
from server.rounds import CHECKPOINT, JOURNAL

from . import vector
from .inprocess import InProcessGrid, run_apps, worker_pool
from .ray import run_apps_on_ray
from .runfolder import RunFolder

CLIENT_APP = "client.app:app"
INITIALIZATIONS = "initializations.safetensors"
MAIN = "meta"
_WATCH_SECONDS = 0.1
_WATCHED_LEDGERS = 100  # All banks have one plan, so these tell for all, and a process may not open files without end.


@dataclass(frozen=True)
class Progress:
    """Where a training is: the last finished round, its mean update norm, and epsilon spent by the furthest bank."""

    round: int
    rounds: int
    mean_update_norm: float | None
    epsilon_spent: float


OnProgress = Callable[[Progress], None]


def train(run: RunFolder, *, workers: int, on_progress: OnProgress | None = None) -> Params:
    """Train on the engine that the run was prepared for; a run that was cut short goes on where it stopped.

    Raises:
        ConfigError: the run ended without its last checkpoint.
        MetariskError: no round had as many reports as the plan asks for, so that nothing was learned.

    """
    config = {RUN_FOLDER_KEY: str(run.path)}
    if rounds_done(run) < run.plan.outer.rounds:
        try:
            with _watched(run, on_progress):
                if run.info["engine"] == "ray":
                    run_apps_on_ray(server_app, CLIENT_APP, run.nodes(), workers=workers, run_config=config)
                else:
                    with InProcessGrid(CLIENT_APP, run.nodes(), workers=workers) as grid:
                        run_apps(server_app, grid, config)
        finally:
            close_banks()
    learned = meta_params(run)
    records = run.journal()
    if not any(record["quorum"] for record in records):
        why = Counter([*records[-1]["refused"].values(), *records[-1]["rejected"].values()])
        codes = ", ".join(f"{code} ({count})" for code, count in why.most_common()) or "no answer"
        raise MetariskError(f"{run.path}: no round had reports to learn from; the last one's answers: {codes}")
    return learned


def rounds_done(run: RunFolder) -> int:
    """Return how many of the run's rounds are finished."""
    found = load_checkpoint(run.path / CHECKPOINT)
    return 0 if found is None else found[0].round


def meta_params(run: RunFolder) -> Params:
    """Return the meta-parameters of a finished run.

    Raises:
        ConfigError: the run has not finished.

    """
    found = load_checkpoint(run.path / CHECKPOINT)
    if found is None or found[0].round < run.plan.outer.rounds:
        done = 0 if found is None else found[0].round
        message = f"{run.path}: only {done} of {run.plan.outer.rounds} rounds are done; continue with --resume"
        raise ConfigError(message)
    return found[0].meta_params


def initializations(
    run: RunFolder, *, workers: int, on_step: Callable[[int, int], None] | None = None
) -> dict[str, Params]:
    """Return the run's own initialization (`meta`) and, where the scenario asks for baselines, its rivals.

    The rivals `no-dp` (the same without noise and clipping) and `joint` (joint training at the same budget) are
    trained by the vector engine on the same banks, once, and kept in the run's folder. They are a researcher's
    comparison: no bank's ledger knows of them, and no bank could release them.

    Raises:
        ConfigError: the run has not finished.
        IntegrityError: the file of the rivals is damaged.

    """
    found: dict[str, Params] = {MAIN: meta_params(run)}
    if not run.scenario.evaluation.baselines:
        return found
    path = run.path / INITIALIZATIONS
    if not path.exists():
        plans = rival_plans(run)
        trained: dict[str, Params] = {}
        if workers > 1:
            with worker_pool(min(workers, len(plans))) as pool:
                waiting = {name: pool.submit(_train_rival, run, plan) for name, plan in plans.items()}
                for done, (name, future) in enumerate(waiting.items(), 1):
                    trained[name] = future.result()
                    if on_step is not None:
                        on_step(done, len(plans))
        else:
            for done, (name, plan) in enumerate(plans.items(), 1):
                trained[name] = _train_rival(run, plan)
                if on_step is not None:
                    on_step(done, len(plans))
        arrays = {f"{rival}/{name}": value for rival, params in trained.items() for name, value in params.items()}
        write_atomically(path, save(arrays))
    try:
        kept = load_file(path)
    except SafetensorError:
        raise IntegrityError(f"{path}: is damaged; remove it, and it is made again") from None
    for key, value in kept.items():
        rival, _, name = key.partition("/")
        found.setdefault(rival, {})[name] = value
    return found


def rival_plans(run: RunFolder) -> dict[str, Plan]:
    """Return the plans of the rivals: the same without privacy, and joint training with the same privacy."""
    rivals = {"joint": run.scenario.joint().plan(epsilon=run.epsilon)}
    if run.plan.mechanism.noise_multiplier > 0:
        rivals["no-dp"] = run.scenario.plan(epsilon=float("inf"))
    return rivals


def _train_rival(run: RunFolder, plan: Plan) -> Params:
    banks = {
        name: tasks_for(plan, load_dataset(folder / "data.parquet", plan.data, name))
        for name, folder in run.bank_folders.items()
    }
    width = Encoder(plan.data).width
    return vector.train(plan, banks, run.sizes, width=width, seed=run.info["seed"])


@contextmanager
def _watched(run: RunFolder, on_progress: OnProgress | None) -> Iterator[None]:
    """Follow the journal from a thread, as an operator would, and report each round that appears in it."""
    if on_progress is None:
        yield
        return
    stop = threading.Event()
    watcher = threading.Thread(target=_follow, args=(run, on_progress, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _follow(run: RunFolder, on_progress: OnProgress, stop: threading.Event) -> None:
    """Report rounds until told to stop; a ledger or journal that can't be read ends the reports, never the run.

    What is wrong with it the run itself will say, where somebody hears it.
    """
    with suppress(MetariskError), ExitStack() as stack:
        ledgers: dict[Path, Ledger] = {}
        seen = -1
        while True:
            last = stop.wait(_WATCH_SECONDS)
            records = read_journal(run.path / JOURNAL)
            if len(records) != seen:
                seen = len(records)
                norm = records[-1]["mean_update_norm"] if records else None
                done = records[-1]["round"] if records else 0
                for folder in islice(run.bank_folders.values(), _WATCHED_LEDGERS):
                    path = folder / "ledger.sqlite"
                    if path not in ledgers and path.exists():
                        # It stays open: a ledger that is open reads only what is new.
                        ledgers[path] = stack.enter_context(Ledger.read(path))
                on_progress(Progress(done, run.plan.outer.rounds, norm, _furthest(run, ledgers)))
            if last:
                return


def _furthest(run: RunFolder, ledgers: Mapping[Path, Ledger]) -> float:
    """Epsilon spent by the bank with the most entries: all have the same plan, so that ledger's is the largest."""
    events: list[PrivacyEvent] = max((ledger.events() for ledger in ledgers.values()), key=len, default=[])
    return epsilon(events, run.plan.mechanism.delta)


def data_files(run: RunFolder) -> list[Path]:
    """Return the banks' tables: what a pooled baseline reads and no bank may."""
    return [folder / "data.parquet" for folder in run.bank_folders.values()]

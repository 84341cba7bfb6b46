"""What a private step and a round cost on this machine: measured side by side in one run, told as ratios."""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from client.app import close_banks
from client.dataset import load_dataset, read_table
from client.dpsgd import plain_gradient, private_gradient
from client.rng import SecureRandom
from client.training import tasks_for
from metarisk_common.features import Encoder
from metarisk_common.models import build, record_losses
from metarisk_common.plan import Mechanism, ModelSpec
from metarisk_common.tasks import Task
from server.app import RUN_FOLDER_KEY
from server.app import app as server_app

from . import vector
from .experiment import CLIENT_APP
from .inprocess import InProcessGrid, run_apps
from .runfolder import RunFolder, prepare
from .scenarios import built_in, data_path, load_scenario

_REPEATS = 5
_STEPS = 40
_ROUNDS = 6
_MODELS = (
    ("scorecard, 120 inputs, 2000 rows", ModelSpec(), 120, 2000),
    ("mlp 30-64-32-1, 256 rows", ModelSpec(kind="mlp", hidden=(64, 32)), 30, 256),
)


def measure() -> list[dict[str, Any]]:
    """Measure every comparison; each figure is the median of repetitions that took turns with its rival's."""
    torch.set_num_threads(1)
    return [*(_step(*model) for model in _MODELS), *_rounds()]


def table(figures: list[dict[str, Any]]) -> Table:
    """Show figures with their ratio to the first of each group."""
    shown = Table(title="Medians on this machine; ratio to the row marked 1.00", title_justify="left")
    for heading in ("what", "milliseconds", "ratio"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for figure in figures:
        for name, seconds in figure["seconds"].items():
            shown.add_row(f"{figure['what']}: {name}", f"{1000 * seconds:.2f}", f"{figure['ratio'][name]:.2f}")
    return shown


def _step(what: str, spec: ModelSpec, width: int, rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) / width**0.5
    task = Task("bench", "", x, (torch.rand(rows, generator=generator) < 0.2).float())  # noqa: PLR2004 - one in five
    mechanism = Mechanism(noise_multiplier=4.0, max_grad_norm=1.0)
    private = private_gradient(
        build(spec, width), record_losses,
        mechanism=mechanism, expected_batch_size=float(rows), rng=SecureRandom.from_system(),
    )  # fmt: skip
    plain = plain_gradient(build(spec, width), record_losses)
    params = {name: value.detach().clone() for name, value in build(spec, width).named_parameters()}
    rivals: dict[str, Callable[[], object]] = {
        "plain gradient": lambda: plain(params, task),
        "private, Opacus": lambda: private(params, task),
    }
    return _compare(f"step, {what}", rivals, times=_STEPS)


def _rounds() -> list[dict[str, Any]]:
    path = built_in("credit")
    scenario = load_scenario(path)
    short = scenario.model_copy(update={"server": scenario.server.model_copy(update={"rounds": _ROUNDS})})
    source = data_path(scenario, path)
    folder = Path(tempfile.mkdtemp(prefix="metarisk-bench-"))
    try:
        frame = read_table(source)
        seconds = {}
        for name in ("vector", "messages, in one process", "messages, 2 workers"):
            run = prepare(folder / name, short, frame, where=str(source), epsilon=None, engine="inprocess")
            seconds[name] = _vector_round(run) if name == "vector" else _message_round(run, 2 * ("2" in name))
        return [_with_ratios(f"round of {len(run.bank_folders)} lenders", seconds)]
    finally:
        close_banks()
        shutil.rmtree(folder)


def _vector_round(run: RunFolder) -> float:
    banks = {
        name: tasks_for(run.plan, load_dataset(path / "data.parquet", run.plan.data, name))
        for name, path in run.bank_folders.items()
    }
    marks = [time.perf_counter()]
    vector.train(
        run.plan, banks, run.sizes, width=Encoder(run.plan.data).width, seed=None,
        on_round=lambda _: marks.append(time.perf_counter()),
    )  # fmt: skip
    return statistics.median(after - before for before, after in itertools.pairwise(marks))


def _message_round(run: RunFolder, workers: int) -> float:
    with InProcessGrid(CLIENT_APP, run.nodes(), workers=workers) as grid:
        run_apps(server_app, grid, {RUN_FOLDER_KEY: str(run.path)})
    # The first round reads every bank's table; the later ones are the steady state.
    return statistics.median(float(record["seconds"]) for record in run.journal()[1:])


def _compare(what: str, rivals: dict[str, Callable[[], object]], *, times: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(_REPEATS + 1):
        for name, call in rivals.items():
            started = time.perf_counter()
            for _ in range(times):
                call()
            found[name].append((time.perf_counter() - started) / times)
    # The first turn warms caches and is left out.
    return _with_ratios(what, {name: statistics.median(values[1:]) for name, values in found.items()})


def _with_ratios(what: str, seconds: dict[str, float]) -> dict[str, Any]:
    first = next(iter(seconds.values()))
    return {"what": what, "seconds": seconds, "ratio": {name: value / first for name, value in seconds.items()}}

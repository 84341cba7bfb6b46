"""What a private step and a round cost on this machine: measured side by side in one run, told as ratios."""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from client.app import close_banks
from client.dataset import load_dataset, read_table
from client.dpsgd import Engine, plain_gradient, private_gradient, private_gradients
from client.rng import SecureRandom
from client.training import meta_update, tasks_for
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.models import build, record_losses
from metarisk_common.params import Params
from metarisk_common.plan import InnerLoop, Mechanism, ModelSpec
from metarisk_common.tasks import Task
from server.app import RUN_FOLDER_KEY
from server.app import app as server_app

from . import bench_deployment, vector
from .experiment import CLIENT_APP
from .inprocess import InProcessGrid, run_apps
from .runfolder import RunFolder, prepare
from .scenarios import built_in, data_path, load_scenario

_REPEATS = 5
_STEPS = 40
_ROUNDS = 6
_TASKS = 8
_LOCAL_STEPS = 5
_MLP = ModelSpec(kind="mlp", hidden=(64, 32))
_OPACUS = "private, Opacus hooks"
_ENGINES: tuple[Engine, ...] = ("closed-form", "opacus")


def measure() -> list[dict[str, Any]]:
    """Measure every comparison; each figure is the median of repetitions that took turns with its rival's."""
    torch.set_num_threads(1)
    return [
        _step("scorecard, 120 inputs, 2000 rows", ModelSpec(), width=120, rows=2000),
        _step("mlp 30-64-32-1, 256 rows", _MLP, width=30, rows=256),
        _step("mlp, each of 1024 rows at rate 0.25", _MLP, width=30, rows=1024, sample_rate=0.25),
        _step("mlp, 256 rows of 64 customers", _MLP, width=30, rows=256, rows_a_unit=4),
        _tasks(f"mlp, {_TASKS} tasks of 256 rows", _MLP, width=30, rows=256),
        _turns("scorecard, 120 inputs, 2000 rows", ModelSpec(), width=120, rows=2000),
        _turns(f"mlp, {_TASKS} tasks of 256 rows", _MLP, width=30, rows=256, tasks=_TASKS),
        *_rounds(),
    ]


def table(figures: list[dict[str, Any]]) -> Table:
    """Show figures with their ratio to the first of each group, and to Opacus where it is a rival."""
    shown = Table(title="Medians on this machine; ratio to the row marked 1.00", title_justify="left")
    for heading in ("what", "milliseconds", "ratio", "Opacus takes"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for figure in figures:
        for name, seconds in figure["seconds"].items():
            longer = figure["opacus_ratio"].get(name)
            shown.add_row(
                f"{figure['what']}: {name}",
                f"{1000 * seconds:.2f}",
                f"{figure['ratio'][name]:.2f}",
                "" if longer is None else f"{longer:.1f} times as long",
            )
    return shown


def _step(
    what: str, spec: ModelSpec, *, width: int, rows: int, sample_rate: float = 1.0, rows_a_unit: int | None = None
) -> dict[str, Any]:
    """Compare a private step with a plain one on as many rows as the private one draws on average."""
    model, task, params = _workload(spec, width, rows)
    drawn = int(sample_rate * rows)
    few = Task("bench", "", task.x[:drawn], task.y[:drawn])
    unit = None if rows_a_unit is None else torch.arange(rows) // rows_a_unit
    own = Task("bench", "", task.x, task.y, unit)
    mechanism = Mechanism(noise_multiplier=4.0, max_grad_norm=1.0, sample_rate=sample_rate)
    plain = plain_gradient(model, record_losses)
    closed, opacus = (
        private_gradient(
            model, record_losses,
            mechanism=mechanism, expected_batch_size=float(drawn), rng=SecureRandom.from_system(), engine=engine,
        )
        for engine in _ENGINES
    )  # fmt: skip
    rivals: dict[str, Callable[[], object]] = {
        "plain gradient": lambda: plain(params, few),
        "private, closed form": lambda: closed(params, own),
        _OPACUS: lambda: opacus(params, own),
    }
    return _compare(f"step, {what}", rivals, times=_STEPS)


def _tasks(what: str, spec: ModelSpec, *, width: int, rows: int) -> dict[str, Any]:
    """Compare a private step of several tasks in one go with one after the other."""
    model, task, params = _workload(spec, width, rows)
    tasks = [task] * _TASKS
    stacked = {name: torch.stack([value] * _TASKS) for name, value in params.items()}
    public: dict[str, Any] = {
        "mechanism": Mechanism(noise_multiplier=4.0, max_grad_norm=1.0),
        "expected_batch_size": float(rows),
        "rng": SecureRandom.from_system(),
    }
    plain = plain_gradient(model, record_losses)
    private = private_gradient(model, record_losses, **public)
    at_once = private_gradients(model, record_losses, **public)
    rivals: dict[str, Callable[[], object]] = {
        "plain gradients": lambda: [plain(params, each) for each in tasks],
        "private, one by one": lambda: [private(params, each) for each in tasks],
        "private, in one go": lambda: at_once(stacked, tasks),
    }
    return _compare(f"step, {what}", rivals, times=_STEPS // _TASKS)


def _turns(what: str, spec: ModelSpec, *, width: int, rows: int, tasks: int = 1) -> dict[str, Any]:
    """Compare a bank's whole turn under each private algorithm, at equal steps."""
    _, task, _ = _workload(spec, width, rows)
    credit = load_scenario(built_in("credit")).plan().model_copy(update={"model": spec})
    rivals: dict[str, Callable[[], object]] = {}
    for name in ("fedavg", "reptile", "prox", "fomaml", *(["anil"] if spec.kind == "mlp" else [])):
        values = {"algorithm": name, "local_steps": _LOCAL_STEPS, "prox_strength": 0.5 * (name == "prox")}
        plan = credit.model_copy(update={"inner": InnerLoop.model_validate(values)})
        rivals[name] = partial(
            meta_update, initial_params(plan, width), plan, [task] * tasks,
            declared_size=rows * tasks, width=width, rng=SecureRandom.from_system(),
        )  # fmt: skip
    return _compare(f"turn of {_LOCAL_STEPS} steps, {what}", rivals, times=_STEPS // _LOCAL_STEPS)


def _workload(spec: ModelSpec, width: int, rows: int) -> tuple[torch.nn.Module, Task, Params]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) / width**0.5
    y = (torch.rand(rows, generator=generator) < 0.2).float()  # noqa: PLR2004 - one in five
    model = build(spec, width)
    return model, Task("bench", "", x, y), {name: value.detach() for name, value in model.named_parameters()}


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
        between = bench_deployment.measure(run, folder)
        return [
            _with_ratios(f"round of {len(run.bank_folders)} lenders", seconds),
            _with_ratios(f"round of {bench_deployment.BANKS} banks between processes", between),
        ]
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
    first, opacus = next(iter(seconds.values())), seconds.get(_OPACUS)
    return {
        "what": what,
        "seconds": seconds,
        "ratio": {name: value / first for name, value in seconds.items()},
        "opacus_ratio": {} if opacus is None else {name: opacus / value for name, value in seconds.items()},
    }

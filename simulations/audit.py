"""The audit: an attack on the real client code with planted canaries, seen only through what it releases.

A canary is a record that alone bears its mark, one category of a public column, and whose mark no other record
has. The production encoder gives the mark an input of its own, so the canary's clipped gradient lies almost wholly
in one column of the first layer, and one run is as many independent trials as there are marks. A coin decides which
canaries are in. The server is the worst that the contract allows: it broadcasts the same meta-parameters in every
round, knows every record that might be there, and sees all that is released. Probes are marks that many records
bear, all of them in: they measure how far one record moves a release, which single canaries tell only roughly
where the noise is strong. Banks, messages, ledgers and noise are those of production; nothing is seeded.
"""

import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from flwr.app import MessageType
from numpy.typing import NDArray

from client.app import FOLDER_KEY, close_banks
from client.approval import approve
from client.config import CONFIG_FILE
from metarisk_common.calibration import noise_multiplier_for
from metarisk_common.errors import ConfigError, MetariskError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.models import build, forward, record_losses, to_tensors
from metarisk_common.params import Params
from metarisk_common.plan import InnerLoop, Mechanism, ModelSpec, OuterLoop, Plan
from metarisk_common.schema import CategoricalColumn, Label, NumericColumn, Schema
from metarisk_common.wire import TrainOrder, TrainReport, decode_reply, encode_order

from .audit_statistics import Claim, Findings, Scores, judge
from .experiment import CLIENT_APP
from .inprocess import InProcessGrid, Node

CANARIES, THOROUGH = 4000, 20_000
MODELS = {"scorecard": ModelSpec(base_rate=0.5), "mlp": ModelSpec(kind="mlp", hidden=(8,), base_rate=0.5)}

_MARKS_PER_BANK = 4000  # More in one bank would take the memory of a table with a column for each.
_PROBES, _COPIES = 50, 40
_ORDINARY = 500
_SAMPLE_RATE, _LOCAL_STEPS = 0.25, 4
_LEARNING_RATE = 10.0
_CLIP = 0.05  # Every canary's gradient is far longer, and is clipped to just this.
_INTERCEPT = 0.05  # A constant input that all records share would take a share of every canary's gradient.
_HEAD = 10.0  # The server's choice of an mlp's last weights: large, so that gradients lie in the first layer.
_UNLIKELY, _LIKELY = (
    -3.0,
    2.0,
)  # Its choice of the logits of a canary's and a probe's label: gradients differ in length.
_DELTA_SHARE = 10
_BLOCK = 256


@dataclass(frozen=True)
class Request:
    """What to attack and what it claims; `seed` decides the coins and nothing else."""

    folder: Path
    epsilon: float = 4.0
    delta: float = 1e-5
    canaries: int = CANARIES
    model: str = "scorecard"
    rounds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Audit:
    """A finished audit: what was asked, the plan that was attacked, all scores, and what they say."""

    request: Request
    plan: Plan
    scores: Scores
    findings: Findings


@dataclass(frozen=True)
class Target:
    """A canary's gradient at the broadcast weights, as anybody can compute it.

    Attributes:
        layer: name of the first layer's weights.
        direction: (marks, outputs of the layer) unit vectors: its gradient in the column of its mark.
        strength: (marks,) length of that part once the whole gradient is clipped, in clip norms.

    """

    layer: str
    direction: torch.Tensor
    strength: NDArray[np.float64]


def audit(request: Request, on_progress: Callable[[int, int], None] | None = None) -> Audit:
    """Plant canaries in banks of their own, order rounds of them, and judge what they release.

    Raises:
        ConfigError: the folder is in use, or the request asks for what cannot be.
        MetariskError: a bank refused an order, or answered with something else than a report.

    """
    banks = math.ceil(request.canaries / _MARKS_PER_BANK)
    marks = math.ceil(request.canaries / banks)
    declared = marks + _PROBES * _COPIES + _ORDINARY
    _check(request, declared)
    plan = _plan(request, marks + _PROBES)
    coins = np.random.default_rng(request.seed)
    copies = np.where(np.arange(marks + _PROBES) < marks, coins.random((banks, marks + _PROBES)) < 0.5, _COPIES)  # noqa: PLR2004 - a fair coin
    folders = {f"bank {index + 1}": request.folder / f"bank-{index + 1}" for index in range(banks)}
    for (name, folder), row in zip(folders.items(), copies, strict=True):
        _write_bank(folder, name, _records(plan, row, name), plan, request, declared)
    start = broadcast(plan)
    target = _target(plan, start)
    scale = plan.mechanism.sample_rate * declared / (plan.inner.learning_rate * _CLIP)
    values = np.empty((banks, request.rounds, marks + _PROBES))
    for done, (bank, round_number, report) in enumerate(_releases(plan, start, folders), 1):
        columns = torch.from_numpy(report.update[target.layer][:, : marks + _PROBES].astype(np.float64).T)
        values[bank, round_number - 1] = -(columns * target.direction).sum(1).numpy() * scale
        if on_progress is not None:
            on_progress(done, banks * request.rounds)
    orientation = np.sign(target.direction.sum(1).numpy())
    scores = Scores(values, copies.astype(np.int64), target.strength, orientation)
    mechanism = plan.mechanism
    claim = Claim(request.epsilon, request.delta, mechanism.noise_multiplier, mechanism.sample_rate, plan.total_steps)
    return Audit(request, plan, scores, judge(scores, claim))


def broadcast(plan: Plan) -> Params:
    """Give the meta-parameters that the server sends in every round: under them no canary has a likely label.

    Marks get weights that make the labels of canaries unlikely and those of probes likely, so that the gradients of
    canaries are far longer than the others': a clip by any norm but their own would show.
    """
    params = {name: np.zeros_like(value) for name, value in initial_params(plan, Encoder(plan.data).width).items()}
    table = _canaries(plan)
    x = Encoder(plan.data).encode(table)[0]
    own = x[np.arange(len(x)), np.arange(len(x))]
    wanted = np.where(np.arange(len(x)) < len(x) - _PROBES, _UNLIKELY, _LIKELY) * (2 * table["outcome"].to_numpy() - 1)
    if "head.weight" in params:
        params["head.weight"][:] = _HEAD
        wanted = wanted / (_HEAD * params["head.weight"].size)
    next(iter(params.values()))[:, : len(x)] = wanted / own
    return params


def _check(request: Request, declared: int) -> None:
    if not (request.epsilon > 0 and math.isfinite(request.epsilon)):
        raise ConfigError("--epsilon: the claim must be a finite number above 0; a run without noise claims nothing")
    if not 0 < request.delta <= 1 / (_DELTA_SHARE * declared):
        raise ConfigError(
            f"--delta: must be above 0 and at most 1 / ({_DELTA_SHARE} * {declared} records of a bank), "
            f"{1 / (_DELTA_SHARE * declared):.2g}"
        )
    if request.model not in MODELS:
        raise ConfigError(f"--model {request.model}: choose {' or '.join(MODELS)}")
    if request.folder.exists() and not (request.folder.is_dir() and not any(request.folder.iterdir())):
        raise ConfigError(f"{request.folder}: is in use; name a folder that does not exist yet with --out")


def _plan(request: Request, marks: int) -> Plan:
    noise_multiplier = noise_multiplier_for(
        request.epsilon, request.delta, sample_rate=_SAMPLE_RATE, steps=request.rounds * _LOCAL_STEPS
    )
    mark = CategoricalColumn(kind="categorical", name="mark", categories=tuple(f"m{index}" for index in range(marks)))
    amount = NumericColumn(kind="numeric", name="amount", lower=1_000, upper=1_000_000, scale="log")
    term = NumericColumn(kind="numeric", name="term", lower=0, upper=360)
    columns = (mark, amount, term)
    schema = Schema(label=Label(name="outcome"), institution="bank", columns=columns)
    encoding = schema.encoding.model_copy(update={"intercept": _INTERCEPT})
    return Plan(
        name="audit",
        data=schema.model_copy(update={"encoding": encoding}),
        model=MODELS[request.model],
        inner=InnerLoop(local_steps=_LOCAL_STEPS, learning_rate=_LEARNING_RATE),
        mechanism=Mechanism(
            sample_rate=_SAMPLE_RATE, max_grad_norm=_CLIP, noise_multiplier=noise_multiplier, delta=request.delta
        ),
        outer=OuterLoop(rounds=request.rounds),
    )


def _records(plan: Plan, copies: NDArray[np.int64], name: str) -> pl.DataFrame:
    """Build a bank's table: each mark as often as it has copies, and ordinary records, whose mark is none of them."""
    index = np.repeat(np.arange(len(copies)), copies)
    marked = _canaries(plan)[index]
    spread = np.linspace(0.0, 1.0, _ORDINARY)
    ordinary = pl.DataFrame(
        {
            "mark": ["none"] * _ORDINARY,
            "amount": 1_000 * 1_000**spread,
            "term": 360 * spread[::-1],
            "outcome": np.arange(_ORDINARY) % 2,
        }
    )
    return pl.concat([marked, ordinary]).with_columns(pl.lit(name).alias("bank"))


def _canaries(plan: Plan) -> pl.DataFrame:
    """One record for each mark, with labels in turn: in the other columns their shares cancel."""
    column = plan.data.columns[0]
    marks = column.categories if isinstance(column, CategoricalColumn) else ()
    count = len(marks)
    values = {"mark": marks, "amount": [30_000.0] * count, "term": [180.0] * count, "outcome": np.arange(count) % 2}
    return pl.DataFrame(values)


def _write_bank(folder: Path, name: str, table: pl.DataFrame, plan: Plan, request: Request, declared: int) -> None:
    """Lay out a bank as its own people would: table, configuration, ledger, and the plan that they approve."""
    try:
        folder.mkdir(parents=True)
        table.write_parquet(folder / "data.parquet")
        text = (
            f'name = "{name}"\ndata = "data.parquet"\ndeclared_size = {declared}\n\n[policy]\n'
            f"epsilon = {float(request.epsilon)!r}\ndelta = {request.delta!r}\nmin_noise_multiplier = 0.0\n"
        )
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: a bank cannot be laid out here: {error.strerror}") from None
    approve(folder, plan)


def _target(plan: Plan, params: Params) -> Target:
    """Compute what a canary's gradient must look like, with no code of the client's."""
    encoder = Encoder(plan.data)
    table = _canaries(plan)
    x = torch.from_numpy(encoder.encode(table)[0])
    y = torch.from_numpy(table["outcome"].to_numpy().astype(np.float32))
    model = build(plan.model, encoder.width)
    tensors = to_tensors(params)
    layer = next(iter(tensors))

    def loss(weights: Params, row: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
        return record_losses(forward(model, weights, row[None]), outcome[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    own, norms = [], []
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        found = gradients(tensors, x[rows], y[rows])
        columns = torch.arange(start, start + len(x[rows]))
        own.append(found[layer][torch.arange(len(columns)), :, columns].double())
        norms.append(sum(value.flatten(1).double().square().sum(1) for value in found.values()).sqrt())
    column, norm = torch.cat(own), torch.cat(norms)
    length = column.square().sum(1).sqrt()
    return Target(layer, column / length[:, None], (length / norm.clamp(min=_CLIP)).numpy())


def _releases(plan: Plan, start: Params, folders: dict[str, Path]) -> Iterator[tuple[int, int, TrainReport]]:
    """Order the plan's rounds from every bank by Flower's messages, and hand on (bank, round, report)."""
    run_id = uuid.uuid4().hex
    nodes = [Node(name, {FOLDER_KEY: str(folder)}) for name, folder in folders.items()]
    heard: dict[int, tuple[int, str]] = {}
    with _banks_closed(), InProcessGrid(CLIENT_APP, nodes) as grid:
        for round_number in range(1, plan.outer.rounds + 1):
            for bank, node_id in enumerate(grid.get_node_ids()):
                order = TrainOrder(run_id, round_number, plan.hash(), start, *heard.get(bank, ()))
                message = grid.create_message(encode_order(order), MessageType.TRAIN, node_id, str(round_number))
                (answer,) = grid.send_and_receive([message])
                reply = None if answer.has_error() else decode_reply(answer.content)
                if not isinstance(reply, TrainReport):
                    reason = "a failure" if reply is None else f"a refusal ('{reply.code}')"
                    raise MetariskError(f"{nodes[bank].name} answered round {round_number} with {reason}, not a report")
                heard[bank] = (reply.counter, reply.receipt)
                yield bank, round_number, reply


@contextmanager
def _banks_closed() -> Iterator[None]:
    try:
        yield
    finally:
        close_banks()

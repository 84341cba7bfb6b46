"""A federation of quadratic tasks: real messages, real rounds, and banks that do what their configuration says."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from metarisk_common.algorithms import ALGORITHMS
from metarisk_common.models import to_arrays, to_tensors
from metarisk_common.params import Params, scale
from metarisk_common.plan import Plan
from metarisk_common.privacy import PrivacyEvent
from metarisk_common.tasks import Episode
from metarisk_common.wire import (
    EvaluateOrder,
    EvaluateReport,
    Refusal,
    TrainOrder,
    TrainReport,
    decode_order,
    encode_reply,
)
from server.state import ServerState, initial_state
from simulations.inprocess import InProcessGrid, Node

BANKS, DIMENSION = 8, 5
INNER_RATE = 0.1


@dataclass(frozen=True)
class Quadratic:
    """Loss (theta - c)' A (theta - c) / 2 of a bank that declares `size` records."""

    a: np.ndarray
    c: np.ndarray
    size: int = 10


def quadratics() -> list[Quadratic]:
    random = np.random.default_rng(20)
    eigenvalues = np.diag(np.logspace(-1, 0.7, DIMENSION))
    tasks = []
    for number in range(BANKS):
        turn, _ = np.linalg.qr(random.normal(size=(DIMENSION, DIMENSION)))
        tasks.append(Quadratic(turn @ eigenvalues @ turn.T, random.normal(size=DIMENSION), 10 * (number + 1)))
    return tasks


def report_of(order: TrainOrder, plan: Plan, task: Quadratic, name: str) -> TrainReport:
    dtype, as_torch = order.meta_params["theta"].dtype, plan.inner.second_order
    a, c = task.a.astype(dtype), task.c.astype(dtype)
    if as_torch:
        a, c = to_tensors({"a": a, "c": c}).values()

    def gradient(params: Params, _: object) -> Params:
        return {"theta": a @ (params["theta"] - c)}

    meta = to_tensors(order.meta_params) if as_torch else order.meta_params
    work: Any = Episode(task, task) if plan.inner.by_episode else task
    update = ALGORITHMS[plan.inner.algorithm](meta, [work], gradient, plan.inner)
    update = to_arrays(update) if as_torch else update
    mechanism = plan.mechanism
    event = PrivacyEvent(
        "poisson_gaussian", mechanism.noise_multiplier, mechanism.sample_rate, plan.inner.local_steps, ""
    )
    receipt = f"receipt of {name} for round {order.round}"
    told = (order.run_id, order.round, order.plan_hash, name, task.size)
    if isinstance(order, EvaluateOrder):
        counts = histograms_of(task, order)
        return EvaluateReport(*told, plan.evaluate_event(), f"{receipt}, evaluated", 10 * order.round + 1, counts)
    return TrainReport(*told, event, receipt, 10 * order.round, update)


def histograms_of(task: Quadratic, order: TrainOrder) -> Params:
    """Counts of a made-up portfolio: 8 with the outcome score as `theta` says, 40 without score low."""
    theta = float(order.meta_params["theta"].sum())
    cell = 2 if theta > 0 else 1
    return {"positives": np.eye(4)[cell] * 8 * task.size, "negatives": np.eye(4)[1] * 40.0 * task.size}


Reaction = Callable[[TrainReport], TrainReport | Refusal | RecordDict]


def fail(_: TrainReport) -> RecordDict:
    raise ValueError("row 17 has income 40211")


REACTIONS: dict[str, Reaction] = {
    "honest": lambda report: report,
    "refuses": lambda report: Refusal(report.run_id, report.round, report.plan_hash, report.institution, "budget"),
    "answers nothing": lambda _: RecordDict(),
    "answers garbage": lambda _: RecordDict({"head": ConfigRecord({"loss": 0.3})}),
    "says too much": lambda report: _with_field(encode_reply(report)),
    "sends NaN": lambda report: replace(report, update=scale(report.update, float("nan"))),
    "sends far too much": lambda report: replace(report, update=scale(report.update, 1e20)),
    "sends the wrong shape": lambda report: replace(report, update={"theta": report.update["theta"][:2]}),
    "fails": fail,
    "takes another's name": lambda report: replace(report, institution="Bank 1"),
    "takes another's receipt": lambda report: replace(report, receipt=report.receipt.replace("Bank 7", "Bank 1")),
    "answers another order": lambda report: replace(report, round=report.round + 1),
    "spent less": lambda report: replace(report, event=replace(report.event, steps=1)),
    "has an old ledger": lambda report: replace(report, counter=0),
    "claims too large a size": lambda report: replace(report, declared_size=2_000_000),
}


def _with_field(content: RecordDict) -> RecordDict:
    head = content["head"]
    assert isinstance(head, ConfigRecord)
    head["train_loss"] = 0.3
    return content


def bank_app(plan: Plan, tasks: Sequence[Quadratic]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, context)

    def _answer(message: Message, context: Context) -> Message:
        config = context.node_config
        order = decode_order(message.content)
        report = report_of(order, plan, tasks[int(config["number"])], f"Bank {config['number']}")
        answer = REACTIONS[str(config["reaction"])](report)
        content = answer if isinstance(answer, RecordDict) else encode_reply(answer)
        return Message(content, reply_to=message)

    return app


class TestGrid(InProcessGrid):
    """The in-process grid, which walks through messages twice as Flower's own does, and can be told to misbehave."""

    __test__ = False

    def __init__(self, client_app: ClientApp, nodes: Sequence[Node]) -> None:
        super().__init__(client_app, nodes)
        self.silent: set[str] = set()
        self.dead: set[str] = set()
        self.slow: set[str] = set()
        self.pulls_before_crash: int | None = None
        self._asked: dict[str, str] = {}
        self._pulled: set[str] = set()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = [self._nodes[message.metadata.dst_node_id].name for message in messages]
        ids = super().push_messages(messages)
        self._asked |= dict(zip(ids, names, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        name = self._asked[message_id]
        if name in self.silent:
            return []
        if name in self.slow and message_id not in self._pulled:
            self._pulled.add(message_id)
            return []
        if name in self.dead:
            order = self._waiting.pop(message_id)
            assert isinstance(order, Message)
            reply = Message(Error(5, "node gone"), reply_to=order)
            reply.metadata.__dict__["_src_node_id"] = 1  # As Flower has it: the SuperLink speaks for the dead.
            return [reply]
        if self.pulls_before_crash is not None:
            if self.pulls_before_crash == 0:
                raise ConnectionError
            self.pulls_before_crash -= 1
        return super().pull_messages([message_id])


class Federation:
    """A plan, its banks and its start."""

    def __init__(self, **parts: Any) -> None:
        data: dict[str, Any] = {
            "label": {"name": "default"},
            "institution": "bank",
            "columns": [{"kind": "numeric", "name": "amount", "lower": 0, "upper": 1}],
        }
        parts["inner"] = {"local_steps": 5, "learning_rate": INNER_RATE, **parts.get("inner", {})}
        parts["outer"] = {"rounds": 4, "weighting": "equal", "schedule": "constant", **parts.get("outer", {})}
        mechanism = {"noise_multiplier": 0.0, "max_grad_norm": None}
        if "metrics" in parts:
            data |= {"max_records_per_unit": 100, "privacy_unit": "customer"}
        values = {"name": "test", "data": data, "mechanism": mechanism, "dtype": "float64", **parts}
        self.plan = Plan.model_validate(values)
        self.tasks = quadratics()

    def start(self, run_id: str = "run-1") -> ServerState:
        return initial_state(run_id, self.plan, {"theta": np.zeros(DIMENSION)})

    def grid(self, numbers: Iterable[int] = range(BANKS), **reactions: str) -> TestGrid:
        """Some of the banks; `b7="fails"` says what bank 7 does instead of what it should."""
        nodes = []
        for number in numbers:
            config = {"number": str(number), "reaction": reactions.get(f"b{number}", "honest")}
            nodes.append(Node(f"Bank {number}", config))
        return TestGrid(bank_app(self.plan, self.tasks), nodes)


@pytest.fixture
def federation() -> type[Federation]:
    return Federation


@pytest.fixture
def reactions() -> list[str]:
    return list(REACTIONS)

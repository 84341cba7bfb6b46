"""The resumable loop over rounds: push orders, stream replies, fold, checkpoint, journal.

Flower's `Strategy.start` can neither begin at a later round nor checkpoint, and `Grid.send_and_receive` holds
every reply at once; this loop does the first two and not the third.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from metarisk_common.errors import ConfigError, IntegrityError
from metarisk_common.flower_compat import node_names
from metarisk_common.plan import Plan
from metarisk_common.wire import EvaluateOrder, TrainOrder, encode_order

from .checkpoint import load_checkpoint, save_checkpoint
from .journal import append_record, mend_journal
from .state import ServerState
from .strategy import aggregate_evaluate, aggregate_train, configure_evaluate, configure_train

JOURNAL = "journal.jsonl"
CHECKPOINT = "checkpoint"
_SHORTEST_POLL_SECONDS = 0.02
_LONGEST_POLL_SECONDS = 0.25
_SHARE_OF_WAIT = 0.1
_GATHER_SECONDS = 0.5
_TIMES_ASKED = 3
_LOST_ON_THE_WAY = frozenset({3, 4, 5, 8})
"""Flower's codes for a message that is gone, a reply that is gone, a node that died, a worker that died."""

Members = Callable[[], Mapping[int, str]]
"""Tells which nodes may take part and are online, by id, with the institution that each is."""


def resume_or_start(folder: Path, start: ServerState) -> ServerState:
    """Return the folder's checkpointed state, or `start` where there is none yet.

    Raises:
        IntegrityError: the checkpoint belongs to another plan or run, or it or the journal is damaged.

    """
    found = load_checkpoint(folder / CHECKPOINT)
    if found is None:
        return start
    state, record = found
    if (state.plan_hash, state.run_id) != (start.plan_hash, start.run_id):
        raise IntegrityError(f"{folder}: the checkpoint belongs to another plan or run; start a new run folder")
    mend_journal(folder / JOURNAL, record)
    return state


def run_rounds(state: ServerState, plan: Plan, grid: Grid, folder: Path, members: Members | None = None) -> ServerState:
    """Play the rounds after `state` until the plan's last one, each on the disk before the next begins.

    Killed at any instant and started again from `resume_or_start`, it plays the interrupted round anew with
    the same order; a bank that has already released for that order answers with the very same report.

    Args:
        state: where the run stands.
        plan: the run's plan.
        grid: reaches the nodes.
        folder: the run's folder.
        members: who may take part; without it every node of the grid, all of which are there from the beginning.

    Raises:
        ConfigError: too few nodes for the plan's quorum are online when a round begins, and come while it waits.

    """
    while state.round < plan.outer.rounds:
        state = play_round(state, plan, grid, folder, members)
    return state


def gather(members: Members, plan: Plan) -> Mapping[int, str]:
    """Wait until enough banks for the plan's quorum are online, at most as long as a round may last.

    Raises:
        ConfigError: too few came.

    """
    end = time.monotonic() + plan.outer.deadline_seconds
    while True:
        cohort = members()
        if len(cohort) >= plan.outer.min_reports:
            return cohort
        if time.monotonic() >= end:
            raise ConfigError(
                f"{len(cohort)} banks are online, and the plan's quorum is {plan.outer.min_reports}; "
                "go on with --resume when more are"
            )
        time.sleep(_GATHER_SECONDS)


def play_round(state: ServerState, plan: Plan, grid: Grid, folder: Path, members: Members | None = None) -> ServerState:
    """Play one round and write it down: the checkpoint first, with the record, then the journal."""
    cohort = node_names(grid) if members is None else gather(members, plan)
    if not cohort:
        raise ConfigError("no bank is online: start at least one before the run")
    started = time.monotonic()
    order = configure_train(state, plan)
    replies = stream_replies(grid, order, cohort, plan.outer.deadline_seconds, state.ledgers)
    after, record = aggregate_train(state, plan, order, cohort, replies)
    if plan.evaluates_after(after.round):
        question = configure_evaluate(after, plan)
        answers = stream_replies(grid, question, cohort, plan.outer.deadline_seconds, after.ledgers)
        after, metrics = aggregate_evaluate(after, plan, question, cohort, answers)
        record = {**record, "federated_metrics": metrics}
    record = {**record, "run_id": state.run_id, "seconds": round(time.monotonic() - started, 4)}
    save_checkpoint(folder / CHECKPOINT, after, record)
    append_record(folder / JOURNAL, record)
    return after


def stream_replies(
    grid: Grid,
    order: TrainOrder,
    cohort: Mapping[int, str],
    deadline_seconds: float,
    ledgers: Mapping[str, tuple[int, str]],
) -> Iterator[tuple[int, Message]]:
    """Push an order to every node and yield one reply of each, one at a time, until all are in or time is up.

    Each node's order echoes what `ledgers` says was last heard of its bank's ledger. An order or its reply may be lost
    on the way, with a process that is killed: it is sent again after a third and two thirds of the time, and where
    Flower says that it was lost. A bank answers the same order with the very same report, and pays once.

    Yields:
        The node that was asked, which need not be the one that a failure's message says it is from; and its reply.

    """
    start = heard = time.monotonic()
    asked = _Asked(grid, order, cohort, ledgers, start + deadline_seconds)
    for node_id in sorted(cohort, key=lambda node: (cohort[node], node)):
        asked.ask(node_id)
    while asked.waiting:
        before = len(asked.waiting)
        for message_id in tuple(asked.waiting):
            # One id a call, so that at most one reply's arrays are in memory.
            for reply in grid.pull_messages([message_id]) if message_id in asked.waiting else ():
                answering = asked.take(message_id, reply)
                if answering is not None:
                    yield answering, reply
        now = time.monotonic()
        if now >= asked.end:
            return
        if len(asked.waiting) < before:
            heard = now
            continue
        asked.remind(1 + int(_TIMES_ASKED * (now - start) / deadline_seconds))
        # Each look is a request to the hub: at a tenth of the time waited, looking neither delays nor crowds it.
        time.sleep(min(_LONGEST_POLL_SECONDS, max(_SHORTEST_POLL_SECONDS, _SHARE_OF_WAIT * (now - heard))))


@dataclass
class _Asked:
    """Who was sent a round's order, how often, and under which messages' ids an answer is waited for."""

    grid: Grid
    order: TrainOrder
    cohort: Mapping[int, str]
    ledgers: Mapping[str, tuple[int, str]]
    end: float
    waiting: dict[str, int] = field(default_factory=dict, init=False)
    times: Counter[int] = field(default_factory=Counter, init=False)

    def ask(self, node_id: int) -> None:
        """Send the order to a node, while there is time for an answer."""
        left = self.end - time.monotonic()
        if left <= 0:
            return
        # Encoded anew for each node, because Flower may mutate a message it was given. One message a call, in a
        # list: Flower walks through what it is given twice, and all orders together may be too large for it.
        counter, receipt = self.ledgers.get(self.cohort[node_id], (0, ""))
        content = encode_order(replace(self.order, ledger_counter=counter, ledger_receipt=receipt))
        kind = MessageType.EVALUATE if isinstance(self.order, EvaluateOrder) else MessageType.TRAIN
        message = Message(content, node_id, kind, ttl=left, group_id=str(self.order.round))
        self.waiting.update(dict.fromkeys(filter(None, self.grid.push_messages([message])), node_id))
        self.times[node_id] += 1

    def take(self, message_id: str, reply: Message) -> int | None:
        """Take a reply in: the node that it answers for; none if it says that the order was lost and is sent again.

        None, too, if the time is up: an order ends with the round, and that it is gone then says only that its bank was
        silent.
        """
        node_id = self.waiting.pop(message_id)
        lost = reply.has_error() and reply.error.code in _LOST_ON_THE_WAY
        late = time.monotonic() >= self.end
        if lost and (late or self.times[node_id] < _TIMES_ASKED):
            self.ask(node_id)
            return None
        self.waiting = {other: node for other, node in self.waiting.items() if node != node_id}
        return node_id

    def remind(self, times: int) -> None:
        """Send the order again to every node that is silent and was not sent it so often yet."""
        for node_id in {node for node in self.waiting.values() if self.times[node] < times}:
            self.ask(node_id)

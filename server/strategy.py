"""The outer loop's two halves as pure functions: what goes out in a round, and what comes of the replies."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Message

from metarisk_common.errors import ProtocolError
from metarisk_common.params import Params, l2_norm
from metarisk_common.plan import Plan
from metarisk_common.wire import Refusal, TrainOrder, TrainReport, decode_reply

from . import aggregators
from .admission import judge
from .optimizers import optimizer_for, rate_at
from .state import ServerState, remember_sizes


def configure_train(state: ServerState, plan: Plan) -> TrainOrder:
    """Build the order of the round after `state`: the same for every node of the cohort."""
    params = {name: np.asarray(value, plan.dtype) for name, value in state.meta_params.items()}
    return TrainOrder(state.run_id, state.round + 1, state.plan_hash, params)


@dataclass
class Tally:
    """What a round has seen so far; it lives for one round and is turned into the journal's record."""

    mean: aggregators.MeanState
    answered: set[int] = field(default_factory=set)
    receipts: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)


def aggregate_train(
    state: ServerState, plan: Plan, order: TrainOrder, cohort: Mapping[int, str], replies: Iterable[tuple[int, Message]]
) -> tuple[ServerState, dict[str, Any]]:
    """Fold a stream of replies into the next state, one at a time; memory stays that of one update.

    Args:
        state: before the round.
        plan: the run's plan.
        order: what `configure_train` built.
        cohort: names of the nodes that were asked, by node id; "" where the engine keeps no names.
        replies: the node that was asked, and its reply, as they arrive; each is dropped once it has been added.

    Returns:
        The next state and the journal's record of the round. Below the plan's quorum the meta-parameters and
        the optimizer stay as they were, and the record says so.

    """
    tally = Tally(aggregators.init(order.meta_params))
    for node, message in replies:
        _take(tally, node, message, state, plan, order, cohort)
    rate = rate_at(plan.outer, order.round)
    quorum = tally.mean.count >= plan.outer.min_reports
    update: Params = aggregators.result(tally.mean) if quorum else {}
    after = remember_sizes(replace(state, round=order.round), tally.sizes)
    if quorum:
        optimizer_state, meta = optimizer_for(plan.outer).apply(state.optimizer_state, state.meta_params, update, rate)
        after = replace(after, meta_params=meta, optimizer_state=optimizer_state)
    record = {
        "round": order.round,
        "cohort": len(cohort),
        "admitted": sorted(tally.receipts),
        "refused": dict(sorted(tally.refused.items())),
        "rejected": dict(sorted(tally.rejected.items())),
        "absent": sorted(name or str(node) for node, name in cohort.items() if node not in tally.answered),
        "quorum": quorum,
        "mean_update_norm": float(np.mean(tally.norms)) if tally.norms else None,
        "aggregate_norm": l2_norm(update) if quorum else None,
        "server_learning_rate": rate,
        "order_digest": order.digest(),
    }
    return after, record


def _take(
    tally: Tally,
    node: int,
    message: Message,
    state: ServerState,
    plan: Plan,
    order: TrainOrder,
    cohort: Mapping[int, str],
) -> None:
    name = cohort[node] or str(node)
    tally.answered.add(node)
    if message.has_error():
        # Flower's own failures; the text could have come from anywhere, so only the code is kept.
        tally.rejected[name] = f"flower-error-{message.error.code}"
        return
    try:
        reply = decode_reply(message.content)
    except ProtocolError:
        tally.rejected[name] = "protocol"
        return
    if cohort[node] and reply.institution != cohort[node]:
        tally.rejected[name] = "name"
        return
    if isinstance(reply, Refusal):
        tally.refused[reply.institution] = reply.code
        return
    verdict = judge(reply, order, plan, admitted=tally.receipts, declared_sizes=state.declared_sizes)
    if verdict is not None:
        tally.rejected[name if verdict == "duplicate" else reply.institution] = verdict
        return
    _add(tally, reply, plan)


def _add(tally: Tally, report: TrainReport, plan: Plan) -> None:
    weight = report.declared_size if plan.outer.weighting == "declared_size" else 1
    tally.mean = aggregators.add(tally.mean, report.update, weight)
    tally.receipts[report.institution] = report.receipt
    tally.sizes[report.institution] = report.declared_size
    tally.norms.append(l2_norm(report.update))

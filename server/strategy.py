"""The outer loop's halves as pure functions: what goes out in a round, and what comes of the replies."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Message

from metarisk_common.errors import ProtocolError
from metarisk_common.histograms import NEGATIVES, POSITIVES, summarise
from metarisk_common.params import Params, add, l2_norm
from metarisk_common.plan import OuterLoop, Plan
from metarisk_common.wire import EvaluateOrder, Refusal, TrainOrder, TrainReport, decode_reply

from . import prior_sums
from .admission import judge
from .aggregators import update_norm
from .optimizers import rate_at
from .robust import aggregator_for, cut_of
from .state import ServerState, end_round, remember_ledgers, remember_sizes


def configure_train(state: ServerState, plan: Plan) -> TrainOrder:
    """Build the order of the round after `state`: the same for every node of the cohort."""
    params = {name: np.asarray(value, plan.dtype) for name, value in state.meta_params.items()}
    return TrainOrder(state.run_id, state.round + 1, state.plan_hash, params)


def configure_evaluate(state: ServerState, plan: Plan) -> EvaluateOrder:
    """Build the order for score histograms at the meta-parameters that the round of `state` has ended with."""
    params = {name: np.asarray(value, plan.dtype) for name, value in state.meta_params.items()}
    return EvaluateOrder(state.run_id, state.round, state.plan_hash, params)


@dataclass
class Tally:
    """What a round has seen so far; it lives for one round and is turned into the journal's record."""

    answered: set[int] = field(default_factory=set)
    receipts: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    ledgers: dict[str, tuple[int, str]] = field(default_factory=dict)

    def absent(self, cohort: Mapping[int, str]) -> list[str]:
        """List the banks that did not answer in time."""
        return sorted(name or str(node) for node, name in cohort.items() if node not in self.answered)


def aggregate_train(
    state: ServerState, plan: Plan, order: TrainOrder, cohort: Mapping[int, str], replies: Iterable[tuple[int, Message]]
) -> tuple[ServerState, dict[str, Any]]:
    """Fold a stream of replies into the next state, one at a time; memory is that of the plan's aggregator.

    Args:
        state: before the round.
        plan: the run's plan.
        order: what `configure_train` built.
        cohort: names of the nodes that were asked, by node id; "" where the engine keeps no names.
        replies: the node that was asked, and its reply, as they arrive; each is dropped once it has been added, but
            by an aggregator that buffers.

    Returns:
        The next state and the journal's record of the round. Below the plan's quorum the meta-parameters and
        the optimizer stay as they were, and the record says so.

    """
    tally = Tally()
    outer = plan.outer
    aggregator = aggregator_for(outer)
    folded = aggregator.init(order.meta_params)
    norms: dict[str, float] = {}
    prior = state.prior
    for report in _admitted(tally, replies, state, plan, order, cohort):
        folded = aggregator.add(
            folded, report.update, report.declared_size if outer.weighting == "declared_size" else 1
        )
        norms[report.institution] = update_norm(report.update)
        prior = prior_sums.add(prior, plan, order.round, report.institution, report.update)
    norms = dict(sorted(norms.items()))
    rate = rate_at(outer, order.round)
    quorum = folded.count >= outer.min_reports
    update: Params = aggregator.result(folded) if quorum else {}
    after = end_round(state, plan, order.round, update if quorum else None, tally.sizes.values())
    after = remember_ledgers(remember_sizes(replace(after, prior=prior), tally.sizes), tally.ledgers)
    record = {
        "round": order.round,
        "cohort": len(cohort),
        "admitted": sorted(tally.receipts),
        "refused": dict(sorted(tally.refused.items())),
        "rejected": dict(sorted(tally.rejected.items())),
        "absent": tally.absent(cohort),
        "quorum": quorum,
        "mean_update_norm": float(np.mean(list(norms.values()))) if norms else None,
        "update_norms": norms,
        "aggregate_norm": l2_norm(update) if quorum else None,
        "server_learning_rate": rate,
        "order_digest": order.digest(),
        **_aggregation(outer, norms),
        **_at_the_end(after, plan),
    }
    return after, record


def _aggregation(outer: OuterLoop, norms: Mapping[str, float]) -> dict[str, Any]:
    """What the journal says of an aggregator other than the mean, and of whom it held back."""
    if outer.aggregator == "mean":
        return {}
    said: dict[str, Any] = {"aggregator": outer.aggregator}
    if outer.max_update_norm is not None:
        said["bounded"] = [name for name, norm in norms.items() if norm > outer.max_update_norm]
    if outer.aggregator == "trimmed_mean":
        said["cut_at_each_end"] = cut_of(outer.trim, len(norms))
    return said


def _at_the_end(after: ServerState, plan: Plan) -> dict[str, Any]:
    """What the last round's record says of the whole run: over how many rounds its result is a mean, and the prior."""
    if after.round < plan.outer.rounds:
        return {}
    said: dict[str, Any] = {"averaged_rounds": int(after.tail["rounds"])} if after.tail else {}
    if plan.outer.learn_prior:
        learned = prior_sums.result(after.prior, plan, after.declared_sizes, after.meta_params)
        said["learned_prior"] = None if learned is None else learned.to_json()
    return said


def aggregate_evaluate(
    state: ServerState,
    plan: Plan,
    order: EvaluateOrder,
    cohort: Mapping[int, str],
    replies: Iterable[tuple[int, Message]],
) -> tuple[ServerState, dict[str, Any]]:
    """Sum the banks' score histograms and judge the meta-parameters by them.

    Returns:
        The state with what was heard of the ledgers, and what the journal keeps: the summed histograms, and AUC, KS
        and calibration where the noise leaves enough to tell. Below the plan's quorum no histogram is kept.

    """
    if plan.metrics is None:
        raise ValueError("the plan asks for no score histograms")
    tally = Tally()
    total: Params = {name: np.zeros(plan.metrics.bins) for name in (POSITIVES, NEGATIVES)}
    for report in _admitted(tally, replies, state, plan, order, cohort):
        total = add(total, report.update)
    std = plan.metrics.noise_multiplier * plan.data.max_records_per_unit * math.sqrt(len(tally.receipts))
    quorum = len(tally.receipts) >= plan.outer.min_reports
    found = summarise(total, noise_std=std, base_rate=plan.model.base_rate) if quorum else None
    record: dict[str, Any] = {
        "admitted": sorted(tally.receipts),
        "refused": dict(sorted(tally.refused.items())),
        "rejected": dict(sorted(tally.rejected.items())),
        "absent": tally.absent(cohort),
        "quorum": quorum,
        "noise_std": std,
        "histograms": {name: [round(float(value), 3) for value in total[name]] for name in total} if quorum else None,
    }
    if found is not None:
        record |= {
            "auc": found.auc,
            "auc_noise_std": found.auc_noise_std,
            "ks": found.ks,
            "base_rate": found.base_rate,
            "expected": [float(value) for value in found.expected],
            "observed": [None if math.isnan(value) else float(value) for value in found.observed],
        }
    return remember_ledgers(state, tally.ledgers), record


def _admitted(
    tally: Tally,
    replies: Iterable[tuple[int, Message]],
    state: ServerState,
    plan: Plan,
    order: TrainOrder,
    cohort: Mapping[int, str],
) -> Iterator[TrainReport]:
    """Yield the reports that are admitted, one at a time, and note in the tally what became of every reply."""
    for node, message in replies:
        if node not in cohort:
            tally.rejected[str(node)] = "node"
            continue
        if node in tally.answered:
            # The first answer counts, whatever became of it.
            tally.rejected.setdefault(cohort[node] or str(node), "duplicate")
            continue
        report = _judged(tally, node, message, state, plan, order, cohort)
        if report is not None:
            tally.receipts[report.institution] = report.receipt
            tally.sizes[report.institution] = report.declared_size
            tally.ledgers[report.institution] = (report.counter, report.receipt)
            yield report


def _judged(
    tally: Tally,
    node: int,
    message: Message,
    state: ServerState,
    plan: Plan,
    order: TrainOrder,
    cohort: Mapping[int, str],
) -> TrainReport | None:
    name = cohort[node] or str(node)
    tally.answered.add(node)
    if message.has_error():
        # Flower's own failures; the text could have come from anywhere, so only the code is kept.
        tally.rejected[name] = f"flower-error-{message.error.code}"
        return None
    try:
        reply = decode_reply(message.content)
    except ProtocolError:
        tally.rejected[name] = "protocol"
        return None
    if cohort[node] and reply.institution != cohort[node]:
        tally.rejected[name] = "name"
        return None
    if isinstance(reply, Refusal):
        tally.refused[reply.institution] = reply.code
        return None
    verdict = judge(
        reply, order, plan, admitted=tally.receipts, declared_sizes=state.declared_sizes, ledgers=state.ledgers
    )
    if verdict is not None:
        tally.rejected[name if verdict == "duplicate" else reply.institution] = verdict
        return None
    return reply

"""What must survive a crash of the server: one frozen value, which a checkpoint holds whole."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from metarisk_common.params import Params
from metarisk_common.plan import Plan

from .averaging import TailState, add_round, averaged
from .noise import mean_noise_variance
from .optimizers import OptimizerState, optimizer_for, rate_at
from .prior_sums import PriorSums


@dataclass(frozen=True)
class ServerState:
    """After `round` rounds: the meta-parameters and the optimizer's memory, all float64 arrays.

    `declared_sizes` remembers what each institution first declared: a size is a public constant, so a report
    that changes it is not admitted. `tail` and `prior` hold what the plan asks to be summed over the last rounds; see
    `averaging` and `prior_sums`. `ledgers` remembers the newest entry heard of each institution's ledger, its number
    and its digest, which later orders echo: a ledger that was put back to an older copy is found out.
    """

    run_id: str
    plan_hash: str
    round: int
    meta_params: Params
    optimizer_state: OptimizerState
    declared_sizes: dict[str, int] = field(default_factory=dict)
    ledgers: dict[str, tuple[int, str]] = field(default_factory=dict)
    tail: TailState = field(default_factory=dict)
    prior: PriorSums = field(default_factory=dict)


def initial_state(run_id: str, plan: Plan, meta_params: Params) -> ServerState:
    """State before the first round."""
    meta = {name: np.asarray(value, np.float64) for name, value in meta_params.items()}
    return ServerState(run_id, plan.hash(), 0, meta, optimizer_for(plan.outer).init(meta))


def end_round(
    state: ServerState, plan: Plan, round_number: int, update: Params | None, sizes: Collection[int]
) -> ServerState:
    """Give the state after a round: the optimizer's step, the tail's average, and that average once all is done.

    The federation and the vector engine both call it, so that they play the same rounds. It is post-processing of
    noised updates and costs no privacy.

    Args:
        state: before the round.
        plan: the run's plan.
        round_number: of this round, from 1.
        update: the round's aggregated update; None below the quorum, which leaves the meta-parameters as they are.
        sizes: declared sizes of the banks whose updates were aggregated.

    """
    outer, meta, optimizer_state = plan.outer, state.meta_params, state.optimizer_state
    if update is not None:
        known = mean_noise_variance(plan, sizes) if outer.subtract_noise else 0.0
        rate = rate_at(outer, round_number)
        optimizer_state, meta = optimizer_for(outer).apply(optimizer_state, meta, update, rate, known)
    tail = add_round(state.tail, outer, round_number, meta)
    if round_number == outer.rounds:
        meta = averaged(tail, meta)
    return replace(state, round=round_number, meta_params=meta, optimizer_state=optimizer_state, tail=tail)


def remember_sizes(state: ServerState, sizes: dict[str, int]) -> ServerState:
    """Keep first declarations; later ones are the same or were not admitted."""
    return replace(state, declared_sizes={**sizes, **state.declared_sizes})


def remember_ledgers(state: ServerState, heard: dict[str, tuple[int, str]]) -> ServerState:
    """Keep the newest entry of each institution's ledger."""
    return replace(state, ledgers={**state.ledgers, **heard})

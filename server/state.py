"""What must survive a crash of the server: one frozen value, which a checkpoint holds whole."""

from dataclasses import dataclass, field, replace

import numpy as np

from metarisk_common.params import Params
from metarisk_common.plan import Plan

from .optimizers import OptimizerState, optimizer_for


@dataclass(frozen=True)
class ServerState:
    """After `round` rounds: the meta-parameters and the optimizer's memory, all float64 arrays.

    `declared_sizes` remembers what each institution first declared: a size is a public constant, so a report
    that changes it is not admitted. `ledgers` remembers the newest entry heard of each institution's ledger, its number
    and its digest, which later orders echo: a ledger that was put back to an older copy is found out.
    """

    run_id: str
    plan_hash: str
    round: int
    meta_params: Params
    optimizer_state: OptimizerState
    declared_sizes: dict[str, int] = field(default_factory=dict)
    ledgers: dict[str, tuple[int, str]] = field(default_factory=dict)


def initial_state(run_id: str, plan: Plan, meta_params: Params) -> ServerState:
    """State before the first round."""
    meta = {name: np.asarray(value, np.float64) for name, value in meta_params.items()}
    return ServerState(run_id, plan.hash(), 0, meta, optimizer_for(plan.outer).init(meta))


def remember_sizes(state: ServerState, sizes: dict[str, int]) -> ServerState:
    """Keep first declarations; later ones are the same or were not admitted."""
    return replace(state, declared_sizes={**sizes, **state.declared_sizes})


def remember_ledgers(state: ServerState, heard: dict[str, tuple[int, str]]) -> ServerState:
    """Keep the newest entry of each institution's ledger."""
    return replace(state, ledgers={**state.ledgers, **heard})

"""A bank at work: its folder opened once, orders answered one after another.

The order of things is the contract: judge from public state, reserve on disk, only then read a record;
compute, store the report in the ledger's outbox, only then reply.
"""

import logging
from functools import lru_cache
from pathlib import Path

from flwr.app import RecordDict

from metarisk_common.errors import ConfigError, DataError, IntegrityError, MetariskError, ProtocolError, RefusedError
from metarisk_common.features import Encoder
from metarisk_common.plan import Plan
from metarisk_common.schema import Schema
from metarisk_common.tasks import Task
from metarisk_common.wire import (
    EvaluateOrder,
    EvaluateReport,
    Refusal,
    TrainOrder,
    TrainReport,
    decode_order,
    encode_reply,
    report_from_bytes,
    report_to_bytes,
)

from .approval import open_ledger
from .config import CONFIG_FILE, Institution, load_institution
from .dataset import Dataset, load_source
from .ledger import Ledger, OrderKey, Reservation
from .policy import admit
from .rng import SecureRandom
from .scoring import noised_histograms
from .training import meta_update, tasks_for

log = logging.getLogger("metarisk.client")


@lru_cache(maxsize=8)
def _encoder(schema: Schema) -> Encoder:
    return Encoder(schema)


class Bank:
    """An institution's folder with its ledger open; the table is read at the first order that is admitted.

    Not for use by several threads: SQLite's connection and Torch's modules belong to the one that opened it.
    """

    def __init__(self, folder: Path, *, simulation: bool = False) -> None:
        """Open the folder's configuration and ledger; only a simulation may open one whose noise is seeded.

        Raises:
            ConfigError: the configuration is missing or wrong, or seeds the noise outside a simulation.
            IntegrityError: the ledger is damaged or belongs to another data source.

        """
        self.institution: Institution = load_institution(folder)
        if self.institution.config.simulation is not None and not simulation:
            raise ConfigError(
                f"{folder / CONFIG_FILE}: section 'simulation' seeds the noise, which then protects nobody; "
                "remove it, for outside simulations no seed is accepted"
            )
        self.ledger: Ledger = open_ledger(self.institution)
        self._tasks: dict[str, list[Task]] = {}

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer an order with a report or a refusal; no exception and no text of one passes."""
        run_id, round_number, plan_hash = "", 0, ""
        try:
            order = decode_order(content)
            run_id, round_number, plan_hash = order.run_id, order.round, order.plan_hash
            return encode_reply(self.release(order))
        except RefusedError as error:
            code = error.code
            log.warning("order refused: %s", error)
        except ProtocolError as error:
            code = "protocol"
            log.warning("order not understood: %s", error)
        except IntegrityError as error:
            code = "integrity"
            log.error("stored state is not what was written: %s", error)  # noqa: TRY400 - the text says it all
        except MetariskError as error:
            code = "error"
            log.error("the order could not be answered: %s", error)  # noqa: TRY400 - as above
        except Exception as error:  # noqa: BLE001 - whatever went wrong, only a constant may leave the bank
            code = "error"
            log.error("the order could not be answered: %s", type(error).__name__)  # noqa: TRY400 - as above
        return encode_reply(Refusal(run_id, round_number, plan_hash, self.institution.config.name, code))

    def release(self, order: TrainOrder) -> TrainReport:
        """Admit, reserve, compute, store, and return the report.

        An order that was answered before gets the very report that was released then, which releases nothing
        new; one that was reserved but never released is computed under its old reservation.

        Raises:
            RefusedError: the policy, the ledger's approvals or the budget decline.
            IntegrityError: the ledger is not as it was written, or is not the newest one that the server knows of.
            DataError: the table does not fit the plan's schema; the reservation is charged all the same.

        """
        plan = self.institution.approved_plan(order.plan_hash)
        event = admit(order, plan, self.institution.config, width=_encoder(plan.data).width)
        self.ledger.check_echo(order.ledger_counter, order.ledger_receipt)
        kind = "evaluate" if isinstance(order, EvaluateOrder) else "train"
        key = OrderKey(order.run_id, order.round, order.plan_hash, order.digest(), kind)
        stored = self.ledger.released_report(key)
        if stored is not None:
            return report_from_bytes(stored)
        reservation = self.ledger.reserve(key, event)
        try:
            report = self._compute(order, plan, reservation)
        except DataError:
            self.ledger.abandon(reservation)
            raise
        try:
            self.ledger.release(reservation, report_to_bytes(report))
        except RefusedError:
            # Another process of this bank has released under the same reservation: only its report may leave.
            stored = self.ledger.released_report(key)
            if stored is None:
                raise
            return report_from_bytes(stored)
        return report

    def _compute(self, order: TrainOrder, plan: Plan, reservation: Reservation) -> TrainReport:
        config = self.institution.config
        tasks, width = self._tasks_for(plan), _encoder(plan.data).width
        rng = noise_source(self.institution, order)
        if isinstance(order, EvaluateOrder):
            released = noised_histograms(order.meta_params, plan, tasks, width=width, rng=rng)
        else:
            released = meta_update(
                order.meta_params, plan, tasks, declared_size=config.declared_size, width=width, rng=rng
            )
        return (EvaluateReport if isinstance(order, EvaluateOrder) else TrainReport)(
            run_id=order.run_id,
            round=order.round,
            plan_hash=order.plan_hash,
            institution=config.name,
            declared_size=config.declared_size,
            event=reservation.event,
            receipt=reservation.receipt,
            counter=reservation.seq,
            update=released,
        )

    def _tasks_for(self, plan: Plan) -> list[Task]:
        fingerprint = plan.hash()
        if fingerprint not in self._tasks:
            dataset: Dataset = load_source(self.institution, plan.data, drop_unfit=True)
            if dataset.dropped:
                rows = dataset.dropped + len(dataset.y)
                log.warning("%d of %d records do not fit the plan's schema and count as none", dataset.dropped, rows)
            self._tasks = {fingerprint: tasks_for(plan, dataset)}
        return self._tasks[fingerprint]


def noise_source(institution: Institution, order: TrainOrder) -> SecureRandom:
    """Fresh randomness from the system; in a simulation with a seed, a stream of its own for each bank and round."""
    simulation = institution.config.simulation
    if simulation is None:
        return SecureRandom.from_system()
    kind = ["evaluate"] if isinstance(order, EvaluateOrder) else []
    return SecureRandom.seeded(simulation.seed, institution.config.name, order.plan_hash, order.round, *kind)

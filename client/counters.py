"""What a bank's worker has answered so far, in `status.json` of the bank's folder, for whoever looks at the bank.

The worker alone writes it; the daemon, the command line and Prometheus read it. It holds counts, times and constants,
nothing of a record. It is no part of the privacy contract: what was spent stands in the ledger.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from metarisk_common.files import write_atomically
from metarisk_common.wire import REFUSAL_CODES

STATUS_FILE = "status.json"
OTHER = "other"
"""Stands for a code that is none of the constants which may leave a bank."""

log = logging.getLogger("metarisk.client")

_LONGEST_NAME: Final = 200

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Counters:
    """Counts since the folder was made.

    `answered`: orders answered with a report; `refused`: orders declined, by code; `errors`: orders that no reply
    could be made for; `last_*`: the newest of all these, how long it took and when it ended (since 1970, UTC; 0:
    never); `bundles_refused`: app bundles that were not run.
    """

    answered: Count = 0
    refused: dict[str, Count] = field(default_factory=dict)
    errors: Count = 0
    last_run: str = ""
    last_round: Count = 0
    last_answer_seconds: Seconds = 0.0
    last_answer_time: Seconds = 0.0
    bundles_refused: Count = 0


_FORMAT: Final = TypeAdapter(Counters)


def read_counters(folder: Path) -> Counters:
    """Read a bank's counters; a file that is missing, unreadable or damaged counts from zero."""
    try:
        return _FORMAT.validate_json((folder / STATUS_FILE).read_bytes(), strict=True)
    except (OSError, ValidationError):
        return Counters()


def count_answer(
    folder: Path,
    *,
    kind: Literal["report", "refusal", "error", "bundle"],
    code: str = "",
    run_id: str = "",
    round: int = 0,  # noqa: A002 - the word of the protocol
    seconds: float = 0.0,
    now: float,
) -> Counters:
    """Count one answer and write the counters down; for the one process that answers.

    A disk that is full stops no answer: the log says so, and this answer goes uncounted.

    Args:
        folder: the bank's folder.
        kind: what became of the order; "bundle" is an app bundle that was refused, which answers no order.
        code: of a refusal, one of `REFUSAL_CODES`; any other counts as `OTHER`.
        run_id: the run that asked, where the order could be read.
        round: its round.
        seconds: how long the answer took.
        now: when it was done, in seconds since 1970, UTC.

    Returns:
        The counters with this answer.

    """
    counters = read_counters(folder)
    if kind == "bundle":
        counters = replace(counters, bundles_refused=counters.bundles_refused + 1)
    else:
        if kind == "report":
            counters = replace(counters, answered=counters.answered + 1)
        elif kind == "refusal":
            known = code if code in REFUSAL_CODES else OTHER
            counters = replace(counters, refused={**counters.refused, known: counters.refused.get(known, 0) + 1})
        else:
            counters = replace(counters, errors=counters.errors + 1)
        counters = replace(
            counters,
            last_run=run_id[:_LONGEST_NAME],
            last_round=max(round, 0),
            last_answer_seconds=max(seconds, 0.0),
            last_answer_time=now,
        )
    try:
        write_atomically(folder / STATUS_FILE, _FORMAT.dump_json(counters, indent=1) + b"\n")
    except OSError as error:
        log.warning("%s could not be written, and an answer goes uncounted: %s", STATUS_FILE, error.strerror)
    return counters

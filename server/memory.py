"""What the consortium remembers of its banks from one run to the next."""

from collections.abc import Mapping
from pathlib import Path

from metarisk_common.errors import IntegrityError

from .checkpoint import load_checkpoint
from .rounds import CHECKPOINT


def ledgers_heard(runs: Path, heard: Mapping[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Find the newest entry that any run has heard of each bank's ledger, (counter, receipt).

    The first order of a new run echoes it, so a ledger that was put back to an older copy between two runs is found
    out. Runs with a damaged checkpoint are left out: they cannot be resumed either.

    Args:
        runs: folder with a folder for every run.
        heard: what is known already.

    """
    newest = dict(heard)
    for folder in sorted(runs.iterdir()):
        try:
            found = load_checkpoint(folder / CHECKPOINT)
        except IntegrityError:
            continue
        if found is not None:
            for name, entry in found[0].ledgers.items():
                newest[name] = max(newest.get(name, (0, "")), entry)
    return newest

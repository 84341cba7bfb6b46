"""Support and query of a task: which of a bank's records adapt a model, and which judge it, for good.

The side is a public rule on one privacy unit alone: a hash of the record, as the model sees it, and its label; of a
unit of several records, of its first one, and all of them go with it. No position, no count, no other unit and nothing
random enters. So a unit that is zeroed out, added or changed moves no other to the other side: support and query are
disjoint data sets, whose mechanisms compose in parallel, and a unit pays what its own side pays. The plan charges every
unit the support's steps, which are never fewer than the query's one. So even a record that is corrected between two
rounds, and may change sides by it, never pays more than is charged.

About half of the units fall on either side. How many do is private; what divides a gradient is half of the public
batch.
"""

from typing import Final

import numpy as np
import torch

from metarisk_common.tasks import Episode, Task

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def episode_of(task: Task) -> Episode[Task]:
    """Cut a task, of Torch tensors, into support and query; either may be empty.

    A side's privacy units are numbered anew, from 0 without gaps and in their old order.
    """
    judges = torch.from_numpy(on_query_side(task))
    return Episode(support=_part(task, ~judges), query=_part(task, judges))


def on_query_side(task: Task) -> np.ndarray:
    """Tell which records are on the query's side, (rows,) bool; the same for all records of a privacy unit."""
    # As encoded, whatever the plan's dtype; adding zero makes -0 and 0 one number.
    x, y = (np.asarray(value.cpu().numpy(), np.float32) + np.float32(0) for value in (task.x, task.y))
    words = np.ascontiguousarray(np.column_stack([x, y])).view(np.uint32)
    side = (_hashes(words) >> np.uint64(63)).astype(np.bool_)
    if task.unit is None:
        return side
    _, first, unit = np.unique(np.asarray(task.unit), return_index=True, return_inverse=True)
    of_units: np.ndarray = side[first][unit]
    return of_units


def _hashes(words: np.ndarray) -> np.ndarray:
    """Hash each row of (rows, words) uint32 to 64 bits.

    A sum of the words, each times an odd number of its own, keeps rows apart; SplitMix64's finisher (Steele, Lea and
    Flood 2014, figure 15) then makes every bit of the sum count for the first one.
    """
    with np.errstate(over="ignore"):
        factors = _finished(np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(_GOLDEN)) | np.uint64(1)
        total = np.zeros(len(words), np.uint64)
        for column, factor in zip(words.T, factors, strict=True):
            total += column.astype(np.uint64) * factor
        return _finished(total)


def _finished(value: np.ndarray) -> np.ndarray:
    for shift, factor in _MIX:
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def _part(task: Task, chosen: torch.Tensor) -> Task:
    unit = None
    if task.unit is not None:
        numbers = np.unique(np.asarray(task.unit)[chosen.numpy()], return_inverse=True)[1]
        unit = torch.from_numpy(numbers.astype(np.int64))
    chosen = chosen.to(task.x.device)
    return Task(task.institution, task.segment, task.x[chosen], task.y[chosen], unit)

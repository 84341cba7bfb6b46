"""Inputs that see several columns at once: the leaves of trees that were grown from public constants, not from records.

A scorecard is additive: what a loan's size means cannot depend on its year. Its inputs may, though, say which leaf of
a tree a record falls into, and a tree whose splits are drawn at random, from the schema's own bins and categories, has
seen no record and costs no privacy (totally randomised trees: Geurts, Ernst and Wehenkel 2006, "Extremely randomized
trees", section 2.2; that many of them are a kernel: Davies and Ghahramani 2014, "The Random Forest Kernel"). What is
learned is a weight for each leaf, so the model stays linear in its parameters: the same private gradients, the same
exact adaptation, the same exact contributions.

Nor does the number of leaves cost accuracy. A record's inputs have norm 1 at most however many there are, so what the
noise does to a score does not grow with them; the price is the share of that norm that the columns' own inputs give up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .schema import Interactions

INTERACTIONS: Final = "interactions"
"""Group of the leaves' inputs, beside the columns' names."""

_FEW_CATEGORIES: Final = 3


@dataclass(frozen=True)
class Splits:
    """How a column may be split, in public terms.

    `edges`: of a numeric column, the values at which it may be cut; `shares`: (edges + 1,) the public share of records
    in each stretch, or of a categorical column, which has no edges, in each category, "other" last. `texts`:
    for people, an edge or a category each.
    """

    name: str
    edges: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Question:
    """Asked of a record: whether its value is at or above the edge, or its category one of those chosen."""

    column: int
    edge: float
    chosen: npt.NDArray[np.bool_]
    share: float
    text: str

    def answer(self, position: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
        yes = self.chosen[position.astype(np.intp)] if len(self.chosen) else position >= self.edge
        return yes.astype(np.intp)


class RandomTrees:
    """Trees of one depth, each level asking one public question of a column of its own.

    Attributes:
        names: one for each leaf, for people.
        second_moment: (leaves,) float64, public, if columns were independent; sums to 1.

    """

    def __init__(self, splits: Sequence[Splits], spec: Interactions) -> None:
        """Draw the questions with the plan's public seed.

        Raises:
            ValueError: fewer columns can be split than a tree is deep.

        """
        usable = [index for index, each in enumerate(splits) if len(each.shares) > 1]
        if len(usable) < spec.depth:
            raise ValueError(f"encoding.interactions: trees of depth {spec.depth} need as many columns to split")
        random = np.random.default_rng(spec.seed)
        self._trees = [
            [_question(random, splits[index], index) for index in random.choice(usable, spec.depth, replace=False)]
            for _ in range(spec.trees)
        ]
        self._leaves = 2**spec.depth
        self._shares = np.array([_leaf_shares(tree) for tree in self._trees])
        # So that a record's expected squared norm is 1, as for the columns' own inputs.
        self._scale = 1 / np.sqrt(float((self._shares * (1 - self._shares)).sum()))
        self.second_moment = (self._shares * (1 - self._shares)).reshape(-1) * self._scale**2
        self.names = tuple(
            f"{INTERACTIONS} {number}.{leaf}: {_rule(tree, leaf)}"
            for number, tree in enumerate(self._trees, 1)
            for leaf in range(self._leaves)
        )

    def encode(self, positions: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
        """Encode records.

        Args:
            positions: for each column (rows,): a numeric one's values, a categorical one's codes.

        Returns:
            (rows, leaves) inputs, centred by their public mean, each row of norm at most 1.

        """
        rows = len(positions[0])
        inputs = np.empty((rows, len(self._trees) * self._leaves), np.float32)
        at = np.arange(rows)
        squares = np.zeros(rows)
        for number, (tree, shares) in enumerate(zip(self._trees, self._shares, strict=True)):
            leaf = np.zeros(rows, np.intp)
            for question in tree:
                leaf = 2 * leaf + question.answer(positions[question.column])
            start = number * self._leaves
            inputs[:, start : start + self._leaves] = -shares * self._scale
            inputs[at, start + leaf] += np.float32(self._scale)
            # |e_leaf - shares|^2, in closed form: the same whatever rows stand by it.
            squares += 1 - 2 * shares[leaf] + float(shares @ shares)
        norms = np.sqrt(squares) * self._scale
        inputs /= np.maximum(norms, 1.0).astype(np.float32)[:, None]
        return inputs


def _question(random: np.random.Generator, splits: Splits, column: int) -> _Question:
    """Draw a cut with odds that favour even ones; of many categories, any half of them."""
    if len(splits.edges):
        above = 1 - np.cumsum(splits.shares)[:-1]
        odds = np.maximum(above * (1 - above), 0)
        place = int(random.choice(len(above), p=odds / odds.sum()))
        text = f"{splits.name} from {splits.texts[place]}"
        return _Question(column, float(splits.edges[place]), np.empty(0, bool), float(above[place]), text)
    count = len(splits.shares)
    if count <= _FEW_CATEGORIES + 1:
        odds = np.maximum(splits.shares * (1 - splits.shares), 0)
        picked = [int(random.choice(count, p=odds / odds.sum()))]
    else:
        picked = [int(each) for each in random.permutation(count)[: count // 2]]
    chosen = np.zeros(count, bool)
    chosen[picked] = True
    text = f"{splits.name} in {', '.join(splits.texts[index] for index in sorted(picked))}"
    return _Question(column, 0.0, chosen, float(splits.shares[chosen].sum()), text)


def _leaf_shares(tree: Sequence[_Question]) -> npt.NDArray[np.float64]:
    shares = np.ones(1)
    for question in tree:
        shares = np.stack([shares * (1 - question.share), shares * question.share], axis=1).reshape(-1)
    return shares


def _rule(tree: Sequence[_Question], leaf: int) -> str:
    bits = [(leaf >> (len(tree) - 1 - level)) & 1 for level in range(len(tree))]
    return "; ".join(question.text if bit else f"not {question.text}" for question, bit in zip(tree, bits, strict=True))

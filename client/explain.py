"""Why a record has its score: what each column of the table contributes to the logit, against a public reference.

The reference is the record whose every input is at its public mean, where the encoder centres it: x = 0 but for the
constant intercept. Contributions are of *table* columns: inputs that are read from the same ones (a year as a number
and as a category) make one reason, for a person sees one fact.

    sum of contributions = logit(record) - logit(reference)

Scorecard: a column contributes the sum of weight * input over its inputs, exactly. Mlp: integrated gradients
(Sundararajan et al. 2017, equation 3) along the straight line from the reference, by Captum, with Gauss-Legendre
points; that the sum holds (completeness, their proposition 1) is checked for every record, with more points until it
does.

A reason is a column that raises the risk noticeably; the four that raise it most are given. How far to trust one is its
stability: the share of the model's draws, adaptations to halves of the same labels, that have it among their own four.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor

from metarisk_common.errors import MetariskError
from metarisk_common.features import Encoder
from metarisk_common.interactions import INTERACTIONS
from metarisk_common.models import build, forward, to_tensors
from metarisk_common.params import Params
from metarisk_common.plan import ModelSpec
from metarisk_common.schema import Schema

from .artifacts import Model

MOST_REASONS: Final = 4

LEAST_REASON: Final = 0.01
"""In logits: what moves the odds by less than a hundredth is no reason to give to anybody."""

_LEAST_POINTS, _MOST_POINTS = 8, 2048
_COMPLETE: Final = 1e-6
"""How far contributions may be from the logit's difference, on its own scale and on that of 1."""
_POINTS_AT_ONCE: Final = 2**14

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """The columns of the table, as reasons are given: each is one or more columns of the schema.

    Attributes:
        columns: for each fact, positions of its columns in the schema; of the leaves of `encoding.interactions`, which
            each ask several columns, none: together they are the last fact.
        of_input: (width,) which fact each input belongs to; of the intercept, the number of facts.
        reference: (width,) float64 inputs of the reference.

    """

    columns: tuple[tuple[int, ...], ...]
    of_input: npt.NDArray[np.int64]
    reference: Matrix

    @classmethod
    def of(cls, schema: Schema, encoder: Encoder) -> Self:
        """Group a schema's columns by the columns of the table that they are read from."""
        by_source: dict[tuple[str, ...], list[int]] = {}
        for position, column in enumerate(schema.columns):
            by_source.setdefault(tuple(sorted(column.sources)), []).append(position)
        fact_of = {
            schema.columns[position].name: fact
            for fact, positions in enumerate(by_source.values())
            for position in positions
        }
        columns = tuple(map(tuple, by_source.values()))
        if INTERACTIONS in encoder.groups:
            fact_of[INTERACTIONS] = len(columns)
            columns = (*columns, ())
        of_input = np.array([fact_of[group] for group in encoder.groups[:-1]] + [len(columns)], np.int64)
        reference = np.zeros(encoder.width)
        reference[-1] = np.float32(schema.encoding.intercept)  # as the encoder gives it
        return cls(columns, of_input, reference)


@dataclass(frozen=True)
class Explained:
    """What made the scores of some records.

    Attributes:
        reference: logit of the reference.
        contributions: (rows, facts) float64, in logits.
        reasons: (rows, `MOST_REASONS`) which facts raise the risk most, the most first; -1 where no more do.
        stability: (rows, `MOST_REASONS`) share of the draws with the same reason among theirs; NaN without draws.

    """

    reference: float
    contributions: Matrix
    reasons: npt.NDArray[np.int64]
    stability: Matrix

    @property
    def logits(self) -> Matrix:
        """Logits of the records, `(rows,)`: the reference's and all contributions."""
        return np.asarray(self.reference + self.contributions.sum(axis=1), np.float64)

    @property
    def probabilities(self) -> Matrix:
        """Probabilities of the bad outcome, `(rows,)`."""
        return np.asarray(expit(self.logits), np.float64)


def explain_rows(model: Model, facts: Facts, x: npt.NDArray[Any]) -> Explained:
    """Explain records.

    Args:
        model: the adapted model.
        facts: of its plan's schema.
        x: (rows, width) inputs, as the encoder gives them.

    Raises:
        MetariskError: the integral does not add up, which weights of ordinary size cannot cause.

    """
    spec = model.plan.model
    reference, contributions = attribute(spec, model.params, facts, x)
    reasons = top_reasons(contributions)
    agreed = np.zeros(reasons.shape)
    for draw in model.draws:
        others = top_reasons(attribute(spec, draw, facts, x)[1])
        agreed += (reasons[:, :, None] == others[:, None, :]).any(axis=2)
    stability = agreed / len(model.draws) if model.draws else np.full(reasons.shape, np.nan)
    return Explained(reference, contributions, reasons, np.where(reasons >= 0, stability, np.nan))


def attribute(spec: ModelSpec, params: Params, facts: Facts, x: npt.NDArray[Any]) -> tuple[float, Matrix]:
    """Give the reference's logit and the contributions of each fact to each record's, `(rows, facts)` float64."""
    rows, reference = np.asarray(x, np.float64), facts.reference
    if spec.kind == "scorecard":
        weights = np.asarray(params["points.weight"], np.float64).reshape(-1)
        base, terms = float(weights @ reference), (rows - reference) * weights
    else:
        base, terms = _integrated_gradients(spec, params, reference, rows)
    belongs = facts.of_input[:, None] == np.arange(len(facts.columns))
    return base, terms @ belongs.astype(np.float64)


def top_reasons(contributions: Matrix) -> npt.NDArray[np.int64]:
    """Give for each record the facts that raise the risk most, `(rows, MOST_REASONS)`; -1 where no more do."""
    order = np.argsort(-contributions, axis=1, kind="stable")[:, :MOST_REASONS]
    order = np.where(np.take_along_axis(contributions, order, axis=1) >= LEAST_REASON, order, -1)
    return np.pad(order, ((0, 0), (0, MOST_REASONS - order.shape[1])), constant_values=-1)


def _integrated_gradients(spec: ModelSpec, params: Params, reference: Matrix, rows: Matrix) -> tuple[float, Matrix]:
    """Integrate each record's gradient from the reference on: the reference's logit, and `(rows, width)` terms."""
    # Captum brings its plotting along, a second's loading that only an mlp's explanation needs.
    from captum.attr import IntegratedGradients  # noqa: PLC0415

    module = build(spec, rows.shape[1], "float64")
    tensors = to_tensors({name: np.asarray(value, np.float64) for name, value in params.items()})

    def logits(inputs: Tensor) -> Tensor:
        return forward(module, tensors, inputs)

    baseline = torch.from_numpy(reference)[None]
    base = float(logits(baseline))
    method = IntegratedGradients(logits, multiply_by_inputs=True)
    points = _LEAST_POINTS
    terms, wrong = np.zeros_like(rows), np.ones(len(rows), np.bool_)
    while wrong.any():
        if points > _MOST_POINTS:
            raise MetariskError(
                "a score cannot be explained: its integral does not add up; look at the model's weights"
            )
        parts = torch.split(torch.from_numpy(rows[wrong]), max(1, _POINTS_AT_ONCE // points))
        found = (method.attribute(part, baseline, n_steps=points, method="gausslegendre").numpy() for part in parts)
        terms[wrong] = np.concatenate(list(found))
        with torch.no_grad():
            difference = logits(torch.from_numpy(rows)).numpy() - base
        wrong = np.abs(terms.sum(axis=1) - difference) > _COMPLETE * (1 + np.abs(difference))
        points *= 2
    return base, terms

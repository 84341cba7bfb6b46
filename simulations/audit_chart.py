"""The chart of an audit: both distributions of scores, as they were measured and as the claim says they must be.

Classes: `k-federated` for canaries that are out, `k-local` for those that are in, `n1` for theory.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from metarisk_common.charts import Frame, Layout, Words, document, nice_ticks, path, tag, tick_texts

from .audit_statistics import Claim, Scores

_OUT, _IN = "k-federated", "k-local"
_TAIL = 0.001  # of either distribution may lie beyond the chart

Floats = NDArray[np.float64]


def densities(x: Floats, claim: Claim, strength: float) -> tuple[Floats, Floats]:
    """Give the densities at `x` of the scores of canaries that are out, and in, under the claim."""
    spread = math.sqrt(claim.steps) * claim.noise_multiplier
    times = np.arange(claim.steps + 1)
    weights = binom.pmf(times, claim.steps, claim.sample_rate)
    inside = norm.pdf(x[:, None], times * strength, spread) @ weights
    return np.asarray(norm.pdf(x, 0, spread)), np.asarray(inside)


def distributions(scores: Scores, claim: Claim, words: Words, layout: Layout) -> str:
    """Draw both histograms filled, both densities as dashed lines, and the threshold."""
    strength = float(scores.strength.mean())
    groups = {_OUT: scores.of(0), _IN: scores.of(1)}
    edges = _edges(groups[_OUT], groups[_IN], 56 if layout.wide else 32)
    fine = np.linspace(edges[0], edges[-1], 241)
    theory = dict(zip(groups, densities(fine, claim, strength), strict=True))
    counts = {style: np.histogram(values, edges)[0] for style, values in groups.items()}
    width = edges[1] - edges[0]
    curves = {style: theory[style] * len(values) * width for style, values in groups.items()}
    highest = max(float(values.max()) for values in (*counts.values(), *curves.values()))
    ticks = nice_ticks(0.0, highest * 1.02, 6)
    frame = Frame(46.0, layout.width - 12.0, 42.0, layout.height - 48.0, ticks)

    def x(score: float) -> float:
        return float(frame.left + (score - edges[0]) / (edges[-1] - edges[0]) * (frame.right - frame.left))

    parts = frame.axis(words)
    parts.extend(_x_ticks(edges, frame, x(0) - x(-1), layout))
    for style, values in counts.items():
        steps = [(x(edge), frame.y(count)) for edge, count in _steps(edges, values)]
        parts.append(tag("path", d=path(steps) + "Z", cls=f"band main {style}"))
        parts.append(tag("path", d=path(steps), cls=f"line leader {style}"))
    for style, values in curves.items():
        line = [(x(score), frame.y(value)) for score, value in zip(fine, values, strict=True)]
        parts.append(tag("path", d=path(line), cls=f"line n1 {style}"))
    threshold = claim.steps * claim.sample_rate * strength / 2
    at = x(threshold)
    parts.append(tag("line", x1=at, x2=at, y1=frame.top, y2=frame.bottom, cls="budget"))
    parts.append(tag("text", "called out", x=at - 8, y=frame.top - 8, cls="name end"))
    parts.append(tag("text", "called in", x=at + 8, y=frame.top - 8, cls="name"))
    return document(words, layout, layout.height, parts)


def _edges(outside: Floats, inside: Floats, bins: int) -> Floats:
    """Edges of even bins over nearly all of both samples."""
    both = np.quantile(outside, (_TAIL, 1 - _TAIL)), np.quantile(inside, (_TAIL, 1 - _TAIL))
    low, high = min(ends[0] for ends in both), max(ends[1] for ends in both)
    return np.linspace(low, high if high > low else low + 1, bins + 1)


def _steps(edges: Floats, counts: NDArray[np.int64]) -> Iterator[tuple[float, float]]:
    yield float(edges[0]), 0.0
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        yield float(low), float(count)
        yield float(high), float(count)
    yield float(edges[-1]), 0.0


def _x_ticks(edges: Floats, frame: Frame, scale: float, layout: Layout) -> list[str]:
    inner = [tick for tick in nice_ticks(edges[0], edges[-1], 8 if layout.wide else 5) if edges[0] <= tick <= edges[-1]]
    texts = tick_texts(inner)
    places = [frame.left + (tick - edges[0]) * scale for tick in inner]
    return [
        tag("text", text, x=float(place), y=frame.bottom + 20, cls="tick middle")
        for place, text in zip(places, texts, strict=True)
    ]

"""What is read of an audit: a page for people, lines for a terminal, JSON and a table of scores for programs.

The page holds its style and its charts, loads nothing and runs no script.
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import polars as pl

from metarisk_common.charts import Layout, Words
from metarisk_common.errors import ConfigError
from metarisk_common.files import write_atomically
from metarisk_common.pages import page_environment

from .audit import Audit, Request
from .audit_chart import distributions
from .audit_statistics import CHANCE, CONFIDENCE, Figures
from .findings import fixed, power
from .runfolder import PACKAGES

PAGE = "audit.html"
WIDE, NARROW = Layout("wide", 976, 430), Layout("narrow", 358, 320)

HEADLINES = {
    "PASS": "The attack found nothing against the claim of epsilon {epsilon:g}",
    "FALSIFIED": "The claim of epsilon {epsilon:g} is refuted",
    "INCONCLUSIVE": "This run tests nothing: it could neither refute nor support epsilon {epsilon:g}",
}

LIMITS = (
    (
        "The bound is a lower bound. A run can refute a claim, it cannot prove one: a leak too small for this many "
        "canaries to show stays unseen, and so does one that spares canaries of this kind."
    ),
    (
        "A clip that is too loose only for gradients of another shape than the canaries', which lie in one column of "
        "the first layer. The property tests of the sensitivity look for that."
    ),
    "Noise that looks random and can be predicted. That the generator is cryptographic, the code must show.",
    (
        "Whatever leaves by another way than the released numbers: timing, refusals or errors that depend on records, "
        "logs, the bank's own files and machine."
    ),
    (
        "Other plans, models, engines and devices than the one attacked, and releases of another kind, such as the "
        "score histograms of federated metrics."
    ),
)


def summary(audit: Audit) -> dict[str, Any]:
    """Give everything but the scores as plain values: the content of `audit.json`."""
    request, findings = audit.request, audit.findings
    return {
        "verdict": findings.verdict,
        "reasons": list(findings.reasons),
        "claim": asdict(findings.claim),
        "figures": asdict(findings.figures),
        "confidence": CONFIDENCE,
        "chance": CHANCE,
        "model": request.model,
        "rounds": request.rounds,
        "seed": request.seed,
        "banks": len(audit.scores.copies),
        "plan_hash": audit.plan.hash(),
        "versions": {package: version(package) for package in PACKAGES},
        "cannot_see": list(LIMITS),
    }


def lines(audit: Audit) -> list[str]:
    """Give the audit in a few lines for a terminal."""
    findings, figures, claim = audit.findings, audit.findings.figures, audit.findings.claim
    steps = f"{claim.steps} steps at rate {claim.sample_rate:g} with noise multiplier {claim.noise_multiplier:g}"
    banks = len(audit.scores.copies)
    planted = f"{figures.planted + figures.left_out} canaries in {banks} bank{'s' * (banks > 1)}, {figures.planted} in"
    shown = [
        f"{findings.verdict}: " + "; ".join(findings.reasons),
        "",
        f"claim        epsilon {claim.epsilon:g} at delta {power(claim.delta)}: {steps}",
        f"attack       {planted}: {figures.false_alarms:.1%} false alarms, {figures.misses:.1%} missed",
        f"bound        epsilon is at least {figures.bound:.2f}, at {CONFIDENCE:.0%} confidence for each rate",
    ]
    shown += [*_measured(figures), "", "What an audit cannot see:"]
    shown += [f"- {limit}" for limit in LIMITS]
    return shown


def write(audit: Audit, *, created: str) -> None:
    """Write `audit.json`, `scores.parquet` and `audit.html` into the audit's folder.

    Args:
        audit: what was found.
        created: ISO 8601 text.

    Raises:
        ConfigError: a file cannot be written.

    """
    folder = audit.request.folder
    try:
        write_atomically(folder / "plan.json", audit.plan.to_json().encode())
        write_atomically(folder / "audit.json", json.dumps(summary(audit), indent=1, allow_nan=False).encode())
        _score_table(audit).write_parquet(folder / "scores.parquet")
        write_atomically(folder / PAGE, render(audit, created=created).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: the audit's files cannot be written: {error.strerror}") from None


def render(audit: Audit, *, created: str) -> str:
    """Return the HTML of an audit; the same values give the same text."""
    environment = page_environment()
    environment.filters.update(fixed=fixed, power=power, chance=_chance)
    template = environment.from_string(files(__package__).joinpath("audit.html.j2").read_text(encoding="utf-8"))
    claim = audit.findings.claim
    return template.render(
        audit=audit,
        findings=audit.findings,
        figures=audit.findings.figures,
        claim=claim,
        headline=HEADLINES[audit.findings.verdict].format(epsilon=claim.epsilon),
        limits=LIMITS,
        confidence=CONFIDENCE,
        chance=CHANCE,
        charts="\n".join(distributions(audit.scores, claim, _words(audit), layout) for layout in (WIDE, NARROW)),
        versions={package: version(package) for package in PACKAGES},
        created=created,
        command=_command(audit.request),
    )


def _command(request: Request) -> str:
    """Give what repeats the audit: the same coins, with noise of its own."""
    return (
        f"metarisk-simulate audit --epsilon {request.epsilon:g} --delta {power(request.delta)} "
        f"--canaries {request.canaries} --model {request.model} --rounds {request.rounds} --seed {request.seed}"
    )


def _words(audit: Audit) -> Words:
    figures = audit.findings.figures
    return Words(
        "scores", "Scores of canaries that are out and in",
        f"{figures.left_out} canaries are out and {figures.planted} in. Of those out {figures.false_alarms:.1%} score "
        f"above the threshold of {figures.threshold:.2f}, of those in {figures.misses:.1%} do not.",
        "score, in clip norms", "canaries in a bin",
    )  # fmt: skip


def _measured(figures: Figures) -> list[str]:
    """One line for each calibration."""
    named = (
        ("noise", figures.noise, "of the plan's standard deviation"),
        ("shift", figures.shift, "of what the plan lets one record move a release"),
        ("correlation", figures.between_rounds, "between the noise of two releases"),
        ("", figures.between_columns, "between the noise of two columns of a release"),
    )
    return [
        f"{name:12} {fixed(found.value)} {what}; expected {found.expected:g}, give or take {fixed(found.error)}"
        for name, found, what in named
        if found is not None
    ]


def _chance(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-") if value > CHANCE else "under 1e-6"  # noqa: PLR2004


def _score_table(audit: Audit) -> pl.DataFrame:
    """One row a bank and mark: how many records bear it, and what it scored in each round."""
    scores = audit.scores
    banks, rounds, marks = scores.values.shape
    columns = {
        "bank": [bank + 1 for bank in range(banks) for _ in range(marks)],
        "mark": list(range(marks)) * banks,
        "copies": scores.copies.ravel(),
        "strength": list(scores.strength) * banks,
        "orientation": list(scores.orientation) * banks,
    }
    per_round = {f"round {index + 1}": scores.values[:, index].ravel() for index in range(rounds)}
    return pl.DataFrame(columns | per_round)

"""One record's explanation as a page for people: one HTML file that loads nothing and runs no script.

Every text that comes from data is escaped. The words live in `explanation.html.j2`.
"""

from importlib.resources import files
from typing import Final

from metarisk_common.charts import MINUS, tag
from metarisk_common.pages import page_environment

from .artifacts import Model
from .explanation import Contribution, Explanation

_WIDTH, _HEIGHT = 240, 16
_LEAST: Final = 1.0  # pixels: what is not zero can be seen


def render(explanation: Explanation, model: Model) -> str:
    """Return the page of an explanation; the same values give the same text."""
    environment = page_environment()
    environment.filters.update(signed=signed, percent=percent)
    template = environment.from_string(files(__package__).joinpath("explanation.html.j2").read_text(encoding="utf-8"))
    most = max((abs(part.points) for part in explanation.columns), default=0.0)
    manifest = model.manifest
    return template.render(
        e=explanation,
        manifest=manifest,
        plan=model.plan,
        outcome=model.plan.data.label.title or model.plan.data.label.name,
        bars=[_bar(part, most) for part in explanation.columns],
    )


def signed(value: float) -> str:
    """Write points with their sign: +12.3."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def percent(value: float) -> str:
    """Write a share: 12.3%."""
    return f"{100 * value:.1f}%"


def _bar(part: Contribution, most: float) -> str:
    """Draw a column's points as a bar from the middle, to the left where they are taken off."""
    middle = _WIDTH / 2
    width = 0.0 if most == 0 or part.points == 0 else max(_LEAST, abs(part.points) / most * middle)
    left = middle - width if part.points < 0 else middle
    style = "bar loses" if part.points < 0 else "bar"
    rect = tag("rect", x=left, y=2, width=width, height=_HEIGHT - 4, cls=style)
    line = tag("line", x1=middle, x2=middle, y1=0, y2=_HEIGHT, cls="zero")
    return f'<svg class="strip" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">{rect}{line}</svg>'

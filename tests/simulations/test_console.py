"""The terminal: every lender's epsilon, a table that fits, a bar on terminals only."""

import io
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulations.console import NAME_CELLS, RoundProgress, differences_table, privacy_lines, results_table


def shown(value: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(value)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def estimate(mean: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"auc": {"mean": mean, "ci95": [low, high]}, "institutions": 20}


def metrics() -> Any:
    kinds = {"pooled-lightgbm": "pooled", "local-logistic": "local", "dp-joint": "federated", "dp-reptile": "federated"}
    return {
        "ks": [0, 20, 50, 100, 200],
        "draws": 10,
        "methods": {
            name: {"title": f"[b]{name}[/b], a method", "kind": kind, "private": name.startswith("dp")}
            for name, kind in kinds.items()
        },
        "summary": {
            name: {str(k): estimate(0.69 + k / 1e4, 0.67 + k / 1e4, 0.71 + k / 1e4) for k in (0, 20, 50, 100, 200)}
            for name in kinds
            if name != "local-logistic"
        }
        | {
            "local-logistic": {
                "20": estimate(0.571, 0.5, 0.6),
                "50": estimate(math.nan, None, None),
                "100": estimate(0.6, None, None),
            }
        },
        "paired": [],
        "gain_by_institution": None,
        "share_harmed": {},
    }


def privacy(accounts: dict[str, float], budget: float = 3.0) -> Any:
    lenders = {name: {"spent": spent, "declared_size": 500, "entries": 20} for name, spent in accounts.items()}
    return {"epsilon_budget": budget, "delta": 1e-5, "unit": "one record of one institution", "by_institution": lenders}


def test_table_shows_every_mean_with_its_interval_main_method_first() -> None:
    lines = shown(results_table(metrics(), "dp-reptile")).splitlines()
    rows = [
        line.split()[0].removeprefix("[b]").removesuffix("[/b],") for line in lines if line.lstrip().startswith("[b]")
    ]
    assert rows == ["dp-reptile", "dp-joint", "local-logistic", "pooled-lightgbm"]
    main = next(index for index, line in enumerate(lines) if "dp-reptile" in line)
    assert lines[main].split()[-5:] == ["0.690", "0.692", "0.695", "0.700", "0.710"]
    assert lines[main + 1].split() == ["\u00b10.020"] * 5


def test_table_shows_uneven_and_missing_intervals_as_they_are() -> None:
    lines = shown(results_table(metrics(), "dp-reptile")).splitlines()
    local = next(index for index, line in enumerate(lines) if "local-logistic" in line)
    assert lines[local].split()[-5:] == ["\u2013", "0.571", "\u2013", "0.600", "\u2013"]
    assert lines[local + 1].split() == ["0.500\u20130.600", "\u2013"]
    assert "nan" not in "\n".join(lines)


def test_table_fits_a_terminal() -> None:
    for width in (80, 100):
        text = shown(results_table(metrics(), "dp-reptile"), width)
        assert max(map(len, text.splitlines())) <= width
        assert "\u2026" not in text


def test_differences_are_those_of_the_k_that_gains_are_shown_at() -> None:
    values: Any = metrics()
    names = list(values["methods"])
    main, other = names[0], names[1]
    pair = {"method": main, "baseline": other, "mean": -0.0123, "ci95": [-0.02, -0.004], "wins": 3, "losses": 17}
    values["paired"] = [{**pair, "k": 50}, {**pair, "k": 20, "mean": 0.5}]
    values["gain_by_institution"] = {"k": 50, "baseline": other, "method": main, "gains": {}}
    text = shown(differences_table(values, main))
    assert values["methods"][other]["title"] in text
    assert "\u22120.0123" in text
    assert "\u22120.0200 to \u22120.0040" in text
    assert "0.5000" not in text
    values["paired"] = []
    assert differences_table(values, main) is None


def test_every_lender_is_named_with_its_own_epsilon() -> None:
    accounts = {f"Bank {index}": 2 + index / 100 for index in range(59)}
    text = shown(privacy_lines(privacy(accounts)), 200)
    body = text.split("one record of one institution")[1].split()
    for name, spent in accounts.items():
        at = next(i for i in range(len(body)) if body[i : i + 2] == name.split())
        assert float(body[at + 2]) == pytest.approx(spent)
    assert "epsilon spent of 3 by 59 lenders" in text
    assert "from 2.00 (Bank 0) to 2.58 (Bank 58)" in text
    assert "each 3.00" in shown(privacy_lines(privacy({"A": 2.999, "B": 2.998})))


def test_long_names_are_cut_only_while_they_still_differ() -> None:
    cut = shown(privacy_lines(privacy({f"{index} {'x' * 60}": 1.0 for index in range(3)})), 120)
    assert "x" * (NAME_CELLS - 3) + "\u2026 1.00" in cut
    alike = shown(privacy_lines(privacy({f"{'x' * 60} {index}": 1.0 for index in range(3)})), 120)
    assert all(f"{'x' * 60} {index} 1.00" in alike for index in range(3))


def test_names_are_text_not_markup() -> None:
    assert "[red]Bank[/red]" in shown(privacy_lines(privacy({"[red]Bank[/red]": 1.0})))


def test_epsilon_is_rounded_up_and_said_to_be_unbounded_without_noise() -> None:
    assert "A 2.01" in shown(privacy_lines(privacy({"A": 2.0001})))
    text = shown(privacy_lines(privacy({"A": math.inf}, budget=math.inf)))
    assert "no bound" in text
    assert "no lender has a ledger" in shown(privacy_lines(privacy({})))


def rounds(*, terminal: bool, quiet: bool = False, start: int = 0, total: int = 40) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    with RoundProgress(total, 3.0, quiet=quiet, console=console) as bar:
        bar.update(start, None, 0.0)
        for done in range(start + 1, total + 1):
            bar.update(done, 0.125, 3.0 * done / total)
    return file.getvalue()


def test_bar_on_a_terminal_shows_round_norm_and_epsilon() -> None:
    text = rounds(terminal=True)
    assert "round 40 of 40" in text
    assert "update norm 0.125, epsilon 3.00 of 3.00" in text


def test_elsewhere_a_line_a_tenth_and_no_control_characters() -> None:
    lines = rounds(terminal=False).splitlines()
    assert len(lines) == 10
    assert lines[0] == "round 4 of 40: update norm 0.125, epsilon 0.30 of 3.00"
    assert "\x1b" not in "".join(lines)
    assert rounds(terminal=False, start=20).splitlines()[0].startswith("round 24 of 40")


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(*, terminal: bool) -> None:
    assert not rounds(terminal=terminal, quiet=True)


def test_default_output_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with RoundProgress(1, math.inf) as bar:
        bar.update(0, None, 0.0)
        bar.update(1, 0.5, math.inf)
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err == "round 1 of 1: update norm 0.500, no privacy\n"


def _interrupted(console: Console) -> None:
    with RoundProgress(5, 3.0, console=console) as bar:
        bar.update(2, 0.1, 1.0)
        raise KeyboardInterrupt


def test_an_interruption_passes_through_and_frees_the_terminal() -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(Console(file=file, force_terminal=True))
    assert file.getvalue().endswith("\x1b[?25h")


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1), st.floats(0, 9), min_size=1
    )
)
def test_any_names_and_numbers_can_be_shown(accounts: dict[str, float]) -> None:
    assert f"by {len(accounts)} lenders" in shown(privacy_lines(privacy(accounts)), 300)

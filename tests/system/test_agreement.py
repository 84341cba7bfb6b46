"""One epsilon, whoever tells it: the run, the ledger, the statement, and an accountant that we did not write."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant

from client.cli import app as client_app
from simulations.cli import app

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def sampled_run(tmp_path_factory: pytest.TempPathFactory, make_scenario: Callable[..., Path], call: Call) -> Path:
    """A run of sampled steps with score histograms: two mechanisms in one ledger."""
    folder = tmp_path_factory.mktemp("agreement")
    metrics = "[metrics]\nnoise_multiplier = 9.0\nevery = 2\n\n[splits]"
    replace = {"rounds = 12": "rounds = 3", "epsilon = 4.0": "epsilon = 4.0\nsample_rate = 0.25", "[splits]": metrics}
    scenario = make_scenario(folder, replace=replace)
    code, _, err = call(app, "run", scenario, "--out", folder / "run", "--workers", 0, "--json")
    assert (code, err) == (0, "")
    return folder / "run"


@pytest.mark.parametrize("which", ["sampled_run", "finished_run"])
def test_every_place_that_tells_epsilon_tells_the_same(which: str, call: Call, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(which)
    answer = json.loads(call(app, "run", "--resume", "--out", run, "--json")[1])
    shown = call(app, "run", "--resume", "--out", run)[1]
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for name, folder in list(told["banks"].items())[:2]:
        bank = run / "banks" / folder
        by_run = answer["privacy"]["by_institution"][name]["spent"]
        by_ledger = json.loads(call(client_app, "ledger", "show", bank, "--json")[1])["spent"]
        export = json.loads(call(client_app, "ledger", "export", bank, "--json")[1])
        accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
        for event in export["events"]:
            step = dp_event.GaussianDpEvent(event["noise_multiplier"])
            drawn = dp_event.PoissonSampledDpEvent(event["sample_rate"], step)
            accountant.compose(dp_event.SelfComposedDpEvent(drawn, event["steps"]))
        by_others = accountant.get_epsilon(export["budget"]["delta"])
        assert by_run == pytest.approx(by_others, abs=1e-3)
        assert by_ledger == pytest.approx(by_others, abs=1e-3)
        assert export["spent"] == pytest.approx(by_others, abs=1e-3)
        assert f"{name} 4.00" in " ".join(shown.split())
        assert 3.995 < by_run <= 4

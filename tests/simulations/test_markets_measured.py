"""A volatility run is measured as its field asks: retransformed, against own past means, by classes of assets."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from simulations import results
from simulations.pipeline import judged_by
from simulations.runfolder import prepare
from simulations.scenarios import Scenario, Splits, built_in, load_scenario


def table() -> pl.DataFrame:
    random = np.random.default_rng(1)
    names = [f"log_variance_{window}" for window in (1, 5, 22, 66)]
    tables = []
    for desk, kind in (("Desk 1", "stocks"), ("Desk 2", "bonds"), ("S", "stocks"), ("B", "bonds")):
        columns = {name: random.normal(-8.5, 1.0, 600) for name in names}
        target = sum(columns.values()) / 4 + random.normal(0.0, 0.8, 600)
        known = {"har_all": target, "har_all_half_variance": np.full(600, 0.1), "own_mean": np.full(600, -8.5)}
        names_of = {"desk": [desk] * 600, "asset_class": [kind] * 600, "session": np.arange(600.0)}
        tables.append(pl.DataFrame({**names_of, **columns, "log_variance": target, **known}))
    return pl.concat(tables)


def test_a_run_is_measured_by_class_and_retransformed(tmp_path: Path) -> None:
    scenario = load_scenario(built_in("volatility"))
    scenario = Scenario.model_validate({**scenario.model_dump(by_alias=True), "splits": Splits(unseen=("S", "B"))})
    run = prepare(tmp_path / "run", scenario, table(), where="prices", epsilon=None, engine="inprocess")
    assert judged_by(run) == "assets take no part"
    start = initial_params(run.plan, Encoder(run.plan.data).width)
    unseen = pl.read_parquet(run.path / "unseen.parquet")
    found = results.measure(run, {"meta": start}, unseen, where="unseen", ks=(0, 60), draws=1)
    assert [group["name"] for group in found.metrics["classes"]] == ["all", "bonds", "stocks"]
    assert found.metrics["classes"][0]["summary"] == found.metrics["summary"]
    # A forecast that is exact pays for what it says that it lies below.
    exact = found.metrics["summary"]["local-har_all"]["60"]
    assert exact["r2"]["mean"] == pytest.approx(1.0)
    assert exact["qlike"]["mean"] == pytest.approx(np.exp(-0.1) + 0.1 - 1)
    # The pooled regression's residuals are normal of deviation 0.8, so half their variance leaves the least QLIKE.
    pooled = found.metrics["summary"]["pooled-har"]["60"]
    assert pooled["qlike"]["mean"] == pytest.approx(0.32, abs=0.05)
    assert 0 < pooled["r2_own"]["mean"] < 1

"""A label that is a number, losses by specification, and adaptation of a model of a number."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from metarisk_common.adaptation import map_linear
from metarisk_common.adapters import adapt_params, predict
from metarisk_common.config import validate
from metarisk_common.errors import ConfigError, DataError
from metarisk_common.initialisation import initial_params
from metarisk_common.models import record_loss, record_losses
from metarisk_common.plan import Mechanism, ModelSpec, Plan
from metarisk_common.schema import NumericLabel, Schema
from metarisk_common.selection import choose_width
from metarisk_common.table import check_table, labels, usable_rows

NUMBER = {"kind": "numeric", "name": "y", "lower": -10.0, "upper": 10.0, "centre": 2.0, "scale": 4.0}
COLUMN = {"kind": "numeric", "name": "a", "lower": 0.0, "upper": 1.0}
SQUARED = ModelSpec(loss="squared")


def schema(label: dict[str, object] | None = None) -> Schema:
    return validate({"label": label or NUMBER, "institution": "bank", "columns": [COLUMN]}, Schema, where="test")


def plan(**update: object) -> Plan:
    parts = {"name": "n", "data": schema(), "model": SQUARED, "mechanism": Mechanism(noise_multiplier=1.0), **update}
    return validate(parts, Plan, where="test")


def test_a_number_is_clipped_to_its_bounds_and_standardised_by_public_constants() -> None:
    label = schema().label
    assert isinstance(label, NumericLabel)
    found = labels(pl.DataFrame({"y": ["2", "6", "1e9", "-1e9"]}), label, "t.csv")
    assert found.tolist() == [0.0, 1.0, 2.0, -3.0]
    assert found.dtype == np.float32


@pytest.mark.parametrize("bad", ["", "much", "inf"])
def test_a_cell_that_is_no_number_is_refused_and_counted_row_by_row(bad: str) -> None:
    frame = pl.DataFrame({"a": ["0", "0"], "y": ["1", bad]})
    with pytest.raises(DataError, match="column 'y'"):
        check_table(frame, schema(), "t.csv")
    assert usable_rows(frame, schema(), "t.csv").to_list() == [True, False]


@pytest.mark.parametrize(
    ("update", "key"),
    [
        ({"lower": 10.0}, "lower must be below upper"),
        ({"centre": 11.0}, "centre"),
        ({"scale": 0.0}, "label.scale"),
        ({"positive": 1}, "label.positive"),
        ({"kind": "text"}, "label.kind"),
    ],
)
def test_a_wrong_numeric_label_is_named_by_its_key(update: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        schema(NUMBER | update)


def test_what_knows_two_outcomes_only_says_so_of_a_number() -> None:
    assert schema().regression
    with pytest.raises(ConfigError, match="number to predict"):
        _ = schema().outcome


@pytest.mark.parametrize(
    ("update", "why"),
    [
        ({"model": ModelSpec()}, "squared"),
        ({"data": schema({"name": "y"})}, "squared"),
        ({"metrics": {"noise_multiplier": 1.0}}, "metrics"),
        ({"outer": {"learn_prior": True}}, "learn_prior"),
    ],
)
def test_a_plan_whose_loss_and_label_do_not_go_together_is_refused(update: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan(**update)


def test_the_hash_changes_with_each_constant_of_a_numeric_label_and_with_the_weight_of_positives() -> None:
    others = ({"upper": 11.0}, {"lower": -9.0}, {"centre": 1.5}, {"scale": 3.0}, {"unit": "logs"})
    found = {plan(data=schema(NUMBER | other)).hash() for other in others} | {plan().hash()}
    two = {"data": schema({"name": "y"})}
    found |= {plan(**two, model=ModelSpec(positive_weight=weight)).hash() for weight in (1.0, 20.0)}
    assert len(found) == len(others) + 3


def test_a_model_of_a_number_starts_at_its_centre() -> None:
    assert not np.any(initial_params(plan(), 5)["points.weight"])


def test_positives_count_as_often_as_said_and_the_best_logit_stays_the_true_one() -> None:
    """Of 1,000 records with 20 positives the loss is least at the logit of .02, whatever the public weight is."""
    y = torch.tensor([1.0] * 20 + [0.0] * 980, dtype=torch.float64)
    for weight in (1.0, 5.0, 49.0):
        loss = record_loss(ModelSpec(positive_weight=weight))
        logit = torch.full((1000,), math.log(0.02 / 0.98), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logit, y).sum(), logit)
        assert abs(float(gradient.sum())) < 1e-9
    even = record_loss(ModelSpec())
    assert torch.equal(even(logit.detach(), y), record_losses(logit.detach(), y))
    positive, negative = float(gradient[0]), float(gradient[-1])
    assert positive == pytest.approx(49 * -0.5)
    assert negative == pytest.approx(0.5)


def test_map_linear_is_ridge_regression_around_the_start() -> None:
    random = np.random.default_rng(3)
    for rows, width in ((4, 9), (30, 5)):
        x, y, w0 = random.normal(size=(rows, width)), random.normal(size=rows), random.normal(size=width)
        tau2 = random.uniform(0.1, 2.0, width)
        expected = np.linalg.solve(x.T @ x + np.diag(1 / tau2), x.T @ y + w0 / tau2)
        assert np.allclose(map_linear(w0, x, y, tau2=tau2), expected, atol=1e-10)
    assert np.array_equal(map_linear(w0, x[:0], y[:0]), w0)


def test_the_width_is_chosen_by_the_error_on_each_label_without_it() -> None:
    random = np.random.default_rng(5)
    x, w0 = random.normal(size=(40, 6)) / 3, np.zeros(6)
    y = x @ np.array([3.0, -2.0, 1.0, 0, 0, 0]) + 0.3 * random.normal(size=40)
    tau2, errors = choose_width(w0, x, y, (0.0, 0.1, 10.0))
    by_hand = []
    for row in range(40):
        rest = np.arange(40) != row
        by_hand.append((y[row] - x[row] @ map_linear(w0, x[rest], y[rest], tau2=10.0)) ** 2)
    assert errors["10"] == pytest.approx(np.mean(by_hand))
    assert tau2 == 10.0
    noise = random.normal(size=40)
    assert choose_width(w0, x, noise, (0.0, 10.0))[0] == 0.0


@pytest.mark.parametrize("method", ["none", "intercept", "head", "sgd", "prox", "auto"])
@pytest.mark.parametrize("kind", ["scorecard", "mlp"])
def test_adapting_a_model_of_a_number_lowers_its_error(kind: str, method: str) -> None:
    spec = SQUARED if kind == "scorecard" else ModelSpec(kind="mlp", hidden=(4,), loss="squared")
    random = np.random.default_rng(1)
    x = np.column_stack([random.normal(size=(200, 4)) / 3, np.full(200, 0.5)])
    y = 1.0 + x @ np.array([1.0, -1.0, 0.5, 0.0, 0.0]) + 0.1 * random.normal(size=200)
    start = initial_params(plan(model=spec), 5)
    adapted = adapt_params(spec, start, x[:100], y[:100], method=method, learning_rate=0.2)
    before, after = (np.square(predict(spec, p, x[100:]) - y[100:]).mean() for p in (start, adapted.params))
    assert after == before if method == "none" else after < before

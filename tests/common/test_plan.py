"""The plan's hash is what a bank approves: it must change with everything, and with nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from metarisk_common.errors import ConfigError
from metarisk_common.plan import InnerLoop, Mechanism, ModelSpec, OuterLoop, Plan, ScoreHistograms, read_plan
from metarisk_common.schema import CategoricalColumn, Encoding, Interactions, Label, NumericColumn, NumericLabel, Schema

FULL: dict[str, Any] = {
    "name": "test",
    "data": {
        "label": {"name": "default", "positive": "yes", "negative": "no", "title": "Defaulted"},
        "institution": "bank",
        "segment": "sector",
        "segments": ["trade", "crafts"],
        "identifier": "id",
        "privacy_unit": "customer",
        "max_records_per_unit": 3,
        "columns": [
            {
                "kind": "numeric", "name": "amount", "title": "Amount", "unit": "USD",
                "source": "sum", "divide_by": "n", "lower": 1, "upper": 100, "scale": "log",
                "bins": [10.0, 50.0], "shares": [0.5, 0.25, 0.2], "missing": "refuse",
            },
            {"kind": "categorical", "name": "state", "title": "State", "categories": ["a", "b"], "shares": [0.5, 0.25]},
        ],
        "encoding": {"variance_power": 0.5, "intercept": 0.5, "clip_standardised": 2.0},
    },
    "model": {"kind": "mlp", "hidden": [4, 3], "base_rate": 0.25, "init_seed": 5},
    "inner": {"algorithm": "reptile", "task": "institution", "local_steps": 3, "learning_rate": 0.5},
    "mechanism": {"sample_rate": 0.5, "max_grad_norm": 0.5, "noise_multiplier": 2.0, "delta": 1e-6},
    "outer": {
        "rounds": 7, "optimizer": "adam", "learning_rate": 0.5, "momentum": 0.5, "schedule": "linear",
        "weighting": "equal", "max_declared_size": 5000, "min_reports": 2, "deadline_seconds": 60.0,
        "aggregator": "norm_bounded_mean", "max_update_norm": 2.0,
    },
    "metrics": {"bins": 10, "noise_multiplier": 2.0, "every": 2},
    "dtype": "float64",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "name": "test",
    "data": {
        "label": {"name": "default"},
        "institution": "bank",
        "columns": [{"kind": "numeric", "name": "amount", "lower": 0, "upper": 1}],
    },
    "mechanism": {"noise_multiplier": 1.0},
}
PROX = {"algorithm": "prox", "prox_strength": 0.25}
CORRECTED = {
    "optimizer": "yogi", "subtract_noise": True, "learn_prior": True, "warmup_rounds": 2, "tail_averaging": 0.25,
}  # fmt: skip
INTERACTIONS = {"trees": 30, "depth": 2, "share": 0.25, "seed": 3, "leave_out": ["amount"]}
NUMBER = {"kind": "numeric", "title": "Y", "unit": "logs", "lower": 0.0, "upper": 5.0, "centre": 1.0, "scale": 2.0}
WEIGHTED = {"positive_weight": 20.0}
TRIMMED = {"weighting": "equal", "aggregator": "trimmed_mean", "trim": 0.25}
CHOICES = (
    "scorecard", "mlp", "reptile", "fedavg", "institution", "segment", "sgd", "momentum", "adam", "constant", "linear",
    "cosine", "declared_size", "equal", "float32", "float64", "log", "log1p", "indicator", "refuse", "numeric",
)  # fmt: skip
Place = tuple[str | int, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    if isinstance(value, list):
        items = list(enumerate(value))
    if not items:
        yield place, value
    for key, item in items:
        yield from leaves(item, (*place, key))


def changed(values: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(values))
    at: Any = copy
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    return copy


def other_values(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [*(choice for choice in CHOICES if choice != value), value + "x"]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 0.9]
    return [1.0, "x"]


def other_plans(place: Place, value: Any) -> list[Plan]:
    plans = []
    for other in other_values(value):
        try:
            plans.append(Plan.model_validate(changed(FULL, place, other)))
        except ValidationError:
            continue
    return plans


ALL = Plan.model_validate(FULL)
# Fields that have one legal value, or on which the presence of others depends; they are tested one by one below.
TIED = {
    ("protocol",), ("model", "kind"), ("data", "columns", 0, "kind"), ("data", "columns", 1, "kind"),
    ("outer", "aggregator"),
}  # fmt: skip
FREE = {place: value for place, value in leaves(ALL.model_dump(mode="json")) if place not in TIED}


@pytest.mark.parametrize(("place", "value"), FREE.items(), ids=lambda part: str(part)[:40])
def test_the_hash_changes_with(place: Place, value: Any) -> None:
    others = other_plans(place, value)
    assert others, "no other legal value was found: add one to CHOICES"
    assert all(other.hash() != ALL.hash() for other in others)


def test_no_field_was_forgotten() -> None:
    """Every field of every part of a plan is set above and stands in what is hashed."""
    models: list[type[BaseModel]] = [
        Plan, Schema, ModelSpec, InnerLoop, Mechanism, OuterLoop, ScoreHistograms, Label, NumericLabel,
        Encoding, Interactions, NumericColumn, CategoricalColumn,
    ]  # fmt: skip
    # No one aggregator, and no one algorithm, has use for every field.
    texts = (
        ALL.to_json(), of_outer(TRIMMED).to_json(), of_outer(CORRECTED).to_json(),
        Plan.model_validate({**SMALL, "inner": PROX}).to_json(), of_interactions(INTERACTIONS).to_json(),
        of_number(NUMBER).to_json(), Plan.model_validate({**SMALL, "model": WEIGHTED}).to_json(),
    )  # fmt: skip
    hashed = {str(part) for text in texts for place, _ in leaves(json.loads(text)) for part in place}
    assert {name for model in models for name in model.model_fields} <= hashed
    given = {place for place, _ in leaves(FULL)} | {("protocol",)}
    assert {place for place, _ in leaves(json.loads(ALL.to_json()))} == given


def of_outer(outer: dict[str, Any]) -> Plan:
    return Plan.model_validate({**SMALL, "outer": outer})


def of_number(label: dict[str, Any]) -> Plan:
    return Plan.model_validate(
        {**SMALL, "data": {**SMALL["data"], "label": {"name": "y", **label}}, "model": {"loss": "squared"}}
    )


def of_interactions(interactions: dict[str, Any]) -> Plan:
    return Plan.model_validate({**SMALL, "data": {**SMALL["data"], "encoding": {"interactions": interactions}}})


@pytest.mark.parametrize("name", INTERACTIONS)
def test_the_hash_changes_with_each_constant_of_the_trees(name: str) -> None:
    others = {key: value for key, value in INTERACTIONS.items() if key != name}
    assert (
        len({Plan.model_validate(SMALL).hash(), of_interactions(INTERACTIONS).hash(), of_interactions(others).hash()})
        == 3
    )


@pytest.mark.parametrize("name", CORRECTED)
def test_the_hash_changes_with_what_the_optimizer_is_told(name: str) -> None:
    without = {key: value for key, value in CORRECTED.items() if key != name}
    if name == "optimizer":
        without["optimizer"] = "adam"
    assert of_outer(CORRECTED).hash() != of_outer(without).hash()


def test_the_hash_changes_with_the_aggregator_and_what_it_is_told() -> None:
    outers: list[dict[str, Any]] = [
        {"weighting": "equal"},
        {"weighting": "equal", "aggregator": "median"},
        *({**TRIMMED, "trim": trim} for trim in (0, 0.1, 0.25, 0.49)),
        *({"aggregator": "norm_bounded_mean", "max_update_norm": norm} for norm in (0.5, 1.0)),
        {"aggregator": "norm_bounded_mean", "max_update_norm": 1.0, "weighting": "equal"},
    ]
    assert len({of_outer(outer).hash() for outer in outers}) == len(outers)


@pytest.mark.parametrize("later", [{"aggregator": "mean"}, {"trim": 0.1}, {"max_update_norm": None}])
def test_the_aggregator_of_every_older_plan_may_be_written_out(later: dict[str, Any]) -> None:
    """Banks have approved plans that did not know of it: their text, and so their hash, must not change."""
    assert of_outer(later).to_json() == Plan.model_validate(SMALL).to_json()
    assert not later.keys() & json.loads(of_outer(later).to_json())["outer"].keys()


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({"aggregator": "median"}, 'aggregator = "median" needs weighting = "equal": .*buy influence'),
        ({"aggregator": "trimmed_mean", "weighting": "declared_size"}, 'needs weighting = "equal"'),
        ({"aggregator": "norm_bounded_mean"}, "needs max_update_norm"),
        ({"max_update_norm": 1.0}, 'max_update_norm does nothing under aggregator = "mean": leave it out'),
        ({**TRIMMED, "max_update_norm": 1.0}, 'max_update_norm does nothing under aggregator = "trimmed_mean"'),
        ({"trim": 0.2}, 'trim does nothing under aggregator = "mean": leave it out'),
        ({**TRIMMED, "aggregator": "median"}, 'trim does nothing under aggregator = "median"'),
    ],
)
def test_what_does_not_go_with_an_aggregator_is_refused(outer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        of_outer(outer)


def test_the_hash_changes_with_what_is_tied() -> None:
    mlp, scorecard = SMALL | {"model": {"kind": "mlp", "hidden": [3]}}, SMALL | {"model": {"kind": "scorecard"}}
    state = {"kind": "categorical", "name": "amount", "categories": ["a"]}
    text = {**SMALL, "data": {**SMALL["data"], "columns": [state]}}
    hashes = [Plan.model_validate(values).hash() for values in (mlp, scorecard, text)]
    assert len(set(hashes)) == 3


def test_the_hash_changes_with_the_order_of_columns_and_segments() -> None:
    columns = changed(FULL, ("data", "columns"), FULL["data"]["columns"][::-1])
    segments = changed(FULL, ("data", "segments"), FULL["data"]["segments"][::-1])
    assert len({ALL.hash(), Plan.model_validate(columns).hash(), Plan.model_validate(segments).hash()}) == 3


def backwards(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: backwards(item) for key, item in reversed(value.items())}
    return [backwards(item) for item in value] if isinstance(value, list) else value


def test_the_hash_does_not_change_with_the_order_of_keys() -> None:
    assert Plan.model_validate(backwards(FULL)).to_json() == ALL.to_json()


def test_a_default_that_is_written_out_is_the_same_plan() -> None:
    small = Plan.model_validate(SMALL)
    assert Plan.model_validate(small.model_dump(mode="json")).hash() == small.hash()
    assert Plan.model_validate(changed(SMALL, ("mechanism", "noise_multiplier"), 1)).hash() == small.hash()


def test_a_hash_is_as_ever() -> None:
    """A known answer: a change here unmakes every approval that a bank has given."""
    assert Plan.model_validate(SMALL).hash() == "4e5a93381fdeab4bf38106e2c0e578723e6d128f01745f68e2ed0a4972c4b218"
    # They came later, and changed no older plan.
    without = {"metrics", "privacy_unit", "max_records_per_unit", "aggregator", "max_update_norm"}
    parts = {
        part: {name: value for name, value in FULL[part].items() if name not in without} for part in ("data", "outer")
    }
    old = Plan.model_validate({name: value for name, value in FULL.items() if name not in without} | parts)
    assert old.hash() == "b94dd041f95115874e0aea7bccacc1be5715cb8bc39d4a763a5694525309803d"


def test_the_canonical_text_is_plain_and_reads_back(tmp_path: Path) -> None:
    plan = Plan.model_validate(changed(FULL, ("name",), "Kreditnehmer in Köln"))
    text = plan.to_json()
    assert text.isascii()
    assert "\n" not in text
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    assert read_plan(tmp_path / "plan.json") == plan


def test_tasks_and_steps() -> None:
    assert ALL.tasks == ("",)
    assert ALL.total_steps == 21
    by_segment = Plan.model_validate(changed(FULL, ("inner", "task"), "segment"))
    assert by_segment.tasks == ("trade", "crafts")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("protocol",), 2, "protocol"),
        (("mechanism", "max_grad_norm"), None, "noise without max_grad_norm protects nobody"),
        (("mechanism", "max_grad_norm"), 0, "max_grad_norm"),
        (("mechanism", "max_grad_norm"), float("inf"), "max_grad_norm"),
        (("mechanism", "noise_multiplier"), -1, "noise_multiplier"),
        (("mechanism", "noise_multiplier"), float("nan"), "noise_multiplier"),
        (("mechanism", "noise_multiplier"), float("inf"), "noise_multiplier"),
        (("mechanism", "sample_rate"), 0, "sample_rate"),
        (("mechanism", "sample_rate"), 1.01, "sample_rate"),
        (("mechanism", "sample_rate"), float("nan"), "sample_rate"),
        (("mechanism", "delta"), 0, "delta"),
        (("mechanism", "delta"), 0.5, "delta"),
        (("model", "kind"), "scorecard", "a scorecard has no hidden layers"),
        (("model", "hidden"), [], "an mlp needs hidden"),
        (("model", "hidden"), [4, 0], "positive widths"),
        (("model", "base_rate"), 0, "base_rate"),
        (("model", "base_rate"), 1, "base_rate"),
        (("inner", "local_steps"), 0, "local_steps"),
        (("inner", "learning_rate"), float("inf"), "learning_rate"),
        (("inner", "algorithm"), "magic", "algorithm"),
        (("inner", "algorithm"), "maml", "cannot be private"),
        (("outer", "rounds"), 0, "rounds"),
        (("outer", "learning_rate"), 0, "learning_rate"),
        (("outer", "momentum"), 1, "momentum"),
        (("outer", "momentum"), float("nan"), "momentum"),
        (("outer", "deadline_seconds"), 0, "deadline_seconds"),
        (("outer", "deadline_seconds"), float("inf"), "deadline_seconds"),
        (("outer", "min_reports"), 0, "min_reports"),
        (("outer", "max_declared_size"), 0, "max_declared_size"),
        (("outer", "aggregator"), "krum", "aggregator"),
        (("outer", "trim"), 0.5, "trim"),
        (("outer", "trim"), -0.1, "trim"),
        (("outer", "trim"), float("nan"), "trim"),
        (("outer", "max_update_norm"), 0, "max_update_norm"),
        (("outer", "max_update_norm"), float("inf"), "max_update_norm"),
        (("outer", "max_update_norm"), float("nan"), "max_update_norm"),
        (("dtype",), "float16", "dtype"),
        (("name",), "", "name"),
        (("data", "segments"), ["trade", "trade"], "a segment stands twice"),
        (("data", "label", "negative"), "yes", "positive and negative must differ"),
        (("data", "columns"), [], "columns"),
        (("data", "columns", 1, "name"), "amount", "stands twice"),
        (("data", "columns", 1, "name"), "default", "may not be an input as well"),
        (("data", "privacy_unit"), None, "max_records_per_unit needs privacy_unit"),
        (("data", "columns", 0, "source"), "customer", "may not be an input as well"),
        (("metrics", "bins"), 1, "bins"),
        (("metrics", "noise_multiplier"), float("inf"), "noise_multiplier"),
        (("data", "columns", 0, "source"), "id", "may not be an input as well"),
        (("data", "columns", 0, "bins"), [50.0, 10.0], "bins must ascend"),
        (("data", "columns", 0, "bins"), [0.5, 10.0], "bins must ascend strictly inside"),
        (("data", "columns", 0, "shares"), [0.5], "one entry for each bin"),
        (("data", "columns", 0, "lower"), 200, "lower must be below upper"),
        (("data", "columns", 0, "lower"), 0, "scale 'log' needs a lower bound above 0"),
        (("data", "columns", 1, "shares"), [0.9, 0.9], "sum to at most 1"),
        (("data", "encoding", "intercept"), 0, "intercept"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, place: Place, value: Any, said: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed(FULL, place, value)), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_plan(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_tasks_by_segment_need_segments() -> None:
    values = changed({**SMALL, "inner": {}}, ("inner", "task"), "segment")
    with pytest.raises(ValidationError, match="list its public segments"):
        Plan.model_validate(values)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]", b"3", b'"plan"'])
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)

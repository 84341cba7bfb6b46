"""The leaks that most systems forget, each tried against the bank and the run as they are."""

import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import client.training
from client.bank import Bank, noise_source
from client.config import load_institution
from client.dataset import from_frame, load_dataset
from client.dpsgd import private_gradients
from client.rng import SecureRandom
from client.training import meta_update, tasks_for
from metarisk_common.errors import ConfigError
from metarisk_common.features import Encoder
from metarisk_common.initialisation import initial_params
from metarisk_common.models import record_losses
from metarisk_common.plan import Plan
from metarisk_common.tasks import Task
from metarisk_common.wire import Refusal, TrainOrder, TrainReport, decode_reply, encode_order
from simulations import runfolder
from simulations.cli import app

MakeBank = Callable[..., Path]
MakeLoans = Callable[..., pl.DataFrame]
Call = Callable[..., tuple[int, str, str]]
SIZE = 220


@pytest.fixture
def own(make_loans: MakeLoans) -> pl.DataFrame:
    return make_loans(lenders=1)


@pytest.fixture
def order(plan: Plan) -> TrainOrder:
    return TrainOrder("run", 1, plan.hash(), start(plan))


@pytest.fixture
def opened(tmp_path: Path, make_bank: MakeBank, plan: Plan) -> Iterator[Callable[..., Bank]]:
    banks: list[Bank] = []

    def call(frame: pl.DataFrame, **choices: Any) -> Bank:
        of = choices.pop("plan", plan)
        banks.append(Bank(make_bank(tmp_path / f"bank-{len(banks)}", of, frame, **choices), simulation=True))
        return banks[-1]

    yield call
    for bank in banks:
        bank.close()


def start(plan: Plan) -> dict[str, np.ndarray]:
    return initial_params(plan, Encoder(plan.data).width)


def ask(bank: Bank, order: TrainOrder) -> TrainReport | Refusal:
    return decode_reply(bank.answer(encode_order(order)))


def flipped(frame: pl.DataFrame, row: int) -> pl.DataFrame:
    other = pl.when(pl.col("outcome") == "good").then(pl.lit("bad")).otherwise(pl.lit("good"))
    cell = pl.when(pl.int_range(pl.len()) == row).then(other).otherwise(pl.col("outcome"))
    return frame.with_columns(cell.alias("outcome"))


def test_sigma_divisor_and_steps_are_those_of_the_plan_whatever_the_records(
    opened: Callable[..., Bank], own: pl.DataFrame, order: TrainOrder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Any]] = []

    def watched(*arguments: Any, **public: Any) -> Any:
        gradient = private_gradients(*arguments, **public)
        seen.append([arguments[1], public["mechanism"], public["expected_batch_size"], 0])

        def counted(params: Any, tasks: Any) -> Any:
            seen[-1][-1] += 1
            return gradient(params, tasks)

        return counted

    monkeypatch.setattr(client.training, "private_gradients", watched)
    one_class = own.with_columns(pl.lit("good").alias("outcome"))
    for frame in (own, pl.concat([own, own.head(1)]), own.head(3), flipped(own, 0), one_class):
        assert isinstance(ask(opened(frame), order), TrainReport)
    # The very loss, too: a weight of the classes would be one more constant that the records decide.
    assert seen == [[record_losses, plan.mechanism, SIZE, plan.inner.local_steps]] * 5


def test_a_class_or_a_missing_cell_makes_no_bank_decline(
    opened: Callable[..., Bank], own: pl.DataFrame, order: TrainOrder
) -> None:
    missing = own.with_columns(pl.when(pl.int_range(pl.len()) > 0).then(pl.col("age")).alias("age"))
    strange = own.with_columns(pl.lit("yacht").alias("purpose"))
    outside = own.with_columns(pl.lit(1e30).alias("income"))
    for frame in (missing, strange, outside):
        assert isinstance(ask(opened(frame), order), TrainReport)


def test_a_record_is_encoded_from_itself_and_public_constants_alone(own: pl.DataFrame, plan: Plan) -> None:
    whole = from_frame(own, plan.data, "Lender A", "loans")
    # The extremes among them: a bound that the table decides moves nobody else.
    ends = [end for name in ("income", "age") for end in (own[name].arg_min(), own[name].arg_max())]
    for row in (0, 7, SIZE - 1, *ends):
        assert row is not None
        alone = from_frame(own.slice(row, 1), plan.data, "Lender A", "loans")
        np.testing.assert_array_equal(alone.x[0], whole.x[row])
    assert np.linalg.norm(whole.x, axis=1).max() <= 1 + 1e-6


def test_a_record_that_is_no_number_counts_as_none(own: pl.DataFrame, plan: Plan) -> None:
    (task,) = tasks_for(plan, from_frame(own, plan.data, "Lender A", "loans"))
    poisoned = Task(task.institution, task.segment, task.x.clone(), task.y)
    poisoned.x[5] = torch.nan
    without = Task(
        task.institution, task.segment, torch.cat([task.x[:5], task.x[6:]]), torch.cat([task.y[:5], task.y[6:]])
    )
    width = Encoder(plan.data).width
    updates = [
        meta_update(start(plan), plan, [one], declared_size=SIZE, width=width, rng=SecureRandom.seeded(1))
        for one in (poisoned, without)
    ]
    assert all(np.isfinite(value).all() for value in updates[0].values())
    for name, value in updates[0].items():
        np.testing.assert_allclose(value, updates[1][name], atol=1e-6)


def test_one_record_moves_an_update_by_its_clipped_share_at_most(own: pl.DataFrame, plan: Plan) -> None:
    one_step = plan.model_copy(update={"inner": plan.inner.model_copy(update={"local_steps": 1})})
    (task,) = tasks_for(plan, from_frame(own, plan.data, "Lender A", "loans"))
    huge = Task(task.institution, task.segment, task.x.clone(), task.y)
    huge.x[0] = 1e6
    width = Encoder(plan.data).width
    one, other = (
        meta_update(start(plan), one_step, [each], declared_size=SIZE, width=width, rng=SecureRandom.seeded(1))
        for each in (task, huge)
    )
    moved = np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one))
    # Twice a share: the record as it was goes, and the huge one comes.
    assert 0 < moved <= 2 * plan.inner.learning_rate * 0.7 / SIZE * (1 + 1e-4)


def test_no_seed_that_anybody_sets_repeats_a_banks_noise(
    opened: Callable[..., Bank], own: pl.DataFrame, order: TrainOrder
) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
        bank = opened(own, seed=None)
        assert noise_source(bank.institution, order).is_private
        found.append(ask(bank, order))
    first, second = found
    assert isinstance(first, TrainReport)
    assert isinstance(second, TrainReport)
    assert all(not np.any(first.update[name] == second.update[name]) for name in first.update)
    assert not noise_source(opened(own, seed=1).institution, order).is_private


def test_a_seed_has_one_place_and_no_other(tmp_path: Path, make_bank: MakeBank, plan: Plan, own: pl.DataFrame) -> None:
    folder = make_bank(tmp_path / "bank", plan, own, seed=None)
    path = folder / "institution.toml"
    text = path.read_text(encoding="utf-8")
    for wrong in (f"seed = 1\n{text}", f"{text}seed = 1\n", f"{text}[simulation]\n", f"{text}[simulation]\nsed = 1\n"):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"institution.toml.*(seed|sed)"):
            load_institution(folder)


def test_a_duplicate_record_is_found_by_its_identifier(
    opened: Callable[..., Bank], own: pl.DataFrame, plan: Plan, order: TrainOrder
) -> None:
    keyed = plan.model_copy(update={"data": plan.data.model_copy(update={"identifier": "loan"})})
    numbered = own.with_row_index("loan")
    asked = replace(order, plan_hash=keyed.hash())
    assert isinstance(ask(opened(numbered, plan=keyed), asked), TrainReport)
    twice = pl.concat([numbered, numbered.head(1)])
    reply = ask(opened(twice, plan=keyed), asked)
    assert isinstance(reply, Refusal)
    assert reply.code == "error"


def test_looking_again_costs_again(opened: Callable[..., Bank], own: pl.DataFrame, order: TrainOrder) -> None:
    bank = opened(own, epsilon=8.0)
    spent = [0.0]
    for number in (1, 2):
        for run in ("first", "second"):
            assert isinstance(ask(bank, replace(order, run_id=run, round=number)), TrainReport)
            spent.append(bank.ledger.spent())
    assert spent == sorted(set(spent)), "each one more than the last"


def test_a_batch_that_is_nearly_always_empty_is_noised_and_charged_like_any(
    opened: Callable[..., Bank], own: pl.DataFrame, plan: Plan, order: TrainOrder
) -> None:
    rare = plan.model_copy(update={"mechanism": plan.mechanism.model_copy(update={"sample_rate": 1e-5})})
    bank = opened(own, plan=rare)
    report = ask(bank, replace(order, plan_hash=rare.hash()))
    assert isinstance(report, TrainReport)
    assert (report.event.steps, report.event.sample_rate) == (plan.inner.local_steps, 1e-5)
    assert all(np.isfinite(value).all() and np.all(value != 0) for value in report.update.values())


def test_a_bank_that_answers_writes_no_file_and_no_line_that_its_records_decide(
    opened: Callable[..., Bank], own: pl.DataFrame, order: TrainOrder,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ledger = {f"ledger.{name}" for name in ("sqlite", "sqlite-wal", "sqlite-shm", "head", "key")}
    written = {"institution.toml", "loans.csv", f"approved/{order.plan_hash}.json", *ledger}
    for frame in (own, flipped(own, 0), own.head(3)):
        bank = opened(frame)
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            assert isinstance(ask(bank, order), TrainReport)
        # Not even a norm: a search for known values would miss it, silence would not.
        assert (caplog.messages, *capfd.readouterr()) == ([], "", "")
        folder = bank.institution.folder
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == written


CANARY = 123456.789


def test_no_file_and_no_log_of_a_run_holds_a_record_or_an_update_before_its_noise(
    tmp_path: Path, make_scenario: Callable[..., Path], make_loans: MakeLoans, call: Call,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    frame = make_loans()
    planted = pl.when(pl.int_range(pl.len()) % 20 == 0).then(pl.lit(CANARY)).otherwise(pl.col("income"))
    scenario = make_scenario(
        tmp_path, frame=frame.with_columns(planted.alias("income")), replace={"rounds = 12": "rounds = 2"}
    )
    with caplog.at_level(logging.DEBUG):
        code, out, err = call(app, "run", scenario, "--out", tmp_path / "run", "--workers", 0)
    assert code == 0
    run = runfolder.open_run(tmp_path / "run")
    patterns = [str(CANARY).encode(), *(struct.pack(kind, CANARY) for kind in ("<d", ">d", "<f", ">f"))]
    quiet = run.plan.model_copy(update={"mechanism": run.plan.mechanism.model_copy(update={"noise_multiplier": 0.0})})
    width = Encoder(run.plan.data).width
    for name, folder in run.bank_folders.items():
        tasks = tasks_for(run.plan, load_dataset(folder / "data.parquet", run.plan.data, name))
        bare = meta_update(start(run.plan), quiet, tasks, declared_size=SIZE, width=width, rng=SecureRandom.seeded(1))
        values = [float(value) for array in bare.values() for value in array.reshape(-1) if value]
        patterns += [struct.pack("<f", value) for value in values]
        patterns += [f"{value:.6g}".encode() for value in values]
    shown = [out, err, caplog.text, *capfd.readouterr()]
    places = {"the terminal and the log": "\n".join(shown).encode()}
    places |= {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    tables = {path for path in places if path.endswith(("data.parquet", "unseen.parquet"))}
    assert sum(path.endswith("ledger.sqlite") for path in places) == len(run.bank_folders)
    assert [path for path in places.keys() - tables if found(places[path], patterns)] == []
    # The search finds what is there.
    assert found((tmp_path / "loans.csv").read_bytes(), patterns)
    assert all(found(array.astype(np.float32).tobytes(), patterns) for array in bare.values())


def found(data: bytes, patterns: list[bytes]) -> bool:
    return any(pattern in data for pattern in patterns)

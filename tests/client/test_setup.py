"""`metarisk-client init`: a bank's folder that is whole or not there, and a configuration that says what was meant."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from client import setup
from client.approval import open_ledger
from client.cli import app
from client.config import InstitutionConfig, PolicyConfig, ServerSection, load_institution
from client.ledger import Ledger
from client.setup import Answers, check_delta, default_delta, lay_out
from metarisk_common.config import load_toml
from metarisk_common.errors import ConfigError
from metarisk_common.plan import Plan

Call = Callable[..., tuple[int, str, str]]
Terminal = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[2]
GIVEN = ("--name", "First Bank", "--data", "loans.csv", "--declared-size", "220", "--epsilon", "3")


def certificate(days: int = 365, common_name: str = "consortium") -> tuple[bytes, bytes]:
    """A self-signed certificate and its private key, as PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=400)).not_valid_after(now + timedelta(days=days))
        .sign(key, SHA256())
    )  # fmt: skip
    return made.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_loans: Callable[..., pl.DataFrame]) -> Path:
    """Where a bank's people work: the table lies here, and the operator's certificate."""
    make_loans(lenders=1).write_csv(tmp_path / "loans.csv")
    (tmp_path / "operator.pem").write_bytes(certificate()[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# A whole folder.


def test_a_folder_has_everything_from_the_first_day(call: Call, here: Path) -> None:
    code, out, err = call(app, "init", "bank", *GIVEN, "--server", "hub.example.org:9092", "--ca", "operator.pem")
    assert (code, err) == (0, "")
    folder = here / "bank"
    assert files(folder) == {
        ".gitignore", "approved", "ca.pem", "home", "institution.toml", "ledger.head", "ledger.key", "ledger.sqlite",
        "node.key", "node.pub", "superexec.secret",
    }  # fmt: skip
    assert files(here) - {f"bank/{name}" for name in files(folder)} == {"bank", "loans.csv", "operator.pem"}
    institution = load_institution(folder)
    config = institution.config
    assert (config.name, config.declared_size, config.policy.epsilon, config.policy.delta) == (
        "First Bank", 220, 3.0, 4e-4,
    )  # fmt: skip
    assert config.server == ServerSection(address="hub.example.org:9092", ca="ca.pem")
    assert institution.data_path.resolve() == here / "loans.csv"
    assert institution.ca_certificate is not None
    assert institution.ca_certificate.read_bytes() == (here / "operator.pem").read_bytes()
    with Ledger.read(institution.ledger_path) as ledger:
        ledger.verify()
        assert (ledger.source, ledger.budget, ledger.spent()) == ("First Bank", institution.budget, 0.0)
        assert ledger.fingerprint in out
    assert call(app, "node-key", "bank")[1].strip() in out
    for part in ("node.pub to the operator", "metarisk-client approve", "metarisk-client up"):
        assert part in out


def test_what_is_secret_is_the_owners_alone(call: Call, here: Path) -> None:
    before = os.umask(0)
    try:
        assert call(app, "init", "bank", *GIVEN)[0] == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (here / "bank").iterdir()}
    assert (here / "bank").stat().st_mode & 0o777 == 0o700
    for name in ("node.key", "superexec.secret", "ledger.key", "ledger.sqlite", "institution.toml"):
        assert modes[name] == 0o600, name
    first = (here / "bank" / "superexec.secret").read_bytes()
    assert len(first) >= 32
    assert call(app, "init", "other", *GIVEN)[0] == 0
    assert (here / "other" / "superexec.secret").read_bytes() != first


def test_nothing_of_it_can_be_committed_by_accident(call: Call, here: Path) -> None:
    assert call(app, "init", "bank", *GIVEN)[0] == 0
    subprocess.run(["git", "init", "-q", here], check=True)
    shown = subprocess.run(
        ["git", "status", "--porcelain", "-uall"], cwd=here, check=True, capture_output=True, text=True
    )
    assert "bank" not in shown.stdout
    assert "loans.csv" in shown.stdout


def test_for_machines_it_is_one_object(call: Call, here: Path) -> None:
    code, out, err = call(
        app, "init", "bank", *GIVEN, "--server", "[::1]:9", "--ca", "operator.pem", "--metrics-port", 9095, "--json"
    )
    assert (code, err) == (0, "")
    answer = json.loads(out)
    read = x509.load_pem_x509_certificate((here / "operator.pem").read_bytes())
    assert answer["ca_sha256"].replace(":", "") == read.fingerprint(SHA256()).hex().upper()
    assert answer["fingerprint"] == json.loads(call(app, "node-key", "bank", "--json")[1])["fingerprint"]
    assert (answer["epsilon"], answer["delta"], answer["server"]) == (3.0, 4e-4, "[::1]:9")
    assert load_institution(here / "bank").config.metrics_port == 9095


def test_a_plan_can_be_approved_at_once(call: Call, here: Path, plan: Plan) -> None:
    assert call(app, "init", "bank", *GIVEN[:-1], "4")[0] == 0
    (here / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    assert call(app, "check", "bank", "--plan", "plan.json")[0] == 0
    assert call(app, "approve", "plan.json", "--folder", "bank", "--yes")[0] == 0
    assert call(app, "ledger", "verify", "bank")[0] == 0


@pytest.mark.parametrize("absolute", [True, False])
def test_the_table_is_found_from_wherever_one_stands(
    call: Call, here: Path, *, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "tables").mkdir()
    newest = here / "tables" / "newest.csv"
    newest.symlink_to(here / "loans.csv")
    given_path = newest if absolute else Path("tables/newest.csv")
    (here / "banks").mkdir()
    assert call(app, "init", "banks/first", "--name", "A", "--data", given_path, *GIVEN[4:])[0] == 0
    written = load_institution(here / "banks" / "first").config.data
    # A link that is turned to a newer table every month stays one.
    assert written == (str(newest) if absolute else "../../tables/newest.csv")
    monkeypatch.chdir("/")
    assert load_institution(here / "banks" / "first").data_path.resolve() == here / "loans.csv"


# Or none.


def test_where_something_is_already_nothing_is_touched(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bank").mkdir()
    assert call(app, "init", "bank", *GIVEN)[0] == 0  # An empty folder will do.
    before = {path: path.read_bytes() for path in (here / "bank").iterdir() if path.is_file()}
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    for name, message in (
        ("bank", "something here already"),
        ("loans.csv", "something here already"),
        ("link", "something here already"),
        ("gone/bank", "gone: there is no such folder"),
    ):
        code, out, err = call(app, "init", name, *GIVEN)
        assert (code, out, err.count("\n")) == (2, "", 1), name
        assert message in err
    # A folder that takes the place of the one where a shell stands would leave the shell nowhere.
    monkeypatch.chdir(here / "empty")
    code, _, err = call(app, "init", ".", "--name", "A", "--data", "../loans.csv", *GIVEN[4:])
    assert (code, "is where you are" in err) == (2, True)
    assert {path: path.read_bytes() for path in before} == before
    assert files(here / "empty") == set()


WRONG: dict[str, tuple[Sequence[object], str]] = {
    "no name": (GIVEN[2:], "--name"),
    "no table": ((*GIVEN[:2], *GIVEN[4:]), "--data"),
    "no size": ((*GIVEN[:4], *GIVEN[6:]), "--declared-size"),
    "no budget": (GIVEN[:6], "--epsilon"),
    "hub without its authority": ((*GIVEN, "--server", "hub:1"), "--ca"),
    "authority without its hub": ((*GIVEN, "--ca", "operator.pem"), "--server"),
    "empty name": (("--name", "", *GIVEN[2:]), "'name'"),
    "long name": (("--name", "x" * 201, *GIVEN[2:]), "'name'"),
    "name that is no text": (("--name", "a\udcff", *GIVEN[2:]), "'name'"),
    "table is missing": (("--name", "A", "--data", "gone.csv", *GIVEN[4:]), "gone.csv: there is no such file"),
    "table of another kind": (("--name", "A", "--data", "operator.pem", *GIVEN[4:]), "only .csv and .parquet"),
    "no records": ((*GIVEN[:4], "--declared-size", "0", *GIVEN[6:]), "--declared-size"),
    "no epsilon": ((*GIVEN[:6], "--epsilon", "0"), "--epsilon"),
    "no bound": ((*GIVEN[:6], "--epsilon", "inf"), "--epsilon"),
    "no number": ((*GIVEN[:6], "--epsilon", "nan"), "--epsilon"),
    "large delta": ((*GIVEN, "--delta", "5e-4"), "--delta"),
    "no delta": ((*GIVEN, "--delta", "0"), "policy.delta"),
    "scheme": ((*GIVEN, "--server", "https://hub:9092", "--ca", "operator.pem"), "host:port"),
    "no port": ((*GIVEN, "--server", "hub", "--ca", "operator.pem"), "host:port"),
    "port too large": ((*GIVEN, "--server", "hub:65536", "--ca", "operator.pem"), "host:port"),
    "space": ((*GIVEN, "--server", "hub example:1", "--ca", "operator.pem"), "host:port"),
    "two lines": ((*GIVEN, "--server", "hub:1\n", "--ca", "operator.pem"), "host:port"),
    "no certificate": ((*GIVEN, "--server", "hub:1", "--ca", "loans.csv"), "no PEM certificate"),
    "certificate missing": ((*GIVEN, "--server", "hub:1", "--ca", "gone.pem"), "gone.pem"),
    "metrics": ((*GIVEN, "--metrics-port", "65536"), "--metrics-port"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_makes_nothing(call: Call, here: Path, case: str) -> None:
    arguments, message = WRONG[case]
    before = files(here)
    code, out, err = call(app, "init", "bank", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert files(here) == before


def test_only_a_certificate_that_is_still_good_is_taken(call: Call, here: Path) -> None:
    pem, key = certificate()
    ended, _ = certificate(days=-1)
    for content, message in ((key + pem, "private key"), (pem + ended, "ended on"), (pem[:-40], "no PEM certificate")):
        (here / "operator.pem").write_bytes(content)
        code, out, err = call(app, "init", "bank", *GIVEN, "--server", "hub:1", "--ca", "operator.pem")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
        assert not (here / "bank").exists()
    (here / "operator.pem").write_bytes(b"Subject: the operator\n" + pem + b"trailing text\n")
    assert call(app, "init", "bank", *GIVEN, "--server", "hub:1", "--ca", "operator.pem")[0] == 0
    assert (here / "bank" / "ca.pem").read_bytes() == pem


STEPS = ("write_new_private", "institution_toml", "write_pair", "write_atomically", "open_ledger", "sync_folder")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
def test_whatever_fails_leaves_nothing(
    here: Path, step: str, error: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(here)

    def fail(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr(setup, step, fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ConfigError):
        lay_out(here / "bank", Answers("A", Path("loans.csv"), 220, 3.0, 1e-4))
    assert files(here) == before


def test_a_killed_process_leaves_no_folder_and_the_next_one_cleans_up(call: Call, here: Path) -> None:
    dying = "import os, sys; from client import cli, setup; setup.open_ledger = lambda _: os._exit(9); cli.main()"
    command = [sys.executable, "-c", dying, "init", "bank", *GIVEN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, cwd=here, env=environment, check=False).returncode == 9
    assert not (here / "bank").exists()
    assert call(app, "init", "bank", *GIVEN)[0] == 0
    assert {path.name for path in here.iterdir()} == {"bank", "loans.csv", "operator.pem"}
    assert call(app, "ledger", "verify", "bank")[0] == 0


# The configuration.


@pytest.mark.parametrize("name", ['He said "no"\\', "Bänk № 1 🏦 '''", "a\nb\t\x7f\x01", "[policy]\nepsilon = 99"])
def test_a_bank_may_be_called_anything(call: Call, here: Path, name: str) -> None:
    assert call(app, "init", "bank", "--name", name, *GIVEN[2:])[0] == 0
    institution = load_institution(here / "bank")
    assert (institution.config.name, institution.source, institution.config.policy.epsilon) == (name, name, 3.0)
    with open_ledger(institution) as ledger:
        assert ledger.source == name


def test_a_bank_may_change_its_name_and_keep_its_ledger(call: Call, here: Path) -> None:
    assert call(app, "init", "bank", *GIVEN)[0] == 0
    path = here / "bank" / "institution.toml"
    path.write_text(path.read_text(encoding="utf-8").replace('name = "First', 'name = "Last', 1), encoding="utf-8")
    with open_ledger(load_institution(here / "bank")) as ledger:
        assert ledger.source == "First Bank"


def test_every_key_is_explained(here: Path) -> None:
    made = lay_out(here / "bank", Answers("A", Path("loans.csv"), 220, 3.0, 1e-4))
    text = (made.institution.folder / "institution.toml").read_text(encoding="utf-8")
    for model in (InstitutionConfig, PolicyConfig, ServerSection):
        for key in model.model_fields:
            assert key == "simulation" or f"{key} = " in text or f"[{key}]" in text, key
    # What stands in a comment is right as well, once the comment's sign is taken away.
    commented = [line.removeprefix("# ") for line in text.splitlines() if line.startswith(("# [", "# address", "# ca"))]
    hub = "\n".join(commented) + "\n"
    (here / "hub.toml").write_text(text + hub, encoding="utf-8")
    assert load_toml(here / "hub.toml", InstitutionConfig).server == ServerSection(address="hub.example.org:9092")


@given(size=st.integers(1, 10**12))
def test_the_default_delta_suits_every_size(size: int) -> None:
    delta = default_delta(size)
    check_delta(delta, size)
    assert 0 < delta < 1e-2
    # Not needlessly small: the next larger number of one digit would be too large.
    assert delta > 0.005 or delta * 10 * size > 0.5 - 1e-9
    assert float(f"{delta:.0e}") == delta


# At a terminal.


def test_a_person_is_asked_for_all_that_is_missing(at_a_terminal: Terminal, here: Path) -> None:
    typed = [
        ("name: ", "First Bank"), ("data: ", "gone.csv"), ("data: ", "loans.csv"), ("declared size: ", "many"),
        ("declared size: ", "1,000"), ("epsilon [3]: ", "inf"), ("epsilon [3]: ", ""), ("delta [0.0001]: ", "0.5"),
        ("delta [0.0001]: ", ""), ("server []: ", "https://hub"), ("server []: ", "hub:9092"), ("ca: ", "operator.pem"),
        ("Type yes: ", "yes"),
    ]  # fmt: skip
    code, seen = at_a_terminal(here, ["init", "bank"], typed)
    assert code == 0, seen
    for told in ("gone.csv: there is no such file", "whole number", "finite number", "1 / (10 *", "host:port"):
        assert told in seen
    config = load_institution(here / "bank").config
    assert (config.name, config.declared_size, config.policy.epsilon, config.policy.delta) == (
        "First Bank", 1000, 3.0, 1e-4,
    )  # fmt: skip
    assert config.server == ServerSection(address="hub:9092")


def test_a_person_may_think_again(at_a_terminal: Terminal, here: Path) -> None:
    code, seen = at_a_terminal(here, ["init", "bank", *GIVEN], [("delta [", ""), ("server []", ""), ("Type yes", "no")])
    assert (code, "nothing was made" in seen) == (1, True), seen
    assert not (here / "bank").exists()

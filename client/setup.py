"""A bank's folder, laid out whole or not at all: configuration, node key, secret, and a ledger from the first day."""

import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from metarisk_common.config import validate
from metarisk_common.errors import ConfigError
from metarisk_common.files import sync_folder, write_atomically, write_new_private
from metarisk_common.schema import CategoricalColumn, Label, Schema
from metarisk_common.supervise import try_lock

from .approval import open_ledger
from .config import (
    APPROVED_FOLDER,
    CA_FILE,
    CONFIG_FILE,
    Institution,
    InstitutionConfig,
    PolicyConfig,
    ServerSection,
    institution_toml,
    load_institution,
)
from .dataset import read_table
from .node_key import PublicKey, write_pair
from .proposal import Pair
from .proposal_table import with_open_lines
from .source_config import TableSection
from .source_files import is_many
from .sources import source_batches
from .table_sample import table_sample

_SECRET_BYTES: Final = 32
_LARGEST_DELTA: Final = Decimal("0.009")  # The configuration takes less than a hundredth.
_IGNORED: Final = (
    "# Keys, a ledger, and where the records lie: nothing of a bank's folder belongs in a repository.\n*\n"
)


@dataclass(frozen=True)
class Answers:
    """What a bank has decided.

    `data` is a path as the person gave it, relative to where the command runs: a file, or a folder or pattern of
    Parquet files; None where `table` says where the table is. `ca`: the operator's certificate authority, as `read_ca`
    gave it; it comes with `server`, host and port, or neither. `table` says where a table in the bank's own words is
    and how it is read, its paths relative as `data` would be, and `pairs` what was proposed of it.
    """

    name: str
    data: Path | None
    declared_size: int
    epsilon: float
    delta: float
    server: str | None = None
    ca: bytes | None = None
    metrics_port: int = 0
    table: TableSection | None = None
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class LaidOut:
    """A folder that was made, and its node's public key."""

    institution: Institution
    public_key: PublicKey
    ledger_fingerprint: str


def default_delta(declared_size: int) -> float:
    """Give the largest delta of one digit that the policy takes: at most 1 / (10 * declared size)."""
    largest = min(Decimal(1) / (10 * declared_size), _LARGEST_DELTA)
    return float(largest.quantize(Decimal(1).scaleb(largest.adjusted()), rounding=ROUND_FLOOR))


def check_delta(delta: float, declared_size: int) -> None:
    """Hold a delta against a declared size.

    Raises:
        ConfigError: it is too large for it, and every plan would be refused.

    """
    if not 0 < delta * 10 * declared_size <= 1 + 1e-9:
        raise ConfigError(
            f"--delta: must be above 0 and at most 1 / (10 * declared size) = {0.1 / declared_size:.3g}; "
            f"{default_delta(declared_size):g} is a good one"
        )


def check_epsilon(epsilon: float) -> None:
    """Refuse a budget that bounds nothing.

    Raises:
        ConfigError: it is no finite number above 0.

    """
    if not 0 < epsilon < math.inf:
        raise ConfigError("--epsilon: must be a finite number above 0; 1 protects strongly, above 10 hardly at all")


def check_data(path: Path) -> None:
    """Read the table whole, as an order would; of many files, two columns of each.

    Raises:
        DataError: it is not there, may not be read, or is damaged.

    """
    if not is_many(path):
        read_table(path)
        return
    first, second = table_sample(path, rows=1).cells.columns[:2]
    column = CategoricalColumn(kind="categorical", name=second, categories=("any",))
    schema = Schema(label=Label(name=first), institution="any", columns=(column,))
    policy = PolicyConfig(epsilon=1, delta=1e-3)
    config = InstitutionConfig(name="any", table=TableSection(file=str(path)), declared_size=1, policy=policy)
    for _ in source_batches(Institution(Path(), config), schema):
        pass


def read_ca(path: Path) -> bytes:
    """Read an operator's certificate authority; only certificates are taken over, whatever else the file holds.

    Returns:
        PEM of the certificates.

    Raises:
        ConfigError: the file cannot be read, holds no certificate or an expired one, or holds a private key.

    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--ca: {path}: cannot be read: {error.strerror}") from None
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"--ca: {path}: holds a private key, which must never leave its owner; ask the operator for the "
            "certificate alone"
        )
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ConfigError(f"--ca: {path}: is no PEM certificate; the operator has it as certificates/ca.pem") from None
    ended = [certificate for certificate in certificates if certificate.not_valid_after_utc <= datetime.now(UTC)]
    if ended:
        raise ConfigError(
            f"--ca: {path}: its certificate ended on {ended[0].not_valid_after_utc:%Y-%m-%d}; ask the operator for the "
            "present one"
        )
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def ca_fingerprint(pem: bytes) -> str:
    """Give the SHA-256 of the first certificate, as `openssl x509 -fingerprint -sha256` writes it."""
    return x509.load_pem_x509_certificates(pem)[0].fingerprint(SHA256()).hex(":").upper()


# What a person types, made into what is meant; the ConfigError or DataError says why it cannot be.


def table_at(text: str) -> Path:
    """Name a table that can be read."""
    check_data(Path(text))
    return Path(text)


def certificate_at(text: str) -> Path:
    """Name a file that `read_ca` takes."""
    read_ca(Path(text))
    return Path(text)


def size_of(text: str) -> int:
    """Read a declared size: 1,000 and 1_000 are 1000."""
    digits = text.replace(",", "").replace("_", "").strip()
    if not re.fullmatch("[0-9]{1,15}", digits) or int(digits) == 0:
        raise ConfigError("--declared-size: must be a whole number of at least 1")
    return int(digits)


def epsilon_of(text: str) -> float:
    """Read a budget."""
    value = _number("--epsilon", text)
    check_epsilon(value)
    return value


def delta_for(declared_size: int) -> Callable[[str], float]:
    """Give what reads a delta that suits a declared size."""

    def delta_of(text: str) -> float:
        value = _number("--delta", text)
        check_delta(value, declared_size)
        return value

    return delta_of


def server_of(text: str) -> str | None:
    """Read the hub's host and port, or nothing."""
    if not text.strip():
        return None
    return validate({"address": text.strip()}, ServerSection, where="--server").address


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: must be a number") from None


def check_place(folder: Path) -> None:
    """See that a folder can be made here.

    Raises:
        ConfigError: there is something here already, or nothing around it.

    """
    place = folder.resolve()
    if place == Path.cwd():
        raise ConfigError(f"{folder}: is where you are; name a folder inside it, or go one up and name this one")
    try:
        taken = folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir())))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be looked into: {error.strerror}") from None
    if taken:
        raise ConfigError(
            f"{folder}: there is something here already; name a folder that is new or empty (the table may lie "
            "anywhere)"
        )
    if not place.parent.is_dir():
        raise ConfigError(f"{place.parent}: there is no such folder; make it first")


def lay_out(folder: Path, answers: Answers) -> LaidOut:
    """Make a bank's folder: everything is written beside its place and moved there at once.

    Raises:
        ConfigError: there is something here already, the folder cannot be made, or an answer cannot be meant; nothing
            is left behind.
        DataError: the table cannot be read.

    """
    check_place(folder)
    place = folder.resolve()
    check_epsilon(answers.epsilon)
    config = validate(_values(place, answers), InstitutionConfig, where=str(folder / CONFIG_FILE))
    check_delta(answers.delta, answers.declared_size)
    if answers.data is not None:
        check_data(answers.data)
    try:
        with _draft(place) as draft:
            public, fingerprint = _write(draft, config, answers)
            draft.rename(place)  # Onto nothing or an empty folder, else it fails.
            sync_folder(place.parent)
    except OSError as error:
        raise ConfigError(f"{folder}: the folder cannot be made here: {error.strerror}") from None
    return LaidOut(load_institution(folder), public, fingerprint)


@contextmanager
def _draft(place: Path) -> Iterator[Path]:
    """Give an empty folder beside a place, which is gone afterwards; what a killed process left there goes first."""
    draft = place.with_name(f".{place.name}.draft")
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        if not try_lock(handle):  # Two processes would take each other's draft away.
            raise ConfigError(f"{place.parent}: another folder is being made here; try again")
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(mode=0o700)
        try:
            yield draft
        finally:
            with suppress(FileNotFoundError):
                shutil.rmtree(draft)
    finally:
        os.close(handle)


def _write(draft: Path, config: InstitutionConfig, answers: Answers) -> tuple[PublicKey, str]:
    institution = Institution(draft, config)
    write_new_private(draft / CONFIG_FILE, with_open_lines(institution_toml(config), answers.pairs).encode())
    write_atomically(draft / ".gitignore", _IGNORED.encode())
    public = write_pair(institution.node_key, institution.node_public_key, config.name)
    write_new_private(institution.superexec_secret, secrets.token_hex(_SECRET_BYTES).encode())
    if answers.ca is not None:
        write_atomically(draft / CA_FILE, answers.ca)
    for path in (draft / APPROVED_FOLDER, institution.home):
        path.mkdir(mode=0o700)
    with open_ledger(institution) as ledger:
        fingerprint = ledger.fingerprint
    sync_folder(draft)
    return public, fingerprint


def _values(place: Path, answers: Answers) -> dict[str, Any]:
    if (answers.server is None) != (answers.ca is None):
        missing, given = ("--ca", "--server") if answers.ca is None else ("--server", "--ca")
        raise ConfigError(f"{missing}: is missing; {given} needs it")
    values: dict[str, Any] = {
        "name": answers.name,
        **_table_values(place, answers),
        "declared_size": answers.declared_size,
        "source": answers.name,  # Spelt out: the bank may change its name, its ledger keeps this.
        "policy": {"epsilon": answers.epsilon, "delta": answers.delta},
        "metrics": {"port": answers.metrics_port},
    }
    return values if answers.server is None else values | {"server": {"address": answers.server, "ca": CA_FILE}}


def _table_values(place: Path, answers: Answers) -> dict[str, Any]:
    if answers.data is None:
        return {} if answers.table is None else {"table": table_from(answers.table, place)}
    path = path_from(answers.data, place)
    return {"table": {"file": path}} if is_many(answers.data) else {"data": path}


def table_from(table: TableSection, place: Path) -> TableSection:
    """Write a section's paths, of the table or of a database's URL, as the configuration at `place` wants them."""
    paths = {"file": table.file, "url_file": table.url_file}
    update = {name: path_from(Path(path), place) for name, path in paths.items() if path is not None}
    return table.model_copy(update=update)


def path_from(data: Path, place: Path) -> str:
    """Write a table's path as the configuration at `place` wants it: absolute as it stands, or relative to there."""
    if data.is_absolute():
        return str(data)
    # A link to the newest table stays one: only the folders on the way are followed.
    return os.path.relpath(data.absolute().parent.resolve() / data.name, place)

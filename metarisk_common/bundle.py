"""The app bundle that starts a run: Flower needs one, and ours carries no code.

Flower puts a bundle's folder first on the path of whoever runs it, so a bundle with a folder `client` would replace
the bank's own policy and ledger. This one holds its own description and the licence; both sides run what is installed.
Its bytes depend on the version alone (nothing is compressed, for compressors differ), so a bank knows its SHA-256.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import distribution
from typing import Final

DISTRIBUTION: Final = "metarisk-federated"
LARGEST: Final = 1_000_000
"""No bundle without code is anywhere near as large, in bytes."""
RUN_KEY: Final = "metarisk-run"
"""In a run's configuration: the name of its folder at the server. Banks do not see it."""
_DATE = (1980, 1, 1, 0, 0, 0)
_HARMLESS = frozenset({"pyproject.toml", "LICENSE", ".info/CONTENT"})


def app_bundle() -> bytes:
    """Build the bundle of the installed version."""
    version = distribution(DISTRIBUTION).version
    description = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = {json.dumps(DISTRIBUTION)}
version = {json.dumps(version)}
description = "Carries no code: every side runs the metarisk that it has installed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "metarisk"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{RUN_KEY} = ""
"""
    return build_bundle({"pyproject.toml": description.encode(), "LICENSE": _LICENCE.encode()})


def build_bundle(files: Mapping[str, bytes]) -> bytes:
    """Pack files as a Flower app bundle: a ZIP archive with a list of digests, the same bytes everywhere."""
    content = "\n".join(f"{name},{sha256(data).hexdigest()},{len(data) * 8}" for name, data in files.items())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, data in {**files, ".info/CONTENT": content.encode()}.items():
            bundle.writestr(zipfile.ZipInfo(name, _DATE), data)
    return buffer.getvalue()


def digest(bundle: bytes) -> str:
    """SHA-256 of a bundle, hexadecimal: what a bank approves."""
    return sha256(bundle).hexdigest()


def surplus(bundle: bytes) -> list[str]:
    """Names in a bundle that a bundle without code does not hold, at most ten; nothing is unpacked.

    Raises:
        ValueError: it is no archive, or larger than `LARGEST`.

    """
    if len(bundle) > LARGEST:
        raise ValueError("larger than any bundle without code")
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise ValueError("not an archive") from None
    return sorted(set(names) - _HARMLESS)[:10]


_LICENCE = "Licensed under the Apache License, Version 2.0; the text is part of the installed distribution.\n"

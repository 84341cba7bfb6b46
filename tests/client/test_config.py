"""`institution.toml`: what is written of a configuration is what is read, and no key means anything unchecked."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.config import InstitutionConfig, PolicyConfig, ServerSection, institution_toml
from metarisk_common.config import load_toml, validate
from metarisk_common.errors import ConfigError

paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60) | st.sampled_from(
    [
        '"',
        "'''",
        '"""',
        "\\",
        "\\u0041",
        "#",
        "a\nb",
        "\r\n",
        "\x7f",
        "\u2028",
        "Bänk № 1 🏦",
        "[server]",
        "x = 1",
        "\x85",
    ]
)
floats = st.floats(min_value=1e-300, max_value=1e300)
configurations = st.builds(
    InstitutionConfig,
    name=names,
    data=paths,
    declared_size=st.integers(1, 10**12),
    source=names,
    ledger=paths,
    policy=st.builds(
        PolicyConfig,
        epsilon=floats,
        delta=st.floats(min_value=1e-300, max_value=9e-3),
        min_noise_multiplier=floats,
        max_grad_norm=st.none() | floats,
        max_local_steps=st.integers(1, 10**9),
        max_sample_rate=st.floats(min_value=1e-300, max_value=1),
    ),
    server=st.none()
    | st.builds(
        ServerSection,
        address=st.sampled_from(["hub:1", "127.0.0.1:9092", "[::1]:65535", "hub-1.example.org:443"]),
        ca=paths,
        bundles=st.lists(st.just("0f" * 32), max_size=2).map(tuple),
    ),
)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written") / "institution.toml"


@given(config=configurations)
def test_what_is_written_is_what_is_read(written: Path, config: InstitutionConfig) -> None:
    written.write_bytes(institution_toml(config).encode())
    assert load_toml(written, InstitutionConfig) == config


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"server": {"address": "hub:1", "bundles": ["abc"]}}, "server.bundles"),
        ({"server": {"address": "hub:0"}}, "server.address"),
        ({"server": {"address": "u@hub:1"}}, "server.address"),
        ({"server": {"address": "hub:1/path"}}, "server.address"),
        ({"server": {"address": "hub:1", "ca": ""}}, "server.ca"),
        ({"server": {}}, "server.address"),
        ({"metrics": {"port": 65536}}, "metrics.port"),
    ],
)
def test_the_new_sections_are_checked(section: dict[str, object], key: str) -> None:
    values = {"name": "A", "data": "a.csv", "declared_size": 1, "policy": {"epsilon": 1, "delta": 1e-3}}
    with pytest.raises(ConfigError, match=f"key '{key}"):
        validate(values | section, InstitutionConfig, where="institution.toml")

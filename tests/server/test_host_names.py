"""Names of a server certificate: what banks can connect to, and a clear word on everything else."""

import pytest

from metarisk_common.errors import ConfigError
from server.host_names import general_names


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("https://hub.example.org", "address of a page"),
        ("hub.example.org/v1", "address of a page"),
        ("hub.example.org:9092", "port"),
        ("[::1]", "brackets"),
        ("*", "top-level"),
        ("*.org", "top-level"),
        ("hub.*.org", "wildcard"),
        ("h*.example.org", "wildcard"),
        ("*.*.example.org", "wildcard"),
        ("köln.example.org", "xn--"),
        ("0.0.0.0", "no address that a bank"),  # noqa: S104 - refused
        ("::", "no address that a bank"),
        ("ff02::1", "no address that a bank"),
        ("fe80::1%eth0", "no address that a bank"),
        ("256.1.1.1", "neither"),
        ("hub.example.org.", "neither"),
        ("-hub.example.org", "neither"),
        ("hub_1.example.org", "neither"),
        ("hub example", "neither"),
        ("", "neither"),
        ("a" * 64 + ".example.org", "neither"),
        (".".join(["abcdefg"] * 33), "neither"),
    ],
)
def test_what_can_be_no_name_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        general_names(["good.example.org", name])
    assert f"'{name}'" in str(caught.value)


def test_names_are_lower_case_and_there_once() -> None:
    found = [name.value for name in general_names(["Hub.Example.ORG", "hub.example.org", "LOCALHOST", "127.0.0.1"])]
    assert [str(name) for name in found] == ["localhost", "127.0.0.1", "::1", "hub.example.org"]

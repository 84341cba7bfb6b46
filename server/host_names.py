"""What a server certificate may be issued for: host names after RFC 1123, IP addresses, and wildcards of one label."""

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

from cryptography import x509

from metarisk_common.errors import ConfigError

ALWAYS: Final = ("localhost", "127.0.0.1", "::1")
"""What every certificate is issued for, besides what the operator names."""

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LONGEST: Final = 253


def general_names(names: Iterable[str]) -> list[x509.GeneralName]:
    """Turn host names and IP addresses into the names of a certificate: those of this machine first, each once.

    Raises:
        ConfigError: one of them is neither.

    """
    found = dict.fromkeys(_general_name(name) for name in (*ALWAYS, *names))
    return list(found)


def _general_name(name: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return x509.DNSName(_host_name(name))
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise _wrong(name, "is no address that a bank can connect to; name the one by which banks reach this machine")
    return x509.IPAddress(address)


def _host_name(name: str) -> str:
    if "/" in name:
        raise _wrong(name, "is the address of a page; give its host name alone, like hub.example.org")
    if ":" in name or "[" in name:
        raise _wrong(name, "has a port or brackets; give the host name or the IP address alone")
    if not name.isascii():
        raise _wrong(name, "has letters that DNS does not have; write it as DNS does, with xn--")
    labels = name.lower().split(".")
    rest = labels[1:] if labels[0] == "*" else labels
    if "*" in "".join(rest):
        raise _wrong(name, "has its wildcard elsewhere than as the whole first part, like *.example.org")
    if len(rest) < len(labels) and len(rest) < 2:  # noqa: PLR2004 - a domain has two parts
        raise _wrong(name, "would stand for a whole top-level domain; give the host names themselves")
    if len(name) > _LONGEST or not all(_LABEL.fullmatch(label) for label in rest) or rest[-1].isdigit():
        raise _wrong(name, "is neither a host name nor an IP address; like hub.example.org or 192.0.2.7")
    return ".".join(labels)


def _wrong(name: str, why: str) -> ConfigError:
    return ConfigError(f"names: '{name}' {why}")

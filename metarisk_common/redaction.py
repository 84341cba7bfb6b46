"""Secrets taken out of a text that is going to be read by many.

They are known by their looks (a private key in PEM, a JWT, credentials in an address), or by the word before them. Long
hexadecimal alone is no secret: plan hashes, receipts, digests and public keys stay readable.
"""

import re
from typing import Final

MAX_TEXT = 2_000
MASK = "[redacted]"

_STRONG: Final = (
    r"(?:tokens?|secrets?|passw(?:or)?ds?|passphrases?|authorization|credentials?|cookies?|(?:api|private)[_-]?keys?)"
)
_KEY: Final = r"(?-i:(?<![A-Za-z])(?:key|Key|KEY)|(?<=[a-z])Key)"
_RUN: Final = r"(?-i:(?![a-z/_-]+(?![A-Za-z0-9+/_=-]))(?![./~])[A-Za-z0-9+/_=-]{16,})"
"""What a generated secret looks like: long, and neither a path nor words of small letters."""
_PATH: Final = r"[~.]{0,2}(?:/[\w.@+-]+)+\.[a-z]{2,10}\b"
_VALUE: Final = r"""(?:\\{0,2}"[^"]{0,500}"?|\\{0,2}'[^']{0,500}'?|[^\s"',;)\]}]+)"""
_PATTERNS: Final = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        # A private key, whole or cut short; what is public stays.
        r"()-----BEGIN (?![A-Z0-9 ]*(?:PUBLIC KEY|CERTIFICATE))[^-]{0,60}-----.*?(?:-----END [^-]{0,60}-----|\Z)",
        r"()\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*",  # a JWT
        r"(\b[a-z][a-z0-9+.-]{1,20}://)[^/\s@:]{0,200}:[^/\s@]{1,200}(?=@)",
        # A header's value with its scheme; and a scheme by itself.
        r"""(authorization["']?\s*[:=]\s*["']?)[^\s"',;]+(?:[ \t]+[^\s"',;]+)?""",
        r"(\bbearer\s+)(?=\S*[\d._=]|\S{20})[\w.~+/=-]{8,}",
        # `secret: ...`, `password=...`, `--token ...`, however short; but a path to a secret is none, nor what it does.
        rf"""/[\w.@+-]{{1,99}}\.secret(?=: )|({_STRONG}\\?["']?\s*[:=]\s*)(?!["']?{_PATH}|["']?\[redacted){_VALUE}""",
        rf"(--[\w-]{{0,40}}{_STRONG}\s+){_VALUE}",
        # `token ...` and `node key ...`, where what follows looks generated; public keys stay.
        rf"""({_STRONG}["']?(?:\s+(?:is|was|of))?[\s:=\"'(]{{1,4}}){_RUN}""",
        rf"""((?<!public[ _-])(?<!public)(?<!pub){_KEY}s?["']?(?:\s+(?:is|was))?[\s:=\"'(]{{1,4}}){_RUN}""",
    )
)
_STRONG_NAME: Final = re.compile(rf"{_STRONG}(?-i:(?![a-z]))(?!.*_(?:path|file|seconds|count|name)$)", re.IGNORECASE)
_WEAK_NAME: Final = re.compile(rf"(?<!public)(?<!public_)(?<!pub_){_KEY}", re.IGNORECASE)


def is_secret(name: str, value: object) -> bool:
    """Tell whether a field is a secret: whatever it holds, by its name; as a key, if it looks generated."""
    if _STRONG_NAME.search(name):
        return True
    return isinstance(value, str) and bool(_WEAK_NAME.search(name) and re.search(_RUN, value))


def clean(text: str) -> str:
    """Give a text cut at `MAX_TEXT` characters, without the secrets and tracebacks that it holds."""
    length = len(text)
    if length > MAX_TEXT:
        # Without the unfinished word at the end, which could be half a secret that nothing masks any more.
        text = re.sub(r"[A-Za-z0-9+/_=.~-]{1,200}\Z", "", text[:MAX_TEXT])
    start = text.find("Traceback (most recent call last)")
    if start >= 0:
        text = f"{text[:start]}[traceback left out]"
    for pattern in _PATTERNS:
        text = pattern.sub(lambda found: found[0] if found[1] is None else f"{found[1]}{MASK}", text)
    return f"{text[:MAX_TEXT]}... [cut from {length} characters]" if length > MAX_TEXT else text

"""Redaction: secrets go, in whatever guise; hashes, receipts and public keys stay."""

import pytest

from metarisk_common.redaction import MASK, MAX_TEXT, clean, is_secret

HASH = "8f0c" * 16
GENERATED = "Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZg=="
PEM = f"-----BEGIN PRIVATE KEY-----\n{GENERATED}\n{GENERATED}\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        PEM, PEM.partition("-----END")[0], PEM.replace("PRIVATE", "OPENSSH PRIVATE"), repr(PEM), f"wrote {PEM} to disk",
        f"-----BEGIN PUBLIC KEY-----\nx\n{PEM}", f"Authorization: Basic {GENERATED}",
        f'"authorization": "Bearer {GENERATED}"', f"sent bearer {GENERATED}",
        f"header eyJhbGciOiJIUzI1NiJ9.{GENERATED[:20]}.{GENERATED[:20]}", f"token={GENERATED}", f"token {GENERATED}",
        f"the token is {GENERATED}", f"superexec secret '{GENERATED}'", f"secret: {GENERATED}",
        f"clientSecret={GENERATED}", f"--token {GENERATED}", f"--auth-secret={GENERATED}", f"private key {GENERATED}",
        f"node key: {GENERATED}", f"apiKey={GENERATED}", f"password = '{GENERATED} {GENERATED}'",
        f'{{"passphrase": "{GENERATED}"}}', f"postgres://bank:{GENERATED}@host/loans", f"Cookie: {GENERATED}",
        f"private_key={'Zm9v' * 16}",
    ],
)  # fmt: skip
def test_a_secret_is_masked(text: str) -> None:
    found = clean(text)
    assert GENERATED[:4] not in found
    assert MASK in found


@pytest.mark.parametrize(
    "text", ["password=hunter2", 'password: "hunter2 x"', "passwd='hunter2'", "credentials=hunter2"]
)
def test_a_short_password_is_masked(text: str) -> None:
    assert "hunter2" not in clean(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token", GENERATED), ("access_token", "short"), ("clientSecret", "short"), ("password", 1234),
        ("signing_key", GENERATED), ("apiKey", "short"), ("key", HASH), ("Authorization", f"Basic {GENERATED}"),
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_name(name: str, value: object) -> None:
    assert is_secret(name, value)


@pytest.mark.parametrize(
    "text",
    [
        f"plan {HASH} approved", f"receipt {HASH}", f"public key {HASH}", f"public_key={HASH}", f"public key: {HASH}",
        f"head {HASH}, 12 entries", "fingerprint 8f0c:8f0c:8f0c:8f0c:8f0c:8f0c:8f0c:8f0c", f"bundle refused: {HASH}",
        "bank/superexec.secret: may be read by others; chmod 600 it", "secret: /var/lib/metarisk/superexec.secret",
        "key 'policy.max_grad_norm' is missing", "unknown key 'datta'; did you mean 'data'?", "the secret is missing",
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----", "https://hub.example.org:9092/v1/fleet",
        "the bearer of news", "monkey ABCDEFGH12345678AB", "node key node.key is not there",
    ],
)  # fmt: skip
def test_what_is_public_stays_readable(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize("name", ["plan_hash", "receipt", "public_key", "sha256", "run_id"])
def test_a_public_field_stays_readable(name: str) -> None:
    assert not is_secret(name, HASH)


@pytest.mark.parametrize(("name", "value"), [("key", "train"), ("secret_path", "/etc/x"), ("token_count", 3)])
def test_a_name_that_only_sounds_secret_is_none(name: str, value: object) -> None:
    assert not is_secret(name, value)


def test_what_is_long_is_cut() -> None:
    assert clean("x" * MAX_TEXT) == "x" * MAX_TEXT
    found = clean("y z" * 5_000)
    assert len(found) < MAX_TEXT + 50
    assert found.endswith("[cut from 15000 characters]")


def test_the_cut_leaves_no_half_secret() -> None:
    for offset in range(len(GENERATED) + 8):
        text = " " * (MAX_TEXT - offset) + f"token {GENERATED}" + " " * 100
        assert GENERATED[:4] not in clean(text)


def test_a_traceback_in_a_text_is_left_out() -> None:
    found = clean("it failed:\nTraceback (most recent call last):\n  File x\nValueError: Ms Vantongeren")
    assert found == "it failed:\n[traceback left out]"


@pytest.mark.parametrize(
    "piece", ["a-", "secret", "key ", "-----BEGIN X-----", "://", "bearer ", "/a", "authorization:", "--", "secret:/a"]
)
def test_a_text_made_to_be_slow_ends(piece: str) -> None:
    # A search that doubles with each repetition never would; the cut holds in whatever is quadratic.
    assert len(clean(piece * 100_000)) < MAX_TEXT * 4

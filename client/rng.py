"""Randomness for privacy: a ChaCha20 keystream under a 256-bit key, as normals and as coin flips.

Torch's and NumPy's generators are predictable from their output (torch's CPU generator has 32 bits of seed): whoever
can guess them can subtract the noise. Here every value comes from a cipher. One instance serves one thread.
"""

import hashlib
import json
import os
import secrets
from math import prod
from typing import Final, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy.special import ndtri

_KEY_BYTES: Final = 32
_BYTES_PER_NONCE: Final = 2**36  # ChaCha20's counter of 64-byte blocks has 32 bits, so it wraps at 2^38 bytes.


class SecureRandom:
    """A stream of random values that nobody without the key can tell from true randomness.

    `is_private` says whether the key came from the operating system; only then does noise protect anybody.
    """

    is_private: bool

    def __init__(self, key: bytes, *, is_private: bool) -> None:
        """Start a stream under a 256-bit key; `from_system` and `seeded` choose the key."""
        if len(key) != _KEY_BYTES:
            raise ValueError("key must have 32 bytes")
        self.is_private = is_private
        self._start(key)

    @classmethod
    def from_system(cls) -> Self:
        """Start a stream under a fresh key from the operating system."""
        return cls(secrets.token_bytes(_KEY_BYTES), is_private=True)

    @classmethod
    def seeded(cls, seed: int, *labels: str | int) -> Self:
        """Start a repeatable stream, for simulations only: the same seed and labels give the same values.

        Different labels (an institution, a round) give independent streams: the key is SHA-256 over all of them.
        """
        text = json.dumps(["metarisk.rng", 1, seed, *labels])  # JSON keeps ("a", 1), ("a1",) and ("a", "1") apart.
        return cls(hashlib.sha256(text.encode()).digest(), is_private=False)

    def normal(self, size: int | tuple[int, ...], std: float) -> NDArray[np.float64]:
        """Draw independent normals of mean 0, shaped `size`; all zero where `std` is 0.

        By inversion of 52-bit uniforms: values lie within 8.3 standard deviations, which leaves out 1e-16 of the mass.
        """
        shape = (size,) if isinstance(size, int) else size
        if std == 0:
            return np.zeros(shape)
        values: NDArray[np.float64] = ndtri(self._uniform(prod(shape)))
        values *= std
        return values.reshape(shape)

    def bernoulli(self, n: int, rate: float) -> NDArray[np.bool_]:
        """Flip `n` independent coins that are true with probability `rate`; exactly all of them at a rate of 1.

        Raises:
            ValueError: the rate is not between 0 and 1.

        """
        if not 0 <= rate <= 1:
            raise ValueError("rate must lie between 0 and 1")
        if rate == 1:
            return np.ones(n, dtype=np.bool_)
        return self._uniform(n) < rate

    def _uniform(self, n: int) -> NDArray[np.float64]:
        # Midpoints of 2^52 cells: (k + 1/2) / 2^52 has 53 bits, so it is exact and is never 0 or 1.
        cells = np.frombuffer(self._keystream(8 * n), dtype="<u8") >> np.uint64(12)
        uniform = cells.astype(np.float64)
        uniform += 0.5
        uniform *= 2.0**-52
        return uniform

    def _keystream(self, count: int) -> bytes:
        if self.is_private and os.getpid() != self._process:
            # A forked process would repeat its parent's noise: it takes a key of its own.
            self._start(secrets.token_bytes(_KEY_BYTES))
        pieces = []
        while count > 0:
            if self._left == 0:
                self._next_nonce()
            take = min(count, self._left)
            pieces.append(self._cipher.update(bytes(take)))
            self._left -= take
            count -= take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _start(self, key: bytes) -> None:
        self._process = os.getpid()
        self._key = key
        self._nonce = -1
        self._next_nonce()

    def _next_nonce(self) -> None:
        self._nonce += 1
        self._left = _BYTES_PER_NONCE
        # OpenSSL's layout: a 32-bit block counter that starts at 0, then the 96-bit nonce.
        nonce = bytes(4) + self._nonce.to_bytes(12, "little")
        self._cipher = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()

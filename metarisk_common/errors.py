"""What can go wrong, as one tree; the exit code of a command is that of the error's class.

* MetariskError (1): the root; catch this one at the edge of a program.

  * ConfigError (2): a file, key or flag says something that cannot be meant.
  * DataError (2): a table does not fit its schema. Names columns and counts, never a value of a row.
  * RefusedError (3): the bank's policy declines; nothing was read and nothing was charged.
  * BudgetExhaustedError (4): the release would pass the ledger's privacy budget; nothing was read.
  * IntegrityError (5): a stored file is not what was written: broken hash chain, wrong digest.
  * ProtocolError (1): a message is malformed, or carries a field that may not travel.
"""

from typing import ClassVar


class MetariskError(Exception):
    """Root of the tree. Its text is for people: what was wrong, where, and what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(MetariskError):
    """A configuration file, key or flag is wrong."""

    exit_code = 2


class DataError(MetariskError):
    """A table does not fit its schema. The text never holds a row's value."""

    exit_code = 2


class RefusedError(MetariskError):
    """The bank's policy declines an order. `code` is one of the constants that may leave the bank."""

    exit_code = 3

    def __init__(self, message: str, *, code: str = "policy") -> None:
        """Keep the reason for the bank in the text and the public constant in `code`."""
        super().__init__(message)
        self.code = code


class BudgetExhaustedError(RefusedError):
    """The next event would pass the privacy budget."""

    exit_code = 4

    def __init__(self, message: str) -> None:
        """Keep the reason; the public constant is always `budget`."""
        super().__init__(message, code="budget")


class IntegrityError(MetariskError):
    """A stored file was changed, truncated or replaced."""

    exit_code = 5


class ProtocolError(MetariskError):
    """A message does not follow the protocol."""

"""What can be wrong with a bank's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsemem.errors import UserError


class BankError(UserError):
    """A bank's folder is foreign, in use, of another version, or could not be read or written."""


class DamagedError(BankError):
    """Files of a bank are missing, torn or changed; the message names the file and the place."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says into one line."""
    try:
        yield
    except OSError as error:
        raise BankError(
            f"cannot write to {path}: {error.strerror or error}; what it held before is as it was"
        ) from error

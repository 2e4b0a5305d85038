"""Errors that a user can mend: the command line prints their one line without a traceback."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sparsemem.errors import UserError

# Torch has a class of its own for a full GPU only, and torch and NumPy have none for a size
# beyond all memory: the message must tell.
_MEMORY = re.compile(
    r"out of memory|can't allocate|allocator|overflow|array is too big|dimension exceeded",
    re.IGNORECASE,
)


class ConfigError(UserError, ValueError):
    """A config value is unknown or not what was expected."""


class CheckpointError(UserError):
    """A checkpoint is foreign, torn, of another model, or could not be written."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing, torn or changed: an older one may be whole."""


class RunError(UserError):
    """A run folder is missing or in use, or training cannot go on."""


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn whatever says that memory is short, or a size beyond all memory, into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        certain = isinstance(error, MemoryError | OverflowError)
        if not certain and not _MEMORY.search(str(error)):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"the config does not fit in memory: {lines[0]}") from error


@contextmanager
def section_errors(name: str | None) -> Iterator[None]:
    """Turn what is refused into a ConfigError that names the section of the config, if given."""
    try:
        with memory_explained():
            yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename and error.strerror else ""
        raise ConfigError(_placed(name, f"{place}{error.strerror or error}")) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(_placed(name, str(error))) from None


def _placed(section: str | None, message: str) -> str:
    """`model.top_k is ...` where a message begins with an option, else `model: ...`."""
    if section is None:
        return message
    return f"{section}{'.' if re.match(r'[a-z_0-9]+ is ', message) else ': '}{message}"

"""What the command lines share: how errors and warnings reach a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sparsemem.errors import UserError

USER_ERROR = 2


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """One clear line (or one for each problem) and exit code 2, without a traceback.

    others: errors that are the user's beside `UserError`.
    """
    expected: tuple[type[Exception], ...] = (UserError, *others)
    try:
        yield
    except expected as error:
        for line in str(error).splitlines() or [type(error).__name__]:
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(USER_ERROR) from None


@contextmanager
def warning_lines() -> Iterator[None]:
    """Warnings of the block as lines, once it ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                typer.echo(f"warning: {warning.message}", err=True)

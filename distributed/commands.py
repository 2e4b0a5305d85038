"""The command line of sharded banks: `sparsemem bank reshard PATH NEW`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemem.console import user_errors, warning_lines
from sparsemem.distributed.reshard import reshard as reshard_bank


def reshard(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a bank.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A new folder.")],
    shards: Annotated[
        int | None,
        typer.Option(help="How many shards.  [default: a bank that is not sharded]"),
    ] = None,
) -> None:
    """Write a bank, sharded or not, into a new folder with this many shards."""
    with user_errors(ValueError, ImportError, MemoryError), warning_lines():
        written = reshard_bank(path, new, shards)
        parts = "not sharded" if shards is None else f"{shards} shards"
        typer.echo(f"{written}: {parts}")

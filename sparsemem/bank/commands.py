"""The command line of banks: `sparsemem bank inspect | verify | export | import PATH`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemem.bank.errors import BankError
from sparsemem.bank.recovery import Summary, inspect_folder, verify_folder
from sparsemem.bank.transfer import export_faiss, export_npy, from_rows, open_rows, read_table
from sparsemem.console import user_errors, warning_lines

app = typer.Typer(help="Look at, check, export and import memory banks.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a bank.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """See `user_errors`; a bank's arguments come from the command line, and warnings are lines."""
    with user_errors(ValueError, ImportError, MemoryError), warning_lines():
        yield


@app.command()
def inspect(path: Folder) -> None:
    """Say what a bank is and what its folder holds, without reading the rows."""
    with _user_errors():
        for line in _lines(path, inspect_folder(path)):
            typer.echo(line)


@app.command()
def verify(path: Folder) -> None:
    """Check every byte: sizes, checksums, contents, and that the logs can be replayed."""
    with _user_errors():
        summary = verify_folder(path)
        typer.echo(
            f"{path} is whole: {len(summary.manifest.files)} files, {summary.operations} logged"
            " operations"
        )


@app.command()
def export(
    path: Folder,
    to: Annotated[
        Path, typer.Option(metavar="FILE", help="rows.npy (ids: rows.ids.npy) or rows.faiss.")
    ],
    values: Annotated[bool, typer.Option("--values", help="Values instead of keys.")] = False,
    factory: Annotated[
        str | None,
        typer.Option(help="Kind of the FAISS index, such as IVF4096,Flat.  [default: Flat]"),
    ] = None,
) -> None:
    """Write the live rows as a NumPy array, or as a FAISS index whose labels are the row ids."""
    with _user_errors():
        if to.suffix not in (".npy", ".faiss", ".index"):
            raise BankError(f"--to is {to}, expected a name that ends in .npy, .faiss or .index")
        if to.suffix == ".npy" and factory is not None:
            raise BankError(f"--factory is {factory}, expected none for a NumPy array ({to})")
        if not to.parent.is_dir():
            raise BankError(f"--to is {to}, expected a file in a folder that is there")
        bank, table = open_rows(path), "values" if values else "keys"
        written: tuple[Path, ...]
        if to.suffix == ".npy":
            written = export_npy(bank, to, table)
        else:
            written = (export_faiss(bank, to, factory or "Flat", table),)
        for file in written:
            typer.echo(str(file))


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new folder for the bank.")],
    from_: Annotated[
        Path,
        typer.Option(
            "--from", metavar="FILE", help="Keys: .npy [n, W], or `weight` in a .safetensors file."
        ),
    ],
    values: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Values [n, V], likewise.")
    ] = None,
    num_rows: Annotated[int | None, typer.Option(help="Rows of the bank.  [default: n]")] = None,
    index: Annotated[str, typer.Option(help="How rows are found.")] = "exact",
    metric: Annotated[str, typer.Option(help="cosine, ip or l2.")] = "cosine",
) -> None:
    """Make a durable bank of the rows of a file."""
    with _user_errors():
        rows = read_table(from_)
        given = None if values is None else read_table(values)
        options: dict[str, Any] = {"index": index, "metric": metric, "path": path}
        bank = from_rows(rows, given, num_rows=num_rows, **options)
        typer.echo(f"{path}: {bank.table.num_live} rows of width {bank.width}")
        bank.close()


def _lines(path: Path, summary: Summary) -> Iterator[str]:
    """What a folder holds, a line each."""
    manifest, arguments = summary.manifest, summary.manifest.arguments
    kind = "durable bank" if manifest.durable else "snapshot of a bank"
    yield f"{path}: {kind}, format version {manifest.version}"
    for name, value in arguments.model_dump().items():
        yield f"    {name:<12} {value}"
    live = sum(shard.rows for shard in manifest.rows)
    size = sum(file.bytes for file in manifest.files)
    yield f"{live} live rows at save {manifest.save}, clock {manifest.clock}"
    yield f"{len(manifest.rows)} shards, {len(manifest.files)} files, {size} bytes"
    if manifest.durable:
        waits = ", each waited for" if manifest.sync else ""
        yield f"{summary.operations} operations logged since, {summary.log_bytes} bytes{waits}"

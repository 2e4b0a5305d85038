"""The command line of sharded banks: `bank reshard`, and their part of `train`, `eval`, `plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemem.bank import MemoryBank
from sparsemem.bank.contract import Bank
from sparsemem.console import user_errors, warning_lines
from sparsemem.distributed.cluster import Wanted
from sparsemem.distributed.home import MANIFEST, read_manifest
from sparsemem.distributed.keeper import BANK, LoadedVersion
from sparsemem.distributed.needs import lines as plan_lines
from sparsemem.distributed.needs import plan_spread
from sparsemem.distributed.reshard import reshard as reshard_bank
from sparsemem.errors import UserError
from sparsemem.training.banks import Keeper, keeper_of
from sparsemem.training.config import Config
from sparsemem.training.run import RunFolder
from sparsemem.training.trainer import Outcome

Shards = Annotated[
    int | None,
    typer.Option("--shards", metavar="S", help="Spread the bank's rows over S processes, by Ray."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Trainers that take a share of every batch each; with --shards.  [default: 1]",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="A Ray cluster that is there: auto, or HOST:PORT; with --shards.  [default: start Ray"
        " on this machine]",
    ),
]


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


def wanted(
    shards: int | None,
    workers: int | None,
    address: str | None = None,
    run: RunFolder | None = None,
) -> Wanted | None:
    """What the options ask for; None: a run without shards. run: one to go on with."""
    folder = None if run is None or not is_sharded(run) else run.path / BANK
    if run is not None and folder is None and shards is not None:
        raise UserError(f"--shards is {shards}, but run {run.path} has none: expected no --shards")
    if shards is None and folder is not None:
        shards = read_manifest(folder).num_shards
    if shards is not None:
        return Wanted(shards, 1 if workers is None else workers, address)
    for name, value in (("--workers", workers), ("--address", address)):
        if value is not None:
            raise UserError(f"{name} is {value}, expected it beside --shards")
    return None


def plan(config: Config, spread: Wanted, as_json: bool) -> str:
    """What a config takes over shards, for people or for programs."""
    found = plan_spread(config, spread)
    return found.model_dump_json(indent=2) if as_json else "\n".join(plan_lines(found))


def start(
    config: Config, path: Path, spread: Wanted, say: Callable[[str], Any], **options: bool
) -> tuple[RunFolder, Outcome]:
    """As `sparsemem.distributed.launch.start`."""
    started: tuple[RunFolder, Outcome] = launching().start(config, path, spread, say, **options)
    return started


def resume(
    run: RunFolder, config: Config, spread: Wanted, say: Callable[[str], Any], **options: bool
) -> Outcome:
    """As `sparsemem.distributed.launch.resume`."""
    outcome: Outcome = launching().resume(run, config, spread, say, **options)
    return outcome


def launching() -> Any:
    """The module that starts runs, which needs Ray with Ray Train."""
    try:
        from sparsemem.distributed import launch
    except ImportError as error:
        raise UserError(
            f"training over shards needs Ray and Ray Train ({str(error).splitlines()[0]}):"
            " pip install 'sparsemem[ray]'"
        ) from None
    return launch


def is_sharded(run: RunFolder) -> bool:
    """Whether a run's rows are in shards."""
    return (run.path / BANK / MANIFEST).is_file()


def keeper_for(run: RunFolder) -> Callable[[Bank | None], Keeper]:
    """Who has the rows of a run's checkpoints: they themselves, or a sharded bank's folder."""

    def keeper(bank: Bank | None) -> Keeper:
        if isinstance(bank, MemoryBank) and is_sharded(run):
            return LoadedVersion(bank, run.path / BANK)
        return keeper_of(bank)

    return keeper

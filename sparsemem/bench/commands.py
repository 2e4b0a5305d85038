"""The command line of benchmarks: `sparsemem bench scaling | compare | peers`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from sparsemem.bench import compare as comparing
from sparsemem.bench.errors import BenchError
from sparsemem.bench.peers import ENVIRONMENTS, GROUPS, PeerSettings, peers
from sparsemem.bench.points import MODEL_ORDERS, BankSettings, ModelSettings
from sparsemem.bench.results import Result, as_csv, as_json, check_folder, read_result, write_files
from sparsemem.bench.scaling import (
    BANK_SIZES,
    ScalingSettings,
    powers,
    scaling,
)
from sparsemem.bench.schedule import Listener
from sparsemem.bench.tables import peers_markdown, scaling_markdown
from sparsemem.checks import nearest
from sparsemem.console import user_errors

BANKS = ("exact", "ivf", "hnsw", "product-key")
SCALING, PEERS = "scaling.json", "peers.json"
NONE = "none"
Settings = TypeVar("Settings", bound=BaseModel)

app = typer.Typer(
    help="Measure how time and memory grow with memory size; compare results.",
    no_args_is_help=True,
)

Budget = Annotated[float, typer.Option(metavar="MINUTES", help="Time that it may take in all.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch and FAISS.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Of each point, while the budget lasts.")]


@app.command("scaling")
def scaling_command(
    models: Annotated[str, typer.Option(help="Names with commas, or 'none'.")] = ",".join(
        MODEL_ORDERS
    ),
    sizes: Annotated[
        str | None, typer.Option(help="Slots with commas, such as 1024,2^20; instead of --min/max.")
    ] = None,
    minimum: Annotated[str, typer.Option("--min", help="Fewest slots.")] = "2^10",
    maximum: Annotated[str, typer.Option("--max", help="Most slots; four times each.")] = "2^30",
    banks: Annotated[str, typer.Option(help="Kinds of index with commas, or 'none'.")] = ",".join(
        BANKS
    ),
    bank_sizes: Annotated[str, typer.Option(help="Rows of banks, with commas.")] = ",".join(
        f"{size:.0e}".replace("e+0", "e") for size in BANK_SIZES
    ),
    budget: Budget = 10.0,
    repetitions: Repetitions = 21,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps; fewer where that would not fit.")] = 100,
    heads: Annotated[int, typer.Option(help="Heads of the models.")] = 4,
    top_k: Annotated[int, typer.Option(help="Rows that a head reads.")] = 4,
    width: Annotated[int, typer.Option(help="Width of a slot, and of a bank's row.")] = 32,
    hidden: Annotated[int, typer.Option(help="Width of the LSTM controller.")] = 100,
    queries: Annotated[int, typer.Option(help="Queries of a read of a bank.")] = 64,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for JSON, CSV, table and pictures.")
    ] = Path("bench-scaling"),
) -> None:
    """Time and peak memory of a step over the number of slots, and of banks over rows.

    Each point is measured in a process of its own, from small to large, then all in turns: medians
    and quartiles. What would not fit into memory or the budget is predicted, left out, and said.
    """
    with _user_errors():
        settings = _checked(
            ScalingSettings,
            models=_names("--models", models, MODEL_ORDERS),
            sizes=_slots(sizes, minimum, maximum),
            banks=_names("--banks", banks, BANKS),
            bank_sizes=_sizes("--bank-sizes", bank_sizes),
            budget_minutes=budget,
            repetitions=repetitions,
            threads=threads,
            model=_checked(
                ModelSettings,
                batch=batch,
                steps=steps,
                heads=heads,
                top_k=top_k,
                width=width,
                hidden=hidden,
            ),
            bank=_checked(BankSettings, width=width, queries=queries),
        )
        if not settings.models and not settings.banks:
            raise BenchError("--models and --banks are none, expected something to measure")
        check_folder(output, SCALING, SCALING_FILES)
        with _listener() as listener:
            result = scaling(settings, listener)
        table = scaling_markdown(result)
        _tell(output, {SCALING: as_json(result), **_others(result, table)}, table)


SCALING_FILES = (SCALING, "scaling.csv", "scaling.md", "models.png", "banks.png")


def _others(result: Result, table: str) -> dict[str, bytes]:
    """Everything but the JSON, pictures where matplotlib is installed."""
    files = {"scaling.csv": as_csv(result), "scaling.md": table.encode()}
    try:
        from sparsemem.bench.pictures import scaling_pictures
    except ImportError as error:
        typer.echo(f"no pictures: {error.name} is not installed (sparsemem[viz])", err=True)
        return files
    return files | scaling_pictures(result)


@app.command("peers")
def peers_command(
    groups: Annotated[str, typer.Option(help="What is compared, with commas.")] = ",".join(GROUPS),
    python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PYTHON",
            help="The Python that a peer is installed in, such as dnc=/path/to/bin/python"
            " (names: dnc, product-key-memory); repeatable.  [default: this one]",
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Slots of the models.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of the models.")] = 20,
    subkeys: Annotated[int, typer.Option(help="Sub-keys; slots are their square.")] = 512,
    rows: Annotated[int, typer.Option(help="Rows of the search.")] = 100_000,
    budget: Budget = 5.0,
    repetitions: Repetitions = 11,
    threads: Threads = 1,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for JSON, CSV and table.")
    ] = Path("bench-peers"),
) -> None:
    """The same work by other packages: dnc, product-key-memory, EmbeddingBag, plain FAISS.

    Install a peer into an environment of its own (python -m venv, pip install dnc) and name its
    Python. A peer that is missing or fails is listed with its error.
    """
    with _user_errors():
        settings = _checked(
            PeerSettings,
            groups=_names("--groups", groups, GROUPS),
            model=_checked(ModelSettings, steps=steps),
            slots=slots,
            subkeys=subkeys,
            rows=rows,
            budget_minutes=budget,
            repetitions=repetitions,
            threads=threads,
        )
        pythons = _pythons(python or [])
        check_folder(output, PEERS, (PEERS, "peers.csv", "peers.md"))
        with _listener() as listener:
            result = peers(settings, pythons, listener)
        shown = peers_markdown(result, GROUPS)
        files = {PEERS: as_json(result), "peers.csv": as_csv(result), "peers.md": shown.encode()}
        _tell(output, files, shown)


def _tell(output: Path, files: dict[str, bytes], table: str) -> None:
    write_files(output, files)
    typer.echo(table)
    typer.echo(f"written to {output}", err=True)


def _pythons(settings: list[str]) -> dict[str, str]:
    """Environments by name; BenchError where there is no such, or no such Python."""
    known, found = set(ENVIRONMENTS.values()), {}
    for setting in settings:
        name, equals, path = setting.partition("=")
        if not equals or name not in known:
            raise BenchError(f"--python {setting}: expected NAME=PYTHON: {nearest(name, known)}")
        if shutil.which(path) is None:
            raise BenchError(f"--python {setting}: {path} cannot be run")
        found[name] = path
    return found


@app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="The result before.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The result after.")],
    all_: Annotated[bool, typer.Option("--all", help="Show what is within noise, too.")] = False,
) -> None:
    """What changed from one result to another, beyond the noise that both show.

    A line gives B by A: below 1 is faster, or smaller. In parentheses is the range that the
    quartiles of both runs leave; a change is told where 1 is outside of it.
    """
    with _user_errors():
        before, after = read_result(a), read_result(b)
        for line in comparing.differing_grounds(before, after):
            typer.echo(f"note: {line}", err=True)
        found = comparing.changes(before, after)
        if not found:
            raise BenchError(f"{a} and {b} have no point in common")
        beyond = [change for change in found if change.beyond_noise]
        for change in found if all_ else beyond:
            typer.echo(change.line())
        for line in comparing.unmatched(before, after):
            typer.echo(line, err=True)
        typer.echo(f"{len(beyond)} of {len(found)} measures changed beyond noise")


@contextmanager
def _user_errors() -> Iterator[None]:
    with user_errors():
        yield


@contextmanager
def _listener() -> Iterator[Listener]:
    """A bar on a terminal, plain lines elsewhere."""
    bar = tqdm(total=0, unit="turn", disable=None, file=sys.stderr, dynamic_ncols=True)

    def total(turns: int) -> None:
        bar.reset(turns)

    try:
        yield Listener(lambda line: bar.write(line, file=sys.stderr), total, lambda: bar.update())
    finally:
        bar.close()


def _checked(kind: type[Settings], **values: Any) -> Settings:
    """Settings from options; BenchError names the option."""
    try:
        return kind(**values)
    except ValidationError as error:
        lines = [
            f"--{str(e['loc'][0]).replace('_', '-')} is {e['input']!r}:"
            f" {e['msg'].replace('Input should be', 'expected')}"
            for e in error.errors()
        ]
        raise BenchError("\n".join(lines)) from None


def _names(option: str, text: str, known: Any) -> tuple[str, ...]:
    if text.strip() in ("", NONE):
        return ()
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise BenchError(f"{option} names {name!r}: {nearest(name, known)}")
    return names


def _sizes(option: str, text: str) -> tuple[int, ...]:
    return tuple(_size(option, part) for part in text.split(","))


def _size(option: str, text: str) -> int:
    """1024, 2^20 or 1e6."""
    base, power, exponent = text.strip().partition("^")
    try:
        value = float(base) ** float(exponent) if power else float(base)
    except (ValueError, OverflowError):
        value = float("nan")
    if not value.is_integer() or not 1 <= value <= 2**62:
        raise BenchError(
            f"{option} has {text.strip()!r}, expected a size such as 1024, 2^20 or 1e6"
        )
    return int(value)


def _slots(sizes: str | None, minimum: str, maximum: str) -> tuple[int, ...]:
    if sizes is not None:
        return _sizes("--sizes", sizes)
    low, high = _size("--min", minimum), _size("--max", maximum)
    if low > high:
        raise BenchError(f"--min is {low}, expected at most --max = {high}")
    return powers(low, high)

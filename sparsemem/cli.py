"""The command line: `sparsemem train | plan | eval | plot | models | tasks | bank | bench`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemem.bank import commands as bank_commands
from sparsemem.bench import commands as bench_commands
from sparsemem.console import user_errors
from sparsemem.distributed import commands as sharded
from sparsemem.distributed.cluster import Wanted
from sparsemem.errors import UserError
from sparsemem.models.registry import MODELS, model_options
from sparsemem.tasks import TASKS, task_options
from sparsemem.training.calibration import plan_seconds
from sparsemem.training.config import Config, load_config
from sparsemem.training.errors import memory_explained
from sparsemem.training.evaluate import Result
from sparsemem.training.launch import evaluate_run, load_run, resume, start
from sparsemem.training.plan import lines as plan_lines
from sparsemem.training.plan import plan_memory
from sparsemem.training.run import RunFolder
from sparsemem.training.threads import set_threads
from sparsemem.training.trainer import Outcome

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="Neural networks with large external memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bank_commands.app.command()(sharded.reshard)
app.add_typer(bank_commands.app, name="bank")
app.add_typer(bench_commands.app, name="bench")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the config; repeatable."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


class Which(StrEnum):
    """Which of a run's checkpoints."""

    best = "best"
    last = "last"


class Split(StrEnum):
    """Which part of the data."""

    test = "test"
    validation = "validation"


Checkpoint = Annotated[Which, typer.Option(help="Lowest validation metric, or the latest.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """See `user_errors`; what does not fit in memory is the user's, too."""
    with user_errors(), memory_explained():
        yield


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="What to train; see examples/.")
    ] = None,
    set_: Set = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Folder for the run.  [default: runs/NAME-OF-CONFIG]"),
    ] = None,
    resume_: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on from the newest checkpoint of a run."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Say where a step's time goes, after some 30 steps; RUN/profile has the table and"
            " a trace for the browser.",
        ),
    ] = False,
    shards: sharded.Shards = None,
    workers: sharded.Workers = None,
    address: sharded.Address = None,
) -> None:
    """Train a model. Ctrl-C saves and leaves; --resume goes on as if nothing had happened.

    With --shards, --workers and --address over several processes or machines: docs/sharding.md.
    """
    with _user_errors():
        if resume_ is not None and run is not None:
            raise UserError("--run and --resume: expected one of them, a run stays in its folder")
        if resume_ is not None:
            folder = RunFolder.open(resume_)
            spread = sharded.wanted(shards, workers, address, folder)
            outcome = _go_on(folder, config, set_ or [], spread, profile)
        elif config is None:
            raise UserError("expected CONFIG.yaml to train, or --resume RUN to go on with a run")
        else:
            spread = sharded.wanted(shards, workers, address)
            folder, outcome = _begin(load_config(config, set_ or []), config, run, spread, profile)
        _report(folder, outcome)
    if outcome is Outcome.INTERRUPTED:
        raise typer.Exit(INTERRUPTED)


def _begin(
    config: Config, file: Path, run: Path | None, spread: Wanted | None, profiled: bool
) -> tuple[RunFolder, Outcome]:
    """Train from the beginning, over shards if these are wanted."""
    path = run or Path("runs") / file.stem
    options = {"numbered": run is None, "profiled": profiled}
    if spread is None:
        return start(config, path, _say, **options)
    return sharded.start(config, path, spread, _say, **options)


def _go_on(
    folder: RunFolder,
    config: Path | None,
    changes: list[str],
    spread: Wanted | None,
    profiled: bool,
) -> Outcome:
    """Go on with a run."""
    wanted = load_config(config, changes) if config else folder.config(changes)
    if spread is None:
        return resume(folder, wanted, _say, profiled=profiled)
    return sharded.resume(folder, wanted, spread, _say, profiled=profiled)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="See examples/.")],
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; sizes in bytes.")] = False,
    shards: sharded.Shards = None,
    workers: sharded.Workers = None,
) -> None:
    """Predict what training a config takes: memory, disk, network, time. Nothing is trained.

    Memory is added up without allocating it; time comes from some short steps on this machine (a
    few seconds). `train` refuses what cannot fit into this machine's memory. For a GPU that is not
    here, memory alone. With --shards: memory of each process, and what a step sends.
    """
    with _user_errors():
        spread = sharded.wanted(shards, workers)
        if spread is not None:
            typer.echo(sharded.plan(load_config(config, set_ or []), spread, as_json))
            return
        planned = plan_memory(load_config(config, set_ or []))
        found = planned.plan
        if found.fits and found.device_here:
            found = found.model_copy(update={"seconds": plan_seconds(planned)})
        typer.echo(found.model_dump_json(indent=2) if as_json else "\n".join(plan_lines(found)))


@app.command("eval")
def eval_(
    run: RunArgument,
    set_: Set = None,
    checkpoint: Checkpoint = Which.best,
    split: Annotated[Split, typer.Option(help="The part of the data.")] = Split.test,
) -> None:
    """Evaluate a run; `--set evaluation.level=20` asks for longer sequences than in training."""
    with _user_errors():
        folder, config = _open(run, set_)
        rows = sharded.keeper_for(folder)
        result, step = evaluate_run(folder, config, checkpoint.value, split.value, rows)
        for line in _table(result, step):
            typer.echo(line)
        folder.write_evaluation({"step": step, "checkpoint": checkpoint.value, **result._asdict()})


@app.command()
def plot(run: RunArgument, set_: Set = None, checkpoint: Checkpoint = Which.best) -> None:
    """Draw the learning curve and what the memory does into the run's pictures folder."""
    with _user_errors():
        folder, config = _open(run, set_)
        try:
            from sparsemem.training import plots
        except ImportError as error:
            raise UserError(
                f"plot needs {error.name}, which is not installed: pip install 'sparsemem[viz]'"
            ) from None
        setup, _ = load_run(folder, config, checkpoint.value, sharded.keeper_for(folder))
        for path in plots.plot_run(folder, setup):
            typer.echo(str(path))


@app.command()
def models() -> None:
    """List the models and their options (section `model` of a config)."""
    _list(MODELS, model_options, {"input_size", "output_size"})


@app.command()
def tasks() -> None:
    """List the tasks and their options (section `task` of a config)."""
    _list(TASKS, task_options, {"seed", "batch_size", "split", "dtype"})


def _open(run: Path, overrides: list[str] | None) -> tuple[RunFolder, Config]:
    """A run's folder and its config with changes; `set_threads`."""
    folder = RunFolder.open(run)
    config = folder.config(overrides or [])
    set_threads(config)
    return folder, config


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _report(run: RunFolder, outcome: Outcome) -> None:
    """How training ended and what to do next."""
    if outcome is Outcome.INTERRUPTED:
        _say(f"saved {run.newest_checkpoint()}; go on with: sparsemem train --resume {run.path}")
        return
    _say(f"{outcome.value}; run {run.path}, best checkpoint {run.best_checkpoint().name}")
    _say(f"next: sparsemem eval {run.path}, sparsemem plot {run.path}")


def _table(result: Result, step: int) -> Iterator[str]:
    """The result, and a line for each part of the data where the task tells them apart."""
    yield f"checkpoint of step {step}, {result.split} split"
    for name, value in (result.per_task or {}).items():
        yield f"  {name:<12} {result.metric_name} {value:.4g}"
    yield f"loss {result.loss:.4g}, slots touched {result.touched:.0f} a sequence"
    yield result.line()


def _list(
    kinds: Mapping[str, type], options: Callable[[str], Mapping[str, Any]], hidden: set[str]
) -> None:
    for name, kind in kinds.items():
        typer.echo(f"{name:<20} {(inspect.getdoc(kind) or '').splitlines()[0]}")
        for option, default in options(name).items():
            if option not in hidden:
                required = default is inspect.Parameter.empty
                typer.echo(f"    {option:<20} {'required' if required else repr(default)}")


def main() -> None:
    """Entry point of the command `sparsemem`."""
    app()


if __name__ == "__main__":
    main()

"""Starting, resuming and evaluating runs: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsemem.bank.contract import Bank
from sparsemem.training.banks import Keeper, check_bank_section, keeper_of, make_bank
from sparsemem.training.checkpoint import list_checkpoints, load_checkpoint
from sparsemem.training.config import Config
from sparsemem.training.errors import ConfigError, DamagedError
from sparsemem.training.evaluate import Result, evaluate
from sparsemem.training.plan import check_fits
from sparsemem.training.run import RunFolder, claim_folder
from sparsemem.training.setup import (
    Setup,
    check_split,
    device_of,
    differing_keys,
    load_model,
    prepare,
)
from sparsemem.training.trainer import Outcome, Trainer

KeeperFor = Callable[[Bank | None], Keeper]

# What may change between the parts of a run. Anything else would make it another run.
RESUME_MAY_CHANGE = {
    "training.steps",
    "training.stop_below",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.threads",
    "training.device",
    "training.capture",
    "task.path",
    "task.qa3_path",
}


def start(
    config: Config,
    path: Path,
    announce: Callable[[str], Any] = print,
    *,
    numbered: bool = False,
    profiled: bool = False,
) -> tuple[RunFolder, Outcome]:
    """Train from the beginning in a new run folder; returns it, and why training ended.

    `numbered`: where `path` is taken, take `path`-2, `path`-3, ... `profiled`: as `Trainer.train`.
    """
    check_fits(config)
    trainer = _trainer(prepare(config))
    run = RunFolder.create(claim_folder(path) if numbered else path, trainer.config)
    announce(f"run {run.path}")
    with run.lock():
        return run, trainer.train(run, profiled=profiled)


def resume(
    run: RunFolder,
    config: Config,
    announce: Callable[[str], Any] = print,
    *,
    profiled: bool = False,
) -> Outcome:
    """Go on from a run's newest checkpoint; nothing is changed before all is checked.

    ConfigError if `config` differs from the run's own in more than `RESUME_MAY_CHANGE`.
    """
    check_fits(config)
    setup = prepare_blank(config)
    check_same_run(run, setup.config)
    trainer = _trainer(setup)
    with run.lock():
        with _older_checkpoint_named(run):
            trainer.restore(run.newest_checkpoint())
        check_steps(run, config, trainer.step)
        run.cut_metrics(trainer.step)
        run.write_config(setup.config)
        announce(f"run {run.path}, going on from step {trainer.step}")
        return trainer.train(run, profiled=profiled)


@contextmanager
def _older_checkpoint_named(run: RunFolder) -> Iterator[None]:
    """Let an error about a damaged newest checkpoint say how to go on from the one before."""
    try:
        yield
    except DamagedError as error:
        found = [path for _, path in list_checkpoints(run.checkpoints)]
        if len(found) > 1 and f"{found[-1]}/" in str(error):
            raise DamagedError(
                f"{error}; remove {found[-1]} to go on from {found[-2].name}"
            ) from None
        raise


def _trainer(setup: Setup) -> Trainer:
    if setup.config.training.evaluate_every is not None:
        check_split(setup, "validation")
    return Trainer(setup)


def check_steps(run: RunFolder, config: Config, done: int) -> None:
    """ConfigError if a run has done more steps than there are to be."""
    if done > config.training.steps:
        raise ConfigError(
            f"training.steps is {config.training.steps}, expected at least {done}, the steps that"
            f" run {run.path} has done"
        )


def check_same_run(run: RunFolder, config: Config) -> None:
    """ConfigError if a config differs from a run's in more than `RESUME_MAY_CHANGE`."""
    old, new = run.config().model_dump(), config.model_dump()
    schedule = config.training.schedule.name
    for path in differing_keys(old, new):
        if path == "training.steps" and schedule != "constant":
            raise ConfigError(
                f"training.steps is {_value(new, path)}, expected {_value(old, path)} as in"
                f" {run.config_file}: the {schedule} schedule depends on it"
            )
        if path not in RESUME_MAY_CHANGE:
            raise ConfigError(
                f"{path} is {_value(new, path)!r}, expected {_value(old, path)!r} as in"
                f" {run.config_file}: a resumed run may change only"
                f" {', '.join(sorted(RESUME_MAY_CHANGE))}"
            )


def prepare_blank(config: Config) -> Setup:
    """`prepare` for what a checkpoint fills: the bank's rows are there once they are loaded."""
    if config.bank is None:
        return prepare(config)
    check_bank_section(config)
    return prepare(config, make_bank(config, device=device_of(config), initial="empty"))


def _value(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key)
    return tree


def load_run(
    run: RunFolder, config: Config, which: str = "best", keeper_for: KeeperFor = keeper_of
) -> tuple[Setup, int]:
    """What a run's config names, with the parameters of its best or last checkpoint, and its step.

    `config` may differ from the run's own in anything that leaves the parameters' shapes.
    keeper_for: who has the rows of its checkpoints; by default they are in the checkpoints.
    """
    setup = prepare_blank(config)
    with _older_checkpoint_named(run):
        path = run.best_checkpoint() if which == "best" else run.newest_checkpoint()
        checkpoint = load_checkpoint(path)
    load_model(setup, checkpoint, keeper_for(setup.bank))
    return setup, int(checkpoint.manifest["step"])


def evaluate_run(
    run: RunFolder,
    config: Config,
    which: str = "best",
    split: str = "test",
    keeper_for: KeeperFor = keeper_of,
) -> tuple[Result, int]:
    """Evaluate a run's checkpoint; returns the result and the checkpoint's step. As `load_run`."""
    setup, step = load_run(run, config, which, keeper_for)
    check_split(setup, split)
    wanted = setup.config.evaluation
    assert wanted.level is not None  # resolved
    result = evaluate(
        setup.model, setup.evaluation_task, split=split, level=wanted.level, batches=wanted.batches
    )
    return result, step

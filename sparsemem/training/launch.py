"""Starting, resuming and evaluating runs: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsemem.training.checkpoint import load_checkpoint
from sparsemem.training.config import Config
from sparsemem.training.errors import ConfigError
from sparsemem.training.evaluate import Result, evaluate, predictor
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import Setup, check_split, differing_keys, load_model, prepare
from sparsemem.training.trainer import Outcome, Trainer

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
    "task.path",
    "task.qa3_path",
}


def start(config: Config, path: Path, announce: Callable[[str], Any] = print) -> Outcome:
    """Train from the beginning in a new run folder."""
    trainer = _trainer(prepare(config))
    run = RunFolder.create(path, trainer.config)
    announce(f"run {path}")
    with run.lock():
        return trainer.train(run)


def resume(run: RunFolder, config: Config, announce: Callable[[str], Any] = print) -> Outcome:
    """Go on from a run's newest checkpoint; nothing is changed before all is checked.

    ConfigError if `config` differs from the run's own in more than `RESUME_MAY_CHANGE`.
    """
    setup = prepare(config)
    _check_same_run(run, setup.config)
    trainer = _trainer(setup)
    with run.lock():
        trainer.restore(run.newest_checkpoint())
        run.cut_metrics(trainer.step)
        run.write_config(setup.config)
        announce(f"run {run.path}, going on from step {trainer.step}")
        return trainer.train(run)


def _trainer(setup: Setup) -> Trainer:
    if setup.config.training.evaluate_every is not None:
        check_split(setup, "validation")
    return Trainer(setup)


def _check_same_run(run: RunFolder, config: Config) -> None:
    old, new = run.config().model_dump(), config.model_dump()
    for path in differing_keys(old, new):
        if path not in RESUME_MAY_CHANGE:
            raise ConfigError(
                f"{path} is {_value(new, path)!r}, expected {_value(old, path)!r} as in"
                f" {run.config_file}: a resumed run may change only"
                f" {', '.join(sorted(RESUME_MAY_CHANGE))}"
            )


def _value(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key)
    return tree


def load_run(run: RunFolder, config: Config, which: str = "best") -> tuple[Setup, int]:
    """What a run's config names, with the parameters of its best or last checkpoint, and its step.

    `config` may differ from the run's own in anything that leaves the parameters' shapes.
    """
    setup = prepare(config)
    path = run.best_checkpoint() if which == "best" else run.newest_checkpoint()
    checkpoint = load_checkpoint(path)
    load_model(setup.model, checkpoint, setup.config)
    return setup, int(checkpoint.manifest["step"])


def evaluate_run(
    run: RunFolder, config: Config, which: str = "best", split: str = "test"
) -> tuple[Result, int]:
    """Evaluate a run's checkpoint and write eval.json; returns the result and the step."""
    setup, step = load_run(run, config, which)
    check_split(setup, split)
    wanted = setup.config.evaluation
    assert wanted.level is not None  # resolved
    result = evaluate(
        setup.model, setup.evaluation_task, split=split, level=wanted.level, batches=wanted.batches
    )
    errors = getattr(setup.evaluation_task, "per_task_errors", None)
    if errors is not None and wanted.batches is None:
        predict = predictor(setup.model)
        result = result._replace(
            per_task={f"task {k}": v for k, v in errors(predict, split).items()}
        )
    run.write_evaluation({"step": step, "checkpoint": which, **result._asdict()})
    return result, step

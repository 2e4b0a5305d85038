"""Ray Train: how a team of trainers is started, started again, and when that is no use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError

from sparsemem.distributed.cluster import Group
from sparsemem.distributed.worker import TrainerFailed, Work, work
from sparsemem.errors import UserError
from sparsemem.training.checkpoint import list_checkpoints
from sparsemem.training.errors import RunError

MOST_LOSSES = 100  # of trainers, in one run
MOST_FAILURES = 3  # by errors of theirs, without a checkpoint in between
FOLDER = ".ray"  # of Ray Train, in the run's folder


@dataclass
class OwnGroup(TorchConfig):
    """Trainers join their torch.distributed group themselves: see `sparsemem.distributed.team`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """One that does nothing."""
        return Backend


class GivingUp(UserCallback):
    """Ends training where it would fail again; called in Ray Train's controller.

    A trainer that dies is started again, with all others. So are those whose errors may come of
    that: where the connection to one that dies breaks, say. What a user can mend is told at once,
    and what comes again and again, too.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints, self._count = checkpoints, 0
        self._newest: list[tuple[int, Path]] = []

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise what ends the run."""
        errors = list(worker_exceptions.values())
        for error in errors:
            if isinstance(error, UserError):
                raise error
        newest = list_checkpoints(self._checkpoints)[-1:]
        if newest != self._newest or not all(isinstance(e, TrainerFailed) for e in errors):
            self._newest, self._count = newest, 0
        self._count += all(isinstance(error, TrainerFailed) for error in errors)
        if self._count >= MOST_FAILURES:
            raise errors[0]


def trainers(given: Work, worker: Group) -> Any:
    """A team over the shards that are there."""
    resources = {"CPU": worker.each.cpus, "memory": worker.each.memory}
    gpus = worker.each.gpus
    make: Any = TorchTrainer  # whose annotations are those of Ray Train's first version
    callbacks: Any = [GivingUp(given.run / "checkpoints")]
    return make(
        work,
        train_loop_config=given._asdict(),
        torch_config=OwnGroup(),
        scaling_config=ScalingConfig(
            num_workers=worker.number,
            use_gpu=gpus > 0,
            resources_per_worker=resources | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=FOLDER,
            storage_path=str(given.run),
            failure_config=FailureConfig(max_failures=MOST_LOSSES),
            callbacks=callbacks,
        ),
    )


def fitted(trainer: Any) -> str:
    """Train; returns what member 0 does. Raises what ended the run as the trainer raised it."""
    try:
        return str(trainer.fit().return_value)
    except ControllerError as error:
        cause = error.controller_failure
        if isinstance(cause, UserError | TrainerFailed):
            raise cause from None
        raise RunError(f"the trainers cannot be started: {last_line(cause)}") from error
    except (TrainingFailedError, RayError) as error:
        raise RunError(f"the trainers were lost too often: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """What an error says in the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

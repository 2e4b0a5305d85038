"""What each trainer of a team does: an actor of Ray Train runs `work`."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.collective
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.desk import Answer, Reporter, Word
from sparsemem.distributed.keeper import Versions, go_back
from sparsemem.distributed.metrics import RunMetrics
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.rayshards import RayShards
from sparsemem.distributed.team import GroupTeam, join, leave
from sparsemem.errors import UserError
from sparsemem.training.config import Config, make_config
from sparsemem.training.errors import RunError
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Outcome, Trainer

SESSION = ".session"  # of a run's folder: what its driver wrote there


class TrainerFailed(Exception):
    """Something that is not the user's went wrong in a trainer, or with its peers."""


class Work(NamedTuple):
    """What a trainer is given."""

    run: Path
    bank: Path
    config: dict[str, Any]
    session: str
    actors: Sequence[ActorHandle[Any]]  # shards
    timeout: float  # seconds that a shard may take
    desk: ActorHandle[Any]
    profiled: bool


def work(given: Mapping[str, Any]) -> str:
    """Train as a member of the team; returns the name of the `Outcome`."""
    try:
        return train(Work(**given))
    except UserError:
        raise
    except Exception:
        raise TrainerFailed(traceback.format_exc()) from None


def train(work: Work) -> str:
    """Join the team, go back with all to the newest checkpoint, and train on from there."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    config, run = make_config(work.config), seen_run(work, rank)
    config.training.capture = "off"  # over a bank there is nothing to capture
    shards = RayShards(work.actors, work.timeout)
    newest = None
    if rank == 0:
        newest = go_back(run, open_bank(work.bank, shards.another()))
    agreed = ray.train.collective.broadcast_from_rank_zero
    newest = agreed(newest)
    on_gpu = torch.device(config.training.device).type == "cuda"
    join(rank, size, own_address(), agreed, on_gpu=on_gpu)
    bank = open_bank(work.bank, shards.another(), worker=rank, num_workers=size)
    outcome = train_together(work, config, run, bank, newest)
    leave()
    return outcome.name


def train_together(
    work: Work, config: Config, run: RunFolder, bank: ShardedBank, newest: Path | None
) -> Outcome:
    """Train with the team from a checkpoint on, or from the start."""
    team = GroupTeam()
    trainer = Trainer(prepare(config, bank), team, Versions(bank, run))
    if newest is not None:
        trainer.restore(newest)
    reporter = DeskReporter(work, trainer.step)
    if team.rank == 0 and ray.get(work.desk.begin.remote()):
        reporter.say(f"trainers were lost, others go on from step {trainer.step}")
    return trainer.train(run, reporter, work.profiled, reporter.stop)


def seen_run(work: Work, rank: int) -> RunFolder:
    """The run's folder, once it is known to be the driver's."""
    session = work.run / SESSION
    with suppress(OSError):
        if session.read_text() == work.session:
            return RunFolder(work.run)
    raise RunError(
        f"worker {rank} on node {own_address()} does not see {session}: run and bank have to be"
        " in a folder that all nodes share"
    )


def own_address() -> str:
    """Of this node, which the others reach it by."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class DeskReporter(Reporter):
    """Leaves word at the driver's desk, and shows the run to Prometheus."""

    def __init__(self, work: Work, step: int) -> None:
        self._desk, self._metrics = work.desk, RunMetrics(str(work.run))
        super().__init__(self._leave_at_desk, step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Values that were recorded."""
        super().log(step, values)
        self._metrics.report(step, values["loss"])

    def _leave_at_desk(self, words: list[Word]) -> Answer:
        under_way: Any = self._desk.leave.remote(words)

        def answer(patience: float) -> bool | None:
            try:
                return bool(ray.get(under_way, timeout=patience))
            except GetTimeoutError:
                return None

        return answer

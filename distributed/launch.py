"""Runs over a sharded bank: what the command line does, as functions.

The driver is the process that asked for the run. It starts the shards, which end with it, and Ray
Train, which starts the trainers, and starts them again where one is lost; it shows what they leave
at its desk.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sparsemem.distributed.cluster import Group, Wanted, check_fits
from sparsemem.distributed.connecting import connected, free_nodes
from sparsemem.distributed.desk import Desk, Shown, show
from sparsemem.distributed.home import read_manifest
from sparsemem.distributed.keeper import BANK
from sparsemem.distributed.needs import groups_of
from sparsemem.distributed.rayshards import RayShards
from sparsemem.distributed.trainers import fitted, last_line, trainers
from sparsemem.distributed.trying import create_bank, tried
from sparsemem.distributed.worker import SESSION, Work
from sparsemem.files import replace_file
from sparsemem.training.checkpoint import list_checkpoints
from sparsemem.training.config import Config
from sparsemem.training.errors import ConfigError, RunError
from sparsemem.training.launch import check_same_run, check_steps
from sparsemem.training.run import RunFolder, claim_folder
from sparsemem.training.setup import Setup
from sparsemem.training.signals import stop_on_signal
from sparsemem.training.trainer import Outcome

SHARD_SECONDS = 180.0  # that a shard may take, or be gone for
LOOK_SECONDS = 0.2  # between two looks at the desk


def start(
    config: Config,
    path: Path,
    wanted: Wanted,
    announce: Callable[[str], Any] = print,
    *,
    numbered: bool = False,
    profiled: bool = False,
) -> tuple[RunFolder, Outcome]:
    """Train from the beginning in a new run folder; returns it, and why training ended.

    As `sparsemem.training.launch.start`. Every node has to see the run's folder. ClusterError,
    with the sum, where the run does not fit.
    """
    setup = tried(config, wanted)
    groups = groups_of(setup.config, wanted)
    with connected(wanted.address, groups) as where:
        check_fits(free_nodes(), groups, where)
        run = RunFolder.create(claim_folder(path) if numbered else path, setup.config)
        create_bank(run.path / BANK, setup.config, wanted.shards)
        announce(f"run {run.path}")
        with run.lock():
            return run, drive(run, setup, groups, profiled)


def resume(
    run: RunFolder,
    config: Config,
    wanted: Wanted,
    announce: Callable[[str], Any] = print,
    *,
    profiled: bool = False,
) -> Outcome:
    """Go on from a run's newest checkpoint, or from its beginning if it has none.

    As `sparsemem.training.launch.resume`; the number of workers may be another.
    """
    there = read_manifest(run.path / BANK).num_shards
    check_steps(run, config, newest_step(run))
    if wanted.shards != there:
        raise ConfigError(
            f"--shards is {wanted.shards}, expected {there}, as the bank of {run.path} has"
        )
    setup = tried(config, wanted)
    check_same_run(run, setup.config)
    groups = groups_of(setup.config, wanted)
    with connected(wanted.address, groups) as where:
        check_fits(free_nodes(), groups, where)
        with run.lock():
            run.write_config(setup.config)
            announce(f"run {run.path}, going on from step {newest_step(run)}")
            return drive(run, setup, groups, profiled)


def newest_step(run: RunFolder) -> int:
    """The step of a run's newest checkpoint, 0 where there is none."""
    return max((step for step, _ in list_checkpoints(run.checkpoints)), default=0)


def drive(run: RunFolder, setup: Setup, groups: list[Group], profiled: bool) -> Outcome:
    """Start shards and trainers, show how far they are, and wait for their end."""
    path, session = run.path.absolute(), uuid.uuid4().hex
    replace_file(path / SESSION, session.encode())
    shard, worker = groups
    own = {"num_cpus": shard.each.cpus, "memory": int(shard.each.memory)}
    steps, metric = setup.config.training.steps, setup.task.metric_name
    with closing(RayShards.start(path / BANK, timeout=SHARD_SECONDS, **own)) as shards:
        desk = desk_here()
        work = Work(
            run=path,
            bank=path / BANK,
            config=setup.config.model_dump(),
            session=session,
            actors=shards.actors,
            timeout=SHARD_SECONDS,
            desk=desk,
            profiled=profiled,
        )
        with closing(Shown(steps, newest_step(run), metric)) as progress:
            try:
                return Outcome[followed(Fitting(work, worker), desk, progress)]
            except RayError as error:
                what = f"Ray is gone: {last_line(error)}; go on with --resume {run.path}"
                raise RunError(what) from error


def desk_here() -> Any:
    """A desk on this node, which takes no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    actor: Any = ray.remote(**options)(Desk)
    return actor.remote()


class Fitting(threading.Thread):
    """Ray Train at work, beside the thread that hears signals."""

    def __init__(self, work: Work, worker: Group) -> None:
        super().__init__(daemon=True, name="Ray Train")
        self._work, self._worker = work, worker
        self._outcome = ""
        self._error: BaseException | None = None

    def run(self) -> None:
        """Train to the end."""
        try:
            self._outcome = fitted(trainers(self._work, self._worker))
        except BaseException as error:
            self._error = error

    def outcome(self) -> str:
        """Its name; or the error that it ended with is raised."""
        if self._error is not None:
            raise self._error
        return self._outcome


def followed(fitting: Fitting, desk: Any, progress: Shown) -> str:
    """Show what is left at the desk until training ends; the name of its outcome."""
    with stop_on_signal() as stop:
        fitting.start()
        while fitting.is_alive():
            show(ray.get(desk.fetch.remote()), progress)
            if stop.number is not None:
                desk.stop.remote()
            fitting.join(LOOK_SECONDS)
        show(ray.get(desk.fetch.remote()), progress)
    return fitting.outcome()

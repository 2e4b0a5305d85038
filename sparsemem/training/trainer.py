"""The training loop: batches, metrics, validation, checkpoints, and going on from them.

Everything that later steps depend on is in the checkpoint: model, optimisers, the bank's rows,
learning rate, curriculum, random state, step (which is the position in the data), and the sums of
the metrics not yet recorded. So a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.watching import is_table
from sparsemem.checks import NotFiniteError
from sparsemem.training.banks import Fill, Keeper, dense_state, keeper_of
from sparsemem.training.bptt import BatchResult, Diverged, train_batch
from sparsemem.training.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    optimiser_tensors,
    prune_checkpoints,
    restore_optimiser,
    save_checkpoint,
)
from sparsemem.training.curriculum import make_curriculum
from sparsemem.training.errors import CheckpointError, RunError
from sparsemem.training.evaluate import Result, evaluate
from sparsemem.training.optimisers import make_optimisers, make_schedule
from sparsemem.training.profiling import Profile
from sparsemem.training.progress import Progress, Silent
from sparsemem.training.regions import region
from sparsemem.training.run import MetricsLog, NoLog, RunFolder
from sparsemem.training.setup import Setup, as_trained, describe, load_model, package_version
from sparsemem.training.signals import Stop, stop_on_signal
from sparsemem.training.team import ALONE, Team, check_shares
from sparsemem.training.threads import set_threads

Log = MetricsLog | NoLog


class Outcome(Enum):
    """Why training ended."""

    FINISHED = "all steps are done"
    REACHED = "the validation metric is under training.stop_below"
    INTERRUPTED = "a signal asked to stop"


class Trainer:
    """Trains what `prepare` made; `restore` before `train` goes on from a checkpoint.

    In a team every member has a trainer of the same config, whose model reads the same shards; all
    make the same calls. Member 0 alone writes, validates and saves.

    Args:
        setup: what is trained.
        team: who trains together.
        keeper: how checkpoints keep the bank's rows; None: the one that suits a bank in this
            process, or none.
    """

    def __init__(self, setup: Setup, team: Team = ALONE, keeper: Keeper | None = None) -> None:
        """Make optimisers, schedules and curriculum; `set_threads`.

        ConfigError if a batch cannot be shared out evenly; ValueError for a team with a bank in
        this process.
        """
        if team.size > 1 and isinstance(setup.bank, MemoryBank):
            raise ValueError(
                f"team has {team.size} members, which each have a bank of their own: expected one"
                " over shards"
            )
        self.setup, self.team = setup, team
        self.config, self.task, self.model = setup.config, setup.task, setup.model
        self.keeper = keeper_of(setup.bank) if keeper is None else keeper
        training = self.config.training
        check_shares(training.batch_size, team.size)
        set_threads(self.config)
        self.device = next(self.model.parameters()).device
        self.trained = team.wrapped(as_trained(self.config, self.model))
        self.optimisers = make_optimisers(self.config, self.model)
        self.schedules = [
            make_schedule(optimiser, training.schedule, training.steps)
            for optimiser in self.optimisers.each
        ]
        self.curriculum = make_curriculum(self.config.curriculum, training.seed)
        self.step = 0  # steps done, and the index of the next batch
        self.sums: dict[str, float] = {}  # of metrics since they were last recorded
        self.validation: dict[str, float] | None = None  # the last one
        self.best: dict[str, float] | None = None
        self.seconds = 0.0
        self.profile: Profile | None = None
        self._saved: tuple[int, Path] | None = None  # step and path of the newest checkpoint

    # The loop ------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this is the member that writes, validates and saves."""
        return self.team.rank == 0

    def train(
        self,
        run: RunFolder,
        progress: Progress | None = None,
        profiled: bool = False,
        stop: Stop | None = None,
    ) -> Outcome:
        """Train to the last step, or until a signal or `stop_below` ends it; saves at the end.

        profiled: say where the time of the first steps goes, and write it to the run's folder.
        stop: asks to stop once it has a number; None: signals do.
        The caller of member 0 holds `run.lock()`.
        RunError if the loss is no longer finite: it names the step and the checkpoint to
        go back to, which stays as it is.
        """
        log = MetricsLog(run, self.step) if self.leads else NoLog()
        if not self.leads:
            progress = Silent()
        elif progress is None:
            progress = Progress(self.config.training.steps, self.step, self.task.metric_name)
        signals = stop_on_signal() if stop is None else nullcontext(stop)
        with closing(progress), closing(log), signals as stop:
            if profiled and self.leads:
                self.profile = Profile(self.model, run.profile, progress.say)
            for line in describe(self.config, self.model).splitlines():
                progress.say(line)
            while (outcome := self._outcome(stop)) is None:
                self._one_step(run, log, progress)
            if outcome is Outcome.INTERRUPTED:
                progress.say("asked to stop: saving; once more leaves at once, without saving")
            self._save(run, log)
            if self.profile is not None:
                self.profile.close()
        return outcome

    def _outcome(self, stop: Stop) -> Outcome | None:
        training, asked = self.config.training, self.team.asked(stop.number is not None)
        if (
            training.stop_below is not None
            and self.validation is not None
            and self.validation["metric"] < training.stop_below
        ):
            return Outcome.REACHED
        if self.step >= training.steps:
            return Outcome.FINISHED
        return Outcome.INTERRUPTED if asked else None

    def _one_step(self, run: RunFolder, log: Log, progress: Progress) -> None:
        """A batch, and what is due after it."""
        start = time.perf_counter()
        training = self.config.training
        rate = float(self.schedules[0].get_last_lr()[0])
        level = self.curriculum.level(self.step)
        with nullcontext() if self.profile is None else self.profile.step():
            result = self._train_batch(level)
        self.step += 1
        if self.curriculum.update(result.loss):
            progress.say(f"step {self.step}: levels up to {self.curriculum.hardest} from here on")
        means = self._add(result, level)
        self.seconds += time.perf_counter() - start
        progress.step(means)
        if self._due(training.log_every):
            values = {**means, "learning_rate": rate, "seconds": self.seconds}
            log.write("train", self.step, values)
            progress.log(self.step, values)
            self.sums = {}
        improved = self._due(training.evaluate_every) and self._validate(log, progress)
        if improved or self._due(training.checkpoint_every):
            self._save(run, log)

    def _train_batch(self, level: int) -> BatchResult:
        """One batch and the learning rate's step: means over the team. RunError if it diverged."""
        training = self.config.training
        with region("data"):
            batch = self.task.batch(self.step, level).to(self.device)
        with self._explained(f"at step {self.step + 1} (level {level})"):
            result = train_batch(
                self.trained,
                self.task,
                self.optimisers,
                batch,
                training.truncate,
                training.gradient_clip,
                self.team,
            )
        for schedule in self.schedules:
            schedule.step()
        return BatchResult(*self.team.means(result))

    @contextmanager
    def _explained(self, where: str) -> Iterator[None]:
        """Turn whatever says that numbers are not finite into a RunError."""
        try:
            yield
        except (Diverged, NotFiniteError) as error:
            raise self._diverged(f"{error} {where}") from None

    def _diverged(self, what: str) -> RunError:
        back = f"the last checkpoint is {self._saved[1]}" if self._saved else "no checkpoint yet"
        return RunError(
            f"{what}; {back}; a new run with a lower learning rate or gradient_clip may help"
        )

    def _add(self, result: BatchResult, level: int) -> dict[str, float]:
        """Add a batch to the sums; returns the means since the last record."""
        values = {**result._asdict(), "level": float(level)}
        self.sums = {key: self.sums.get(key, 0.0) + value for key, value in values.items()} | {
            "count": self.sums.get("count", 0.0) + 1
        }
        return {key: self.sums[key] / self.sums["count"] for key in values}

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _validate(self, log: Log, progress: Progress) -> bool:
        """Evaluate on the validation split; True if it was never better."""
        start = time.perf_counter()
        with self._explained(f"in validation at step {self.step}"):
            found = self._evaluate(log, progress) if self.leads else (0.0, 0.0)
        loss, metric = self.team.told(found)
        self.seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss} at step {self.step}")
        self.validation = {"step": self.step, "metric": metric}
        improved = self.best is None or metric < self.best["metric"]
        if improved:
            self.best = self.validation
        return improved

    def _evaluate(self, log: Log, progress: Progress) -> tuple[float, float]:
        """Loss and metric on the validation split, which are recorded if they are finite."""
        start = time.perf_counter()
        wanted = self.config.evaluation
        assert wanted.level is not None  # resolved
        result: Result = evaluate(
            self.model,
            self.setup.evaluation_task,
            split="validation",
            level=wanted.level,
            batches=wanted.batches,
        )
        if math.isfinite(result.loss):
            values = {
                "loss": result.loss,
                "metric": result.metric,
                "level": float(result.level),
                "touched": result.touched,
                "seconds": self.seconds + time.perf_counter() - start,
            }
            log.write("validation", self.step, values)
            progress.say(f"step {self.step}: validation {result.line()}")
        return result.loss, result.metric

    # Checkpoints ---------------------------------------------------------------------

    def _save(self, run: RunFolder, log: Log) -> None:
        """Save the present step, unless that is done, and prune older checkpoints."""
        if self._saved is not None and self._saved[0] == self.step:
            return
        for name, parameter in self.model.named_parameters():
            if not is_table(parameter) and not parameter.isfinite().all():
                raise self._diverged(f"parameter {name} is not finite after step {self.step}")
        if self.leads:
            log.sync()  # records up to here must outlive a crash if the checkpoint does
            self.keeper.save(partial(self._write, run))
            best = None if self.best is None else int(self.best["step"])
            prune_checkpoints(run.checkpoints, self.config.training.keep_checkpoints, best)
        self.team.told([float(self.step)])  # rows are not changed before they are saved
        self._saved = self.step, checkpoint_path(run.checkpoints, self.step)

    def _write(self, run: RunFolder, kept: Mapping[str, Any], fill: Fill | None = None) -> Path:
        """Write the checkpoint of the present step, with what a keeper adds to it."""
        tensors, state = self.state()
        if state["bank"] is not None:
            state["bank"] |= kept
        return save_checkpoint(run.checkpoints, self.step, tensors, state, fill)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that later steps depend on but a bank's rows: named tensors, JSON values."""
        saved = [optimiser_tensors(optimiser) for optimiser in self.optimisers.each]
        model = dense_state(self.model, self.setup.bank)
        tensors = {f"model.{key}": value for key, value in model.items()}
        for name, (of_optimiser, _) in zip(("optimizer", "rows"), saved, strict=False):
            tensors |= {f"{name}.{key}": value for key, value in of_optimiser.items()}
        bank = None
        if self.config.bank is not None:
            values = {"name": self.config.bank.optimizer.name, **saved[1][1]}
            bank = {"optimizer": values, "schedule": self.schedules[1].state_dict()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {
            "sparsemem": package_version(),
            "model": self.config.model.model_dump(),
            "task": {"name": self.config.task.name, "identity": self.task.identity},
            "optimizer": {"name": self.config.training.optimizer.name, **saved[0][1]},
            "schedule": self.schedules[0].state_dict(),
            "bank": bank,
            "curriculum": self.curriculum.state_dict(),
            "sums": self.sums,
            "validation": self.validation,
            "best": self.best,
            "seconds": self.seconds,
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; CheckpointError if it is damaged or of another model."""
        checkpoint = load_checkpoint(path)
        random = checkpoint.part("random")
        if "cpu" not in random:
            raise CheckpointError(f"{path} lacks the random state 'random.cpu'")
        load_model(self.setup, checkpoint, self.keeper)
        manifest = checkpoint.manifest
        saved = [(checkpoint.part("optimizer"), manifest)]
        if manifest.get("bank") is not None:
            saved.append((checkpoint.part("rows"), manifest["bank"]))
        for optimiser, schedule, (tensors, values) in zip(
            self.optimisers.each, self.schedules, saved, strict=True
        ):
            restore_optimiser(optimiser, tensors, values["optimizer"])
            schedule.load_state_dict(values["schedule"])
        self.curriculum.load_state_dict(manifest["curriculum"])
        self.step = manifest["step"]
        self.sums, self.validation = manifest["sums"], manifest["validation"]
        self.best, self.seconds = manifest["best"], manifest["seconds"]
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.team.told([float(self.step)])  # nobody reads rows before all have them again
        self._saved = self.step, path

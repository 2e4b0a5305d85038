"""The training loop: batches, metrics, validation, checkpoints, and going on from them.

Everything that later steps depend on is in the checkpoint: model, optimiser, learning
rate, curriculum, random state, step (which is the position in the data), and the sums of
the metrics not yet recorded. So a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import time
from contextlib import closing, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemem.training.bptt import BatchResult, Diverged, train_batch
from sparsemem.training.checkpoint import (
    load_checkpoint,
    optimiser_tensors,
    prune_checkpoints,
    restore_optimiser,
    save_checkpoint,
)
from sparsemem.training.curriculum import make_curriculum
from sparsemem.training.errors import CheckpointError, RunError
from sparsemem.training.evaluate import Result, evaluate
from sparsemem.training.optimisers import make_optimiser, make_schedule
from sparsemem.training.profiling import Profile
from sparsemem.training.progress import Progress
from sparsemem.training.regions import region
from sparsemem.training.run import MetricsLog, RunFolder
from sparsemem.training.setup import Setup, as_trained, describe, load_model, package_version
from sparsemem.training.signals import Stop, stop_on_signal


class Outcome(Enum):
    """Why training ended."""

    FINISHED = "all steps are done"
    REACHED = "the validation metric is under training.stop_below"
    INTERRUPTED = "a signal asked to stop"


class Trainer:
    """Trains what `prepare` made; `restore` before `train` goes on from a checkpoint."""

    def __init__(self, setup: Setup) -> None:
        """Make optimiser, schedule and curriculum; sets torch's thread count, which is global."""
        self.setup = setup
        self.config, self.task, self.model = setup.config, setup.task, setup.model
        training = self.config.training
        torch.set_num_threads(training.threads)
        self.device = next(self.model.parameters()).device
        self.trained = as_trained(self.config, self.model)
        self.optimiser = make_optimiser(training.optimizer, self.model.parameters())
        self.schedule = make_schedule(self.optimiser, training.schedule, training.steps)
        self.curriculum = make_curriculum(self.config.curriculum, training.seed)
        self.step = 0  # steps done, and the index of the next batch
        self.sums: dict[str, float] = {}  # of metrics since they were last recorded
        self.validation: dict[str, float] | None = None  # the last one
        self.best: dict[str, float] | None = None
        self.seconds = 0.0
        self.profile: Profile | None = None
        self._saved: tuple[int, Path] | None = None  # step and path of the newest checkpoint

    # The loop ------------------------------------------------------------------------

    def train(
        self, run: RunFolder, progress: Progress | None = None, profiled: bool = False
    ) -> Outcome:
        """Train to the last step, or until a signal or `stop_below` ends it; saves at the end.

        profiled: say where the time of the first steps goes, and write it to the run's folder.
        The caller holds `run.lock()`.
        RunError if the loss is no longer finite: it names the step and the checkpoint to
        go back to, which stays as it is.
        """
        if progress is None:
            progress = Progress(self.config.training.steps, self.step, self.task.metric_name)
        with (
            closing(progress),
            closing(MetricsLog(run, self.step)) as log,
            stop_on_signal() as stop,
        ):
            self.profile = Profile(self.model, run.profile, progress.say) if profiled else None
            for line in describe(self.config, self.model).splitlines():
                progress.say(line)
            while self._outcome(stop) is None:
                self._one_step(run, log, progress)
            if stop.number is not None:
                progress.say("asked to stop: saving; once more leaves at once, without saving")
            self._save(run, log)
            if self.profile is not None:
                self.profile.close()
        outcome = self._outcome(stop)
        assert outcome is not None
        return outcome

    def _outcome(self, stop: Stop) -> Outcome | None:
        training = self.config.training
        if (
            training.stop_below is not None
            and self.validation is not None
            and self.validation["metric"] < training.stop_below
        ):
            return Outcome.REACHED
        if self.step >= training.steps:
            return Outcome.FINISHED
        return Outcome.INTERRUPTED if stop.number is not None else None

    def _one_step(self, run: RunFolder, log: MetricsLog, progress: Progress) -> None:
        """A batch, and what is due after it."""
        start = time.perf_counter()
        training = self.config.training
        rate = float(self.schedule.get_last_lr()[0])
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
        """One batch and the learning rate's step; RunError if it diverged."""
        training = self.config.training
        with region("data"):
            batch = self.task.batch(self.step, level).to(self.device)
        try:
            result = train_batch(
                self.trained,
                self.task,
                self.optimiser,
                batch,
                training.truncate,
                training.gradient_clip,
            )
        except Diverged as error:
            raise self._diverged(f"{error} at step {self.step + 1} (level {level})") from None
        self.schedule.step()
        return result

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

    def _validate(self, log: MetricsLog, progress: Progress) -> bool:
        """Evaluate on the validation split; True if it was never better."""
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
        self.seconds += time.perf_counter() - start
        if not math.isfinite(result.loss):
            raise self._diverged(f"the validation loss is {result.loss} at step {self.step}")
        self.validation = {"step": self.step, "metric": result.metric}
        log.write(
            "validation",
            self.step,
            {
                "loss": result.loss,
                "metric": result.metric,
                "level": float(result.level),
                "touched": result.touched,
                "seconds": self.seconds,
            },
        )
        progress.say(f"step {self.step}: validation {result.line()}")
        improved = self.best is None or result.metric < self.best["metric"]
        if improved:
            self.best = self.validation
        return improved

    # Checkpoints ---------------------------------------------------------------------

    def _save(self, run: RunFolder, log: MetricsLog) -> None:
        """Save the present step, unless that is done, and prune older checkpoints."""
        if self._saved is not None and self._saved[0] == self.step:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(f"parameter {name} is not finite after step {self.step}")
        log.sync()  # records up to here must outlive a crash if the checkpoint does
        tensors, state = self.state()
        self._saved = self.step, save_checkpoint(run.checkpoints, self.step, tensors, state)
        best = None if self.best is None else int(self.best["step"])
        prune_checkpoints(run.checkpoints, self.config.training.keep_checkpoints, best)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that later steps depend on: named tensors, and JSON values."""
        optimiser, optimiser_values = optimiser_tensors(self.optimiser)
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{key}": value for key, value in optimiser.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {
            "sparsemem": package_version(),
            "model": self.config.model.model_dump(),
            "task": {"name": self.config.task.name, "identity": self.task.identity},
            "optimizer": {"name": self.config.training.optimizer.name, **optimiser_values},
            "schedule": self.schedule.state_dict(),
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
        load_model(self.setup, checkpoint)
        manifest = checkpoint.manifest
        restore_optimiser(self.optimiser, checkpoint.part("optimizer"), manifest["optimizer"])
        self.schedule.load_state_dict(manifest["schedule"])
        self.curriculum.load_state_dict(manifest["curriculum"])
        self.step = manifest["step"]
        self.sums, self.validation = manifest["sums"], manifest["validation"]
        self.best, self.seconds = manifest["best"], manifest["seconds"]
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self._saved = self.step, path

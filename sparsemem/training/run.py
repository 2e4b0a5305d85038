"""The folder of a run.

config.yaml     the config as resolved
metrics.jsonl   one JSON object a line, in order of steps
checkpoints/    see `sparsemem.training.checkpoint`
tensorboard/    event files, when tensorboard is installed
pictures/       what `sparsemem plot` draws
profile/        where the time goes, when trained with --profile
eval.json       what `sparsemem eval` found last
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsemem.files import replace_file
from sparsemem.training.checkpoint import checkpoint_path, list_checkpoints, read_manifest
from sparsemem.training.config import Config, dump_config, make_config, override, read_tree
from sparsemem.training.errors import ConfigError, RunError


class RunFolder:
    """Paths of a run and its metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.evaluation_file = path / "eval.json"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.events = path / "tensorboard"
        self.profile = path / "profile"

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """Make a new run folder; RunError if something is there already."""
        run = cls(path)
        with _explained(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                resumable = bool(list_checkpoints(run.checkpoints))
                hint = f"go on with --resume {path}, or " if resumable else ""
                raise RunError(f"run folder {path} is not empty: {hint}choose another --run")
            run.checkpoints.mkdir(parents=True)
            run.pictures.mkdir()
            run.write_config(config)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an earlier run; RunError if it is none."""
        run = cls(path)
        with _explained(path, "read"):
            if not path.is_dir():
                raise RunError(f"run folder {path} does not exist{_others(path.parent)}")
            if not run.config_file.is_file():
                raise RunError(f"{path} is not a run folder: it has no config.yaml")
        return run

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's config as resolved, with `key=value` changes.

        ConfigError names the file where it is at fault, and not for a change.
        """
        tree = read_tree(self.config_file)
        try:
            config = make_config(tree)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"{self.config_file}: {x}" for x in lines)) from None
        return make_config(override(tree, overrides)) if overrides else config

    def write_config(self, config: Config) -> None:
        """Replace the run's config."""
        with _explained(self.config_file):
            replace_file(self.config_file, dump_config(config).encode())

    def write_evaluation(self, result: dict[str, Any]) -> None:
        """Replace eval.json."""
        with _explained(self.evaluation_file):
            replace_file(self.evaluation_file, (json.dumps(result, indent=2) + "\n").encode())

    def newest_checkpoint(self) -> Path:
        """The checkpoint of the latest step."""
        found = list_checkpoints(self.checkpoints)
        if not found:
            raise RunError(f"{self.path} has no checkpoint yet: expected one in {self.checkpoints}")
        return found[-1][1]

    def best_checkpoint(self) -> Path:
        """The checkpoint of the lowest validation metric; the newest if there was no validation."""
        newest = self.newest_checkpoint()
        best = read_manifest(newest)["best"]
        if best is None:
            return newest
        path = checkpoint_path(self.checkpoints, int(best["step"]))
        if not path.is_dir():
            raise RunError(
                f"the best checkpoint {path} is gone; take the last one ({newest.name}) instead,"
                " with --checkpoint last"
            )
        return path

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line torn by a crash is left out."""
        with _explained(self.metrics_file, "read"):
            if not self.metrics_file.exists():
                return []
            lines = self.metrics_file.read_bytes().splitlines()
        records = []
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is not None:
                records.append(record)
            elif number < len(lines):
                raise RunError(
                    f"{self.metrics_file}, line {number}: expected a JSON object with kind and step"
                )
        return records

    def cut_metrics(self, step: int) -> None:
        """Drop what was recorded after a step, to go on from it without duplicates."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        with _explained(self.metrics_file):
            replace_file(self.metrics_file, "".join(map(_line, kept)).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run while training: a second trainer on the same folder is refused."""
        with _explained(self.path):
            file = open(self.path / ".lock", "w")  # noqa: SIM115 (closed after the run)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"run {self.path} is being trained by another process") from None
            except OSError as error:
                raise RunError(f"cannot lock {file.name}: {error.strerror}") from error
            yield


class MetricsLog:
    """Appends records to metrics.jsonl, and their numbers to TensorBoard when installed."""

    def __init__(self, run: RunFolder, step: int) -> None:
        self._path = run.metrics_file
        with _explained(self._path):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (in close)
        self._writer = _summary_writer(run.events, step)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record the values of a step; `kind` is train or validation."""
        with _explained(self._path):
            self._file.write(_line({"kind": kind, "step": step, **values}))
            self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        with _explained(self._path):
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class NoLog:
    """Records nothing."""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def claim_folder(path: Path) -> Path:
    """Make and return the first of `path`, `path`-2, `path`-3, ... that was not there.

    Only one of several processes that ask at the same time gets a folder.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            claimed = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                claimed.mkdir()
            except FileExistsError:
                continue
            return claimed
    raise AssertionError("unreachable: there are always more numbers")


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record if isinstance(record.get("kind"), str) else None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _others(folder: Path) -> str:
    """Runs beside a missing one, for the message about it."""
    names = sorted(str(path.parent) for path in folder.glob("*/config.yaml"))
    return f"; there are: {', '.join(names)}" if names else ""


@contextmanager
def _explained(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn a full disk or a missing permission into a RunError that names the place."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot {doing} {error.filename or path}: {error.strerror}") from error

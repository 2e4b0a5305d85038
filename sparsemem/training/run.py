"""The folder of a run.

config.yaml     the config as resolved
metrics.jsonl   one JSON object a line, in order of steps
checkpoints/    see `sparsemem.training.checkpoint`
tensorboard/    event files, when tensorboard is installed
pictures/       what `sparsemem plot` draws
eval.json       what `sparsemem eval` found last
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsemem.training.checkpoint import checkpoint_path, list_checkpoints, read_manifest
from sparsemem.training.config import Config, dump_config, load_config
from sparsemem.training.errors import RunError
from sparsemem.training.files import replace_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """Make a new run folder; RunError if something is there already."""
        run = cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            hint = f"go on with --resume {path}, or " if run.config_file.exists() else ""
            raise RunError(f"run folder {path} is not empty: {hint}choose another --run")
        with _explained(path):
            run.checkpoints.mkdir(parents=True)
            run.pictures.mkdir()
            run.write_config(config)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an earlier run; RunError if it is none."""
        run = cls(path)
        if not path.is_dir():
            raise RunError(f"run folder {path} does not exist{_others(path.parent)}")
        if not run.config_file.is_file():
            raise RunError(f"{path} is not a run folder: it has no config.yaml")
        return run

    def config(self) -> Config:
        """The run's config as resolved."""
        return load_config(self.config_file)

    def write_config(self, config: Config) -> None:
        """Replace the run's config."""
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
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise RunError(
                        f"{self.metrics_file}, line {number}: not a JSON object"
                    ) from None
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
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"run {self.path} is being trained by another process") from None
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


def new_run_path(config_file: Path, root: Path = Path("runs")) -> Path:
    """A folder for a run that does not exist yet: runs/copy-sam, runs/copy-sam-2, ..."""
    path, number = root / config_file.stem, 1
    while path.exists():
        number += 1
        path = root / f"{config_file.stem}-{number}"
    return path


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
def _explained(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a RunError that names the place."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {error.filename or path}: {error.strerror}") from error

"""What a benchmark found, as a file: checked when read, whole when written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsemem.bench.errors import BenchError
from sparsemem.bench.measuring import Summary
from sparsemem.files import replace_file

FORMAT = "sparsemem bench result"
SCALES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


class Record(BaseModel):
    """Part of a result: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Measured(Record):
    """One point: seconds of what was timed, and figures that were found once.

    times are of a step (models), or of a batch of queries or rows (banks). `steps` is how many
    steps a pass had: fewer than asked for where more would not fit.
    """

    kind: Literal["model", "bank", "peer"]
    name: str
    size: int
    steps: int | None = None
    times: dict[str, Summary]
    figures: dict[str, float]

    @property
    def key(self) -> str:
        """What the same point is called in another result."""
        return f"{self.kind} {self.name} N={self.size}"


class Skipped(Record):
    """A point that was not measured, why, and what it was predicted to take."""

    kind: Literal["model", "bank", "peer"]
    name: str
    size: int
    reason: str
    predicted_seconds: float | None = None  # of a step or a batch
    predicted_bytes: float | None = None  # at its peak


class Fit(Record):
    """log(measure) = slope log(size) + constant, by least squares over `sizes`."""

    kind: str
    name: str
    measure: str
    slope: float
    error: float | None  # standard error of the slope; None of two sizes
    sizes: list[int]


class Result(Record):
    """A benchmark, whole."""

    format: Literal["sparsemem bench result"] = "sparsemem bench result"
    version: Literal[1] = 1
    benchmark: Literal["scaling", "peers"]
    machine: dict[str, str]
    settings: dict[str, Any]
    seconds: float  # that it took
    points: list[Measured]
    skipped: list[Skipped] = []
    fits: list[Fit] = []


def read_result(path: Path) -> Result:
    """Read a result; BenchError says what is wrong with a file that is none."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BenchError(f"{path} is not JSON, expected a result of sparsemem bench") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise BenchError(f"{path} is not a result of sparsemem bench: its format is not {FORMAT!r}")
    try:
        return Result.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BenchError(f"{path} is damaged: {place}: {first['msg']}") from None


def check_folder(folder: Path, name: str, files: Iterable[str]) -> None:
    """Refuse to write into a folder that holds files of these names and no result of ours."""
    if folder.exists() and not folder.is_dir():
        raise BenchError(f"--output {folder} is a file, expected a folder")
    there = [folder / file for file in files if (folder / file).exists()]
    if not there:
        return
    try:
        read_result(folder / name)
    except BenchError:
        raise BenchError(
            f"--output {folder} has a file {there[0].name} and no earlier result in {name}:"
            " it is not overwritten, choose another folder"
        ) from None


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a folder, each whole; BenchError names one that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(folder / name, data)
    except OSError as error:
        where = error.filename or folder
        raise BenchError(f"cannot write {where}: {error.strerror}") from None


def as_json(result: Result) -> bytes:
    """The result's file."""
    return (result.model_dump_json(indent=2) + "\n").encode()


def as_csv(result: Result) -> bytes:
    """A line for each point and measure, figures too."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["kind", "name", "size", "steps", "measure", "median", "lower_quartile"]
    writer.writerow([*columns, "upper_quartile", "repetitions"])
    for point in result.points:
        start = [point.kind, point.name, point.size, point.steps]
        for name, s in point.times.items():
            measured = [s.median, s.lower_quartile, s.upper_quartile, len(s.values)]
            writer.writerow([*start, f"{name}_seconds", *measured])
        for name, value in point.figures.items():
            writer.writerow([*start, name, value, None, None, None])
    return text.getvalue().encode()


def show_seconds(value: float) -> str:
    """1.23 ms."""
    unit, scale = next((pair for pair in SCALES if value >= pair[1]), SCALES[-1])
    return f"{value / scale:.3g} {unit}"


def show_bytes(value: float) -> str:
    """1.23 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def show_size(size: int) -> str:
    """2^20 for powers of two, 1e+06 for other large ones, else as it is."""
    if size >= 1024 and size & (size - 1) == 0:
        return f"2^{size.bit_length() - 1}"
    return f"{size:.3g}" if size >= 10_000 else str(size)

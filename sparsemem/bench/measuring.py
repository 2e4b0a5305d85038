"""Times that can be compared, peaks of memory, and where figures come from."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch.profiler import ProfilerActivity, profile

STATUS = Path("/proc/self/status")
KIB = 1024
PACKAGES = ("sparsemem", "numpy", "numba", "faiss-cpu", "faiss-gpu")  # torch names itself


class Timings(dict[str, list[float]]):
    """Seconds of each function's repetitions; those of one repetition saw the same machine."""

    def median(self, name: str) -> float:
        """Seconds of the median repetition."""
        return statistics.median(self[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over the repetitions of the time of `name` by that of `to`."""
        return statistics.median(a / b for a, b in zip(self[name], self[to], strict=True))


class Summary(BaseModel):
    """Repetitions of one measurement: their median, their quartiles, and themselves."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    median: float
    lower_quartile: float
    upper_quartile: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one repetition."""
        lower, median, upper = (float(x) for x in np.percentile(values, [25, 50, 75]))
        return cls(median=median, lower_quartile=lower, upper_quartile=upper, values=list(values))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], object]], repetitions: int) -> Timings:
    """Wall times of functions called in turns, so that a change of the machine hits all alike."""
    times = Timings({name: [] for name in functions})
    for _ in range(repetitions):
        for name, work in functions.items():
            times[name].append(seconds(work))
    return times


def tensor_peak(work: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during a call, above those alive before it.

    Counted by torch's profiler at the CPU allocator, so that temporaries inside operations count.
    """
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiling(profiler):
        work()
    found: Any = profiler.profiler
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextmanager
def profiling(profiler: profile) -> Iterator[None]:
    """A profiler at work, without the lines that its C++ side writes to standard error."""
    with _silent():
        profiler.start()
    try:
        yield
    finally:
        with _silent():
            profiler.stop()


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches standard error, not from C++ either."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def process_bytes(name: str) -> int:
    """Bytes of this process: VmRSS, what it has in memory now; VmHWM, the most so far."""
    return _kib(STATUS, name)


def reset_peak() -> None:
    """Let VmHWM begin anew from what the process has in memory now, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then is that since the process began: never too low


def available_bytes() -> int:
    """Memory that processes can still take without swapping."""
    return _kib(Path("/proc/meminfo"), "MemAvailable")


def _kib(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(f"{name}:"))


def machine(root: Path | None = None, threads: int = 1) -> dict[str, str]:
    """Where figures come from: processor, threads, versions, and the commit if in git.

    root: a folder of the repository; None: the package's, if git tracks it there.
    """
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    used = f"{threads} thread{'s' if threads > 1 else ''} used"
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{cpu[0].split(': ')[1]}, {len(cpu)} cores, {used}" if cpu else "unknown",
        "memory": f"{_kib(Path('/proc/meminfo'), 'MemTotal') / 2**30:.1f} GiB",
    }
    commit = _commit(root)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return ({"commit": commit} if commit else {}) | found


def _commit(root: Path | None) -> str:
    """The commit checked out, "-dirty" if files differ from it; empty outside of git."""
    here = Path(__file__)
    folder = root or here.parent
    # Installed into an environment that lies in somebody else's repository: not our commit.
    if root is None and not _git(folder, "ls-files", here.name):
        return ""
    commit = _git(folder, "rev-parse", "HEAD")
    return commit + ("-dirty" if commit and _git(folder, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()

"""What the benchmarks share: where figures come from, and times that can be compared."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Timings(dict[str, list[float]]):
    """Seconds of each function's repetitions; those of one repetition saw the same machine."""

    def median(self, name: str) -> float:
        """Seconds of the median repetition."""
        return statistics.median(self[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over the repetitions of the time of `name` by that of `to`."""
        return statistics.median(a / b for a, b in zip(self[name], self[to], strict=True))


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


def recalls(found: Any, truth: Any) -> list[float]:
    """Of each query, the share of the true ids [Q, K] that were found."""
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return [len(set(ours) & set(true)) / len(true) for ours, true in pairs]


def machine() -> dict[str, str]:
    """Where the figures come from."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return result.stdout.strip()

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{cpu[0].split(': ')[1]}, {len(cpu)} cores, 1 thread used" if cpu else "unknown",
    }

"""What the parts of scripts/gpu_check share: times by the device's clock, and results kept early.

A part is a process of its own. It writes its results after each measurement, so that what came
before a crash or the end of its time is not lost, and a fresh process goes on behind it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_problems import FAISS, NO_TIME

Figures = dict[str, Any]
BROKEN = 75  # exit status of a process whose device takes nothing more: go on in another one
FATAL = ("CUDA error", "illegal memory access", "device-side assert", "launch failure")
CUT_OFF = "the process ended in the middle of it"
LEAST_SECONDS = 3.0  # left, for a measurement to be begun


class Results:
    """Figures by name, in a file."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.figures: dict[str, Figures] = json.loads(path.read_text()) if path.exists() else {}
        gc.freeze()  # what is imported needs no looking through after each measurement

    @property
    def seconds_left(self) -> float:
        """Until the part's time is over."""
        return self.end - time.monotonic()

    def run(self, name: str, work: Callable[[], Figures | None]) -> None:
        """Measure, unless an earlier process did or there is no time; an error is a result too."""
        if name in self.figures:
            return
        if self.seconds_left < LEAST_SECONDS:
            self.record(name, {"skipped": NO_TIME})
            return
        self.record(name, {"error": CUT_OFF})
        print(f"== {name}", flush=True)
        begun = time.perf_counter()
        try:
            figures = work() or {}
        except Exception as error:
            traceback.print_exc()
            figures = {"error": said(error)}
        figures["seconds"] = round(time.perf_counter() - begun, 3)
        print(json.dumps(figures), flush=True)
        self.record(name, figures)
        if any(sign in figures.get("error", "") for sign in FATAL):
            os._exit(BROKEN)
        tidy()

    def record(self, name: str, figures: Figures) -> None:
        """Keep figures under a name."""
        self.figures[name] = figures
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.figures, indent=1))
        beside.replace(self.path)


class Options(argparse.Namespace):
    """What every part is told."""

    device: torch.device
    tiny: bool
    quick: bool
    results: Path
    seconds: float
    faiss: Path | None


def options(description: str) -> Options:
    """The arguments of a part; makes FAISS importable where it is packed in a folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--quick", action="store_true", help="the most important figures only")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all of it")
    parser.add_argument("--faiss", type=Path, help="folder with FAISS and its load.py")
    found = parser.parse_args(namespace=Options())
    if found.faiss is not None:
        load_faiss(found)
    torch.manual_seed(0)
    if found.device.type == "cpu":
        torch.set_num_threads(1)
    return found


def load_faiss(given: Options) -> None:
    """Make FAISS importable from its folder, or say why not, and go on without the folder."""
    before = list(sys.path)
    sys.path.insert(0, str(given.faiss))
    try:
        __import__("load")
    except (Exception, SystemExit) as error:  # whatever a file that was brought along may raise
        traceback.print_exc()
        sys.path[:], given.faiss = before, None
        Results(given.results, given.seconds).record(FAISS, {"error": said(error)})


def said(error: BaseException) -> str:
    """An exception as a figure."""
    return f"{type(error).__name__}: {error}"[:2000]


def tidy() -> None:
    """Give back what the measurement before took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that was allocated on a GPU since `tidy`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def measure(
    work: Callable[[], object],
    device: torch.device,
    *,
    warm_up: int = 3,
    repetitions: int = 30,
    least: int = 10,
    seconds: float = 4.0,
) -> Figures:
    """Milliseconds of a call: median and quartiles, by CUDA events, or the clock on a CPU.

    `repetitions`, or fewer where those take longer than `seconds`, but `least`. On a CPU, where
    only the scripts are tried, 3.
    """
    if device.type == "cpu":
        warm_up, repetitions, least = 2, 3, 3
    for _ in range(warm_up):
        work()
    wait(device)
    once = _by_events if device.type == "cuda" else _by_clock
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < repetitions:
        if len(times) >= least and time.perf_counter() - begun > seconds:
            break
        times.append(once(work))
    return summary(times)


def summary(times: list[float]) -> Figures:
    """Median and quartiles of milliseconds."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "ms": round(median, 5),
        "lower_ms": round(lower, 5),
        "upper_ms": round(upper, 5),
        "repetitions": len(times),
    }


def _by_events(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _by_clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def copy_bandwidth(device: torch.device, tiny: bool = False) -> float:
    """Bytes a second of a large copy on the device, counting what is read and what is written."""
    size = 2**16 if tiny else 2**30
    source = torch.empty(size, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    found = measure(lambda: target.copy_(source), device, repetitions=15)
    return 2 * source.nbytes / (found["ms"] * 1e-3)

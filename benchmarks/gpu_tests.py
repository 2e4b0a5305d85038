"""A part of scripts/gpu_check: pytest -m gpu, and once more, alone, what fell with the device.

A kernel that reads where nothing is leaves its process without a device, and every later test of
that process fails: so tests run in several processes where pytest-xdist is there, and
those that failed so are repeated in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpu_common import FATAL, Figures, Options, Results, options
from gpu_pytest import LINES

HERE = Path(__file__).resolve().parent
SIGNS = re.compile(r"mark\.gpu|triton_device|\bdevice\b")  # of files with such tests
WORKERS = 14
LONGEST = 60  # seconds of a test
ENDED = (0, 1)  # statuses of a pytest that ran all tests, some of which may have failed


class Run(NamedTuple):
    """What a process of pytest did."""

    cases: Figures  # by test: how it went
    collected: int | None  # tests that it was to run; None: it did not come so far
    stopped: str | None  # why it did not come to its end


def main() -> None:
    """Run them."""
    given = options(__doc__ or "")
    results = Results(given.results, given.seconds)
    results.run("pytest", lambda: suite(given, results.seconds_left))


def suite(given: Options, seconds: float) -> Figures:
    """Counts, failures with their messages, and the slowest tests."""
    end = time.monotonic() + seconds
    cases, collected, stopped = run(files(given.tiny), given, 0.85 * seconds)
    fallen = [name for name, case in cases.items() if is_fatal(case)]
    for name in fallen[:8]:  # the first of them is likely to be the one that did it
        left = end - time.monotonic()
        if left < 15:
            break
        cases |= run([name], given, min(left - 2, 40), alone=True).cases
    kinds = [case["kind"] for case in cases.values()]
    counts = {kind: kinds.count(kind) for kind in ("passed", "failed", "skipped")}
    failures = {name: c["message"] for name, c in cases.items() if c["kind"] == "failed"}
    slowest = sorted(cases.items(), key=lambda item: -item[1]["seconds"])[:15]
    reasons = {case["message"] for case in cases.values() if case["kind"] == "skipped"}
    return {
        **counts,
        "collected": collected,
        "stopped": stopped,
        "fell_with_the_device": len(fallen),
        "failures": failures,
        "slowest": {name: case["seconds"] for name, case in slowest},
        "skipped_because": sorted(reasons)[:20],
        **({} if cases else {"error": "no test ran: see tests.log"}),
    }


def is_fatal(case: Figures) -> bool:
    """Whether a test failed because the device takes nothing more."""
    return case["kind"] == "failed" and any(sign in case["message"] for sign in FATAL)


def files(tiny: bool) -> list[str]:
    """Test files that may have tests for a GPU; the rest is not even imported."""
    if tiny:
        return ["tests/models/test_captured.py"]
    paths = sorted((HERE.parent / "tests").rglob("test_*.py"))
    return [str(p.relative_to(HERE.parent)) for p in paths if SIGNS.search(p.read_text())]


def run(tests: list[str], given: Options, seconds: float, alone: bool = False) -> Run:
    """Run tests by file or by name: how each went, as far as they came."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.json"
        stopped = process(command(tests, given, alone), given, seconds, lines)
        if stopped:
            print(stopped, flush=True)
        found = lines.read_text().splitlines() if lines.exists() else []
    cases: Figures = {}
    collected: int | None = None
    for case in map(json.loads, found):
        if "collected" in case:  # by each process of pytest-xdist, the same
            collected = case["collected"]
        else:
            cases[case.pop("name")] = case
    return Run(cases, collected, stopped)


def command(tests: list[str], given: Options, alone: bool) -> list[str]:
    """The command line of pytest."""
    line = [sys.executable, "-m", "pytest", *tests, "-m", "gpu", "-q", "--tb=short", "-rf"]
    line += ["-p", "no:cacheprovider", "-p", "gpu_pytest"]
    if given.faiss is not None:
        line += ["-p", "load"]  # imported before any test: it makes FAISS importable
    in_processes = find_spec("xdist") and not alone and not given.tiny
    if in_processes:
        line += ["-n", str(WORKERS), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        # A thread can end a test that waits for the device; it ends the process, too.
        method = "thread" if in_processes else "signal"
        line += ["--timeout", str(LONGEST), "--timeout-method", method]
    return line


def process(line: list[str], given: Options, seconds: float, lines: Path) -> str | None:
    """Run pytest, which appends to `lines`; why it did not come to its end, if it did not."""
    print(" ".join(line), flush=True)
    paths = [str(given.faiss or ""), str(HERE), os.environ.get("PYTHONPATH", "")]
    search = os.pathsep.join(filter(None, paths))
    env = os.environ | {"PYTHONPATH": search, LINES: str(lines)}
    try:
        code = subprocess.run(line, cwd=HERE.parent, timeout=seconds, env=env).returncode
    except subprocess.TimeoutExpired:
        return f"pytest was stopped after {seconds:.0f} s"
    return None if code in ENDED else f"pytest ended with exit status {code}"


if __name__ == "__main__":
    main()

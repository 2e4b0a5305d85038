"""Run everything that needs a GPU, part by part, and report: scripts/gpu_check calls this.

Each part is a process of its own with a time of its own. A part that fails or takes too long costs
nothing but itself: what it had found until then is kept, and a part whose device broke goes on in a
fresh process behind what broke it. The report is written after every part. It begins with all
problems (gpu_problems.py); with any, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpu_problems import problems
from gpu_report import markdown

HERE = Path(__file__).resolve().parent
BROKEN = 75  # gpu_common.BROKEN; this module does without torch
SPARE = 4.0  # seconds at the end, for the report
LEAST = 6.0  # seconds a part is begun with
STARTS = 3  # of a part whose process breaks


class Part(NamedTuple):
    """A script, what it measures, and how long it may take: a share of the time left, at most."""

    name: str
    script: str
    measures: str
    share: float
    most: float  # seconds
    quick: bool = False  # whether --quick has it


PARTS = (
    Part("environment", "gpu_environment.py", "device, versions, bandwidth", 0.25, 40, True),
    Part("tests", "gpu_tests.py", "pytest -m gpu", 0.6, 140, True),
    Part("models", "gpu_models.py", "SAM, SDNC, LSTMs, dense NTM", 0.5, 140, True),
    Part("banks", "gpu_banks.py", "exact reads and training steps of banks", 0.6, 140),
    Part("ivf", "gpu_ivf.py", "IVF on the GPU: build, read, recall, freshness", 0.7, 90),
    Part("tuning", "gpu_tuning.py", "shapes of the exact search's programs", 1.0, 60),
)
NAMES = tuple(part.name for part in PARTS)


def arguments() -> argparse.Namespace:
    """What to run, where, and for how long."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--dry-run", action="store_true", help="list the parts and do nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder to write")
    parser.add_argument("--minutes", type=float, help="for all of it (8, or 2 with --quick)")
    parser.add_argument("--faiss", type=Path, help="a folder with faiss-gpu and its load.py")
    parser.add_argument("--only", choices=NAMES, action="append", help="this part (repeatable)")
    parser.add_argument("--quick", action="store_true", help="the first parts, and less of them")
    parser.add_argument("--device", default="cuda", help="cpu shows that the scripts run")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    if given.minutes is None:
        given.minutes = 2.0 if given.quick else 8.0
    return given


def chosen(given: argparse.Namespace) -> list[Part]:
    """The parts to run."""
    if given.only:
        return [part for part in PARTS if part.name in given.only]
    return [part for part in PARTS if part.quick or not given.quick]


def command(part: Part, given: argparse.Namespace, results: Path, seconds: float) -> list[str]:
    """The command line of a part."""
    line = [sys.executable, str(HERE / part.script), "--device", given.device]
    line += ["--results", str(results), "--seconds", f"{seconds:.0f}"]
    line += ["--tiny"] * given.tiny + ["--quick"] * given.quick
    return line + (["--faiss", str(given.faiss.resolve())] if given.faiss else [])


def budgets(parts: list[Part], seconds: float) -> list[float]:
    """Seconds of each part, if those before it take all of theirs."""
    found = []
    for part in parts:
        share = 1.0 if part is parts[-1] else part.share
        found.append(min(share * seconds, part.most))
        seconds -= found[-1]
    return found


def dry_run(given: argparse.Namespace) -> None:
    """Say what would be done."""
    parts = chosen(given)
    print(f"scripts/gpu_check: {len(parts)} parts in {given.minutes:g} minutes, to {given.out}")
    times = budgets(parts, 60 * given.minutes - SPARE)
    for part, seconds in zip(parts, times, strict=True):
        line = command(part, given, given.out / f"{part.name}.json", seconds)
        print(f"\n{part.name}: {part.measures}; up to {seconds:.0f} s, and what is left over")
        print(f"  {shlex.join(line)}")


def run_part(part: Part, given: argparse.Namespace, results: Path, end: float) -> dict[str, Any]:
    """Run a part to its end or `end`; its status, and its figures as far as it got."""
    begun = time.monotonic()
    log, status = given.out / f"{part.name}.log", "not begun: no time was left"
    log.unlink(missing_ok=True)
    for _ in range(STARTS):
        seconds = end - time.monotonic()
        if seconds < LEAST:
            break
        # The part is told a little less, to end by itself.
        line = command(part, given, results, 0.93 * seconds - 1)
        with log.open("ab") as file:
            status = run_process(line, file, seconds)
        if status == "done" or status.startswith("stopped"):
            break
    figures = json.loads(results.read_text()) if results.exists() else {}
    taken = round(time.monotonic() - begun, 1)
    return reported(part, status, taken, figures)


def reported(
    part: Part, status: str = "not begun", seconds: float = 0.0, figures: Any = None
) -> dict[str, Any]:
    """A part in the report."""
    measures = part.measures
    return {"status": status, "seconds": seconds, "measures": measures, "figures": figures or {}}


def run_process(line: list[str], log: Any, seconds: float) -> str:
    """How a process ended: done, stopped at its time, or its exit status."""
    process = subprocess.Popen(
        line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # and what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code == BROKEN:
        return "the device broke"
    return "done" if code == 0 else f"exit status {code}"


def environment() -> dict[str, str]:
    """With the folder of the scripts, for their imports of each other."""
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write(report: dict[str, Any], out: Path) -> None:
    """The report for machines and for people, with what is wrong in it so far."""
    report["problems"] = problems(report)
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(markdown(report))


def main() -> int:
    """0 if there are no problems: all was run to its end, and as it should."""
    given = arguments()
    if given.dry_run:
        dry_run(given)
        return 0
    parts, end = chosen(given), time.monotonic() + 60 * given.minutes - SPARE
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": given.device, "quick": given.quick, "tiny": given.tiny}
    settings["minutes"] = given.minutes
    report: dict[str, Any] = {"settings": settings, "problems": []}
    report["parts"] = {part.name: reported(part) for part in parts}  # one ended early says so
    write(report, given.out)
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            now = time.monotonic()
            seconds = budgets(parts[number:], end - now)[0]
            found = run_part(part, given, Path(folder) / f"{part.name}.json", now + seconds)
            report["parts"][part.name] = found
            print(f"gpu_check: {part.name}: {found['status']}, {found['seconds']} s", flush=True)
            write(report, given.out)
    print(markdown(report))
    print("\n".join(["gpu_check: problems:", *(report["problems"] or ["none"])]))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""The same work by what people could pick instead, each in an environment of its own."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

import sparsemem
from sparsemem.bench.budget import Budget
from sparsemem.bench.measuring import machine
from sparsemem.bench.points import Count, ModelSettings
from sparsemem.bench.results import Result
from sparsemem.bench.schedule import Listener, Series, measure
from sparsemem.bench.workers import GRACE, Made, WorkerError

WORKER = Path(__file__).with_name("peer_worker.py")
# What does the same work, ours first; and where each is installed.
GROUPS = {
    "dnc": ("sparsemem DNC", "dnc DNC"),
    "sdnc": ("sparsemem SDNC", "dnc SDNC"),
    "sam": ("sparsemem SAM", "dnc SAM"),
    "product-keys": (
        "sparsemem product keys",
        "product-key-memory",
        "EmbeddingBag + SparseAdam",
    ),
    "search": ("sparsemem bank", "FAISS rebuilt each step"),
}
ENVIRONMENTS = {
    "dnc DNC": "dnc",
    "dnc SDNC": "dnc",
    "dnc SAM": "dnc",
    "product-key-memory": "product-key-memory",
}


class PeerSettings(BaseModel):
    """Sizes of the work that is done by each group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: tuple[str, ...] = tuple(GROUPS)
    model: ModelSettings = ModelSettings(steps=20)
    slots: Count = 256  # of the models: what a dense one can still do
    subkeys: Count = 512  # product keys: slots are their square
    value_width: Count = 64
    tokens: Count = 128
    rows: Count = 100_000  # of the search
    row_width: Count = 32
    queries: Count = 64
    budget_minutes: Annotated[float, Field(gt=0)] = 5.0
    repetitions: Count = 11
    threads: Count = 1

    def work(self) -> dict[str, Any]:
        """What a worker is told."""
        own = self.model_dump(exclude={"model", "groups", "budget_minutes", "repetitions"})
        return {**self.model.model_dump(), **own, "half": 32, "lists": 4 * isqrt(self.rows)}

    def size(self, group: str) -> int:
        """Slots or rows of a group's work."""
        sizes = {"product-keys": self.subkeys**2, "search": self.rows}
        return sizes.get(group, self.slots)


class PeerPoint(NamedTuple):
    """A peer, the Python that it is installed in, and its work."""

    peer: str
    python: str
    threads: int
    settings: dict[str, Any]

    def make(self) -> Made:
        """Peers are made in a process of theirs: `PeerProcess`."""
        raise WorkerError("a peer runs in a process of its own")


class PeerProcess:
    """A peer's process. Its standard error is kept to say what it died of."""

    def __init__(self, point: PeerPoint) -> None:
        self.point = point
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        try:
            self._process = subprocess.Popen(
                [point.python, "-u", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(point.python),
            )
        except OSError as error:
            raise WorkerError(f"cannot run {point.python}: {error.strerror}") from None

    def made(self, limit: float) -> dict[str, float]:
        """Figures, once the peer has done its work once."""
        request = {"command": "make", "peer": self.point.peer, "threads": self.point.threads}
        figures: dict[str, float] = self._ask({**request, "settings": self.point.settings}, limit)[
            "figures"
        ]
        return figures

    def measure(self, limit: float) -> dict[str, float]:
        """Seconds of the work, once more."""
        return {"step": float(self._ask({"command": "step"}, limit)["seconds"])}

    def _ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """One answer; WorkerError if it is an error, or none within `limit` seconds."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError:
            raise WorkerError(self._death()) from None
        if not select.select([stdout], [], [], max(limit, 0))[0]:
            raise WorkerError(f"took longer than the {max(limit, 0):.0f} s that were left")
        line = stdout.readline()
        if not line:
            raise WorkerError(self._death())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise WorkerError(f"answered {line[:60]!r}, expected JSON") from None
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _death(self) -> str:
        code = self._process.wait(GRACE)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End it at once: it has nothing to lose."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent yet has nowhere to go
                    pipe.close()


def _environment(python: str) -> dict[str, str]:
    """The environment of a peer: this Python's finds this library, others are left alone."""
    environment = dict(os.environ)
    if python == sys.executable:
        root = str(Path(sparsemem.__file__).parents[1])
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def peers(settings: PeerSettings, pythons: Mapping[str, str], listener: Listener) -> Result:
    """Measure each group in turns; what is missing or fails is said, and the others go on.

    pythons: by name of the environment, the Python that it is installed in; this one where none
    is given.
    """
    budget, started = Budget(60 * settings.budget_minutes), time.perf_counter()
    groups = [
        [_series(name, group, settings, pythons) for name in GROUPS[group]]
        for group in settings.groups
    ]
    shares = [1 / left for left in range(len(groups), 0, -1)]
    points, skipped = measure(groups, shares, budget, settings.repetitions, _start, listener)
    return Result(
        benchmark="peers",
        machine=machine(threads=settings.threads),
        settings=settings.model_dump(mode="json"),
        seconds=time.perf_counter() - started,
        points=points,
        skipped=skipped,
    )


def _start(point: Any) -> PeerProcess:
    return PeerProcess(point)


def _series(name: str, group: str, settings: PeerSettings, pythons: Mapping[str, str]) -> Series:
    python = pythons.get(ENVIRONMENTS.get(name, ""), sys.executable)
    steps = settings.model.steps if group in ("dnc", "sdnc", "sam") else 1
    return Series(
        kind="peer",
        name=name,
        sizes=(settings.size(group),),
        order=0.0,
        units=steps,
        flexible=False,
        point=partial(_point, name, python, settings),
    )


def _point(name: str, python: str, settings: PeerSettings, size: int, units: int) -> PeerPoint:
    return PeerPoint(name, python, settings.threads, settings.work())

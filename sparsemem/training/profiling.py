"""`train --profile`: where the time of a training step goes, as a table and as a trace.

After some steps to warm up, a few dozen are timed by a stopwatch at the borders of regions, which
costs little, so that the shares are those of ordinary training. Then a few steps are recorded by
torch's profiler, operation by operation, for a browser (https://ui.perfetto.dev). Training goes on
afterwards as if nothing had been. The stopwatch is the host's: on a GPU it says what launching
takes, and the trace what the kernels do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile

from sparsemem.bench.measuring import profiling
from sparsemem.files import replace_file
from sparsemem.indexes.triton_switch import use_triton
from sparsemem.kernels.threads import num_threads
from sparsemem.models.base import MemoryModel
from sparsemem.training.errors import RunError
from sparsemem.training.regions import Stopwatch, in_region, listening, region

WARM_UP, TIMED, TRACED = 5, 24, 3  # training steps
REST = "rest"
MEANING = {
    "data": "making the batch",
    "controller": "the controller, forward",
    "layers": "interface and output layers, forward",
    "search": "finding the rows to read",
    "kernels": "compiled memory steps, forward",
    "memory": "the rest of the memory step, forward",
    "loss": "loss and metric",
    "autograd": "backward pass",
    "kernels backward": "compiled memory steps, backward",
    "optimiser": "clipping and the optimiser's step",
    REST: "the loop over time and all else",
}
# Of cells, which are regions, too.
PARTS = (
    ("controller", "controller"),
    ("lstm", "controller"),
    ("interface", "layers"),
    ("memory", "memory"),
)
# Functions that belong to a region, where there are such: module, class or None, name, region.
FUNCTIONS = (
    ("sparsemem.memory.episode", "Episode", "search", "search"),
    ("sparsemem.bank.bank", None, "find", "search"),
    ("sparsemem.bank.reading", None, "find", "search"),
    ("sparsemem.kernels.fused", None, "search_step", "search"),
    ("sparsemem.kernels.fused", None, "write_step", "kernels"),
    ("sparsemem.kernels.fused", None, "read_step", "kernels"),
    ("sparsemem.kernels.fused", None, "links_step", "kernels"),
    ("sparsemem.kernels.fused", "FusedStep", "backward", "kernels backward"),
    # Whole sequences: the controller and the search are inside.
    ("sparsemem.kernels.sequence", None, "run", "kernels"),
    ("sparsemem.kernels.sequence", "UnrolledSteps", "backward", "kernels backward"),
)
# Others, where Triton's kernels are used.
TRITON_FUNCTIONS = (
    ("sparsemem.kernels.gpu.step", None, "search_step", "search"),
    ("sparsemem.kernels.gpu.step", None, "write_step", "kernels"),
    ("sparsemem.kernels.gpu.step", None, "read_step", "kernels"),
    ("sparsemem.kernels.gpu.step", None, "links_step", "kernels"),
    ("sparsemem.kernels.gpu.sequence", None, "device_sequence", "kernels"),
)


class Profile:
    """Watches the training steps of a run and writes into its folder `profile`."""

    def __init__(
        self, model: MemoryModel, folder: Path, say: Callable[[str], object] = print
    ) -> None:
        self.model, self.folder, self._say = model, folder, say
        self.stopwatch = Stopwatch()
        self.steps = 0
        self._written = False
        device = next(model.parameters()).device
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._tracer = profile(activities=[ProfilerActivity.CPU, *gpu])

    @property
    def timed(self) -> int:
        """Steps on the stopwatch."""
        return min(max(self.steps - WARM_UP, 0), TIMED)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each training step."""
        number = self.steps
        if number < WARM_UP or self._written:
            yield
        elif number < WARM_UP + TIMED:
            with named_regions(self.model), listening(self.stopwatch), region(REST):
                yield
        else:
            # A trace needs the regions' names, and the stopwatch not what the trace costs.
            with named_regions(self.model), listening(Stopwatch()), self._traced(number):
                yield
        self.steps += 1
        if self.steps == WARM_UP + TIMED + TRACED:
            self.write(trace=True)

    @contextmanager
    def _traced(self, number: int) -> Iterator[None]:
        """The recorder runs through all traced steps."""
        if number == WARM_UP + TIMED:
            self._tracing = ExitStack()
            self._tracing.enter_context(profiling(self._tracer))
        with region(REST):
            yield

    def close(self) -> None:
        """Training has ended: write what there is, if it ended early."""
        if self._written:
            return
        tracing = self.steps > WARM_UP + TIMED
        if self.timed:
            self.write(trace=tracing)
        else:
            self._say(f"no profile: it needs more than {WARM_UP} training steps")

    def write(self, trace: bool) -> None:
        """The table, on the console too, and the trace."""
        self._written = True
        rows = table(self.stopwatch.seconds, self.timed)
        files = {
            "profile.txt": ("\n".join(rows) + "\n").encode(),
            "profile.json": json.dumps(self.summary(), indent=2).encode(),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                replace_file(self.folder / name, data)
            if trace:
                self._tracing.close()
                beside = self.folder / ".trace.json"
                self._tracer.export_chrome_trace(str(beside))
                os.replace(beside, self.folder / "trace.json")
        except OSError as error:
            raise RunError(
                f"cannot write {error.filename or self.folder}: {error.strerror}"
            ) from None
        for row in rows:
            self._say(row)
        where = " (trace.json: open it in https://ui.perfetto.dev)" if trace else ""
        self._say(f"profile written to {self.folder}{where}")

    def summary(self) -> dict[str, Any]:
        """Seconds of a step by region."""
        seconds = {name: total / self.timed for name, total in self.stopwatch.seconds.items()}
        return {"steps": self.timed, "seconds_a_step": seconds, "threads": num_threads()}


def table(seconds: dict[str, float], steps: int) -> list[str]:
    """Milliseconds of a step and shares, largest first."""
    whole = sum(seconds.values())
    lines = [f"{'region':<18}{'ms a step':>10}{'share':>8}"]
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        share = f"{100 * spent / whole:.1f} %"
        lines.append(f"{name:<18}{1e3 * spent / steps:>10.3f}{share:>8}  {MEANING.get(name, '')}")
    return [*lines, f"{'a step':<18}{1e3 * whole / steps:>10.3f}  mean of {steps}"]


@contextmanager
def named_regions(model: MemoryModel) -> Iterator[None]:
    """Let the parts of a model, and the functions named above, be regions within the block."""
    cell = model.cell
    modules: list[tuple[Any, str]] = [(cell, "memory"), (model.output, "layers")]
    for name, of in PARTS:
        if isinstance(getattr(cell, name, None), nn.Module):
            modules.append((getattr(cell, name), of))
    with ExitStack() as stack:
        for module, name in modules:
            stack.enter_context(_replaced(module, "forward", in_region(name, module.forward)))
        others = TRITON_FUNCTIONS if use_triton(next(model.parameters())) else ()
        for path, kind, name, of in FUNCTIONS + others:
            owner: Any = import_module(path)
            owner = owner if kind is None else getattr(owner, kind, None)
            if hasattr(owner, name):
                stack.enter_context(_replaced(owner, name, _like(owner, name, of)))
        yield


def _like(owner: Any, name: str, of: str) -> Any:
    """The function in a region; what is static stays so."""
    timed = in_region(of, getattr(owner, name))
    return staticmethod(timed) if isinstance(vars(owner).get(name), staticmethod) else timed


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute as long as the block lasts."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

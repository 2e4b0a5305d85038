"""How long a training step will take, from short steps on this machine at the config's sizes.

Sizes that would take too long, or too much memory, are cut down, and the time is extrapolated by
the line through the cut size and half of it: a step's time is a constant and a part that grows with
the steps, the sequences, and the numbers that a memory of that many slots holds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from sparsemem.models.base import Cell
from sparsemem.models.dense import DenseCell
from sparsemem.models.dnc import DNCCell
from sparsemem.tasks import Batch, Task
from sparsemem.training.bptt import train_batch
from sparsemem.training.config import Config
from sparsemem.training.dryrun import is_sparse, linear
from sparsemem.training.optimisers import make_optimiser
from sparsemem.training.plan import Lengths, Planned, Seconds, model_on
from sparsemem.training.setup import device_of

SPARSE_STEPS, DENSE_STEPS = 64, 12  # that are run, at most
MOST_SEQUENCES, MOST_HIDDEN = 32, 512
MOST_NUMBERS = 2**25  # that a pass may hold
SECONDS, MOST_REPETITIONS, FEWEST = 1.2, 15, 3  # of each size that is run
LEVELS = (64, 128)


class Sizes(NamedTuple):
    """What a training step's time depends on."""

    batch: int
    steps: int
    hidden: int
    slots: int


def plan_seconds(planned: Planned) -> Seconds:
    """Time a few training steps at the config's sizes, or as near to them as is quick."""
    config, task, lengths, _ = planned
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            step = _step_seconds(config, task, lengths) + _data_seconds(config, task)
    finally:
        torch.set_num_threads(threads)
    return Seconds(step=step, total=step * config.training.steps)


def _step_seconds(config: Config, task: Task, lengths: Lengths) -> float:
    """Seconds of a step on sequences of mean length, with its optimiser steps."""
    cell = model_on(torch.device("meta"), config, task).cell
    slots = int(config.model.options.get("num_slots", 1))
    wanted = Sizes(config.training.batch_size, round(lengths.mean), cell.hidden_size, slots)
    cut = _cut(cell, wanted)
    short = cut._replace(steps=max(1, cut.steps // 2))
    measured = _timed(config, task, cut)
    if wanted.steps > cut.steps:
        half = _timed(config, task, short)
        each = max(measured - half, 0.0) / max(cut.steps - short.steps, 1)
        # Each chunk of truncated backpropagation has what a step has beside its time steps.
        chunks = -(-wanted.steps // (config.training.truncate or wanted.steps))
        constant = max(measured - each * cut.steps, 0.0)
        whole = constant * chunks + each * wanted.steps
    else:
        whole = measured
    for change in _changes(cell, wanted, cut):
        whole *= change.factor(measured, lambda sizes: _timed(config, task, sizes))
    return whole


class Change(NamedTuple):
    """A size that was cut down: the smaller sizes to time, and how far the wanted one is off."""

    smaller: Sizes
    at: tuple[float, float]  # what time is linear in: at the smaller sizes and the cut ones
    wanted: float

    def factor(self, measured: float, timed: Callable[[Sizes], float]) -> float:
        """Time at the wanted size, by that at the cut one."""
        low, high = self.at
        slope = max(measured - timed(self.smaller), 0.0) / (high - low)
        return 1 + slope * (self.wanted - high) / measured


def _changes(cell: Cell, wanted: Sizes, cut: Sizes) -> list[Change]:
    """One for each size but the steps that was cut down."""
    changes = []
    for name in ("batch", "hidden", "slots"):
        large, size = getattr(wanted, name), getattr(cut, name)
        if large > size:
            smaller = cut._replace(**{name: max(1, size // 2)})
            numbers = [_work(cell, name, value) for value in (smaller, cut, wanted)]
            changes.append(Change(smaller, (numbers[0], numbers[1]), numbers[2]))
    return changes


def _work(cell: Cell, name: str, sizes: Sizes) -> float:
    """What time is linear in, of one size."""
    if name == "slots":
        return _numbers(cell, sizes.slots)
    value = float(getattr(sizes, name))
    return value * value if name == "hidden" else value


def _numbers(cell: Cell, slots: int) -> float:
    """How many numbers a step of a sequence makes of a dense memory, roughly."""
    if not isinstance(cell, DenseCell):
        return 0.0
    links = 8 * slots if isinstance(cell, DNCCell) else 0
    return float(slots * (6 * cell.slot_dim + 30 * cell.num_heads + links))


def _cut(cell: Cell, wanted: Sizes) -> Sizes:
    """Sizes that can be run quickly; slots of sparse models cost nothing."""
    sparse = is_sparse(cell) or not isinstance(cell, DenseCell)
    sizes = Sizes(
        min(wanted.batch, MOST_SEQUENCES),
        min(wanted.steps, SPARSE_STEPS if sparse else DENSE_STEPS),
        min(wanted.hidden, MOST_HIDDEN),
        wanted.slots,
    )
    while (
        sizes.slots > 64
        and sizes.batch * sizes.steps * _numbers(cell, sizes.slots) > MOST_NUMBERS
        and not sparse
    ):
        sizes = sizes._replace(slots=sizes.slots // 2)
    return sizes


def _timed(config: Config, task: Task, sizes: Sizes) -> float:
    """Median seconds of `train_batch` at these sizes, whole sequences, after one to warm up."""
    changes = {"hidden_size": sizes.hidden}
    if "num_slots" in config.model.options:
        changes["num_slots"] = sizes.slots
    device = device_of(config)
    model = model_on(device, config, task, **changes)
    optimiser = make_optimiser(config.training.optimizer, model.parameters())
    batch = _sequences(config, task, sizes).to(device)

    def step() -> float:
        start = time.perf_counter()
        train_batch(model, task, optimiser, batch, None, config.training.gradient_clip)
        return time.perf_counter() - start

    return _median(step)


def _median(step: Callable[[], float]) -> float:
    """Of as many repetitions as fit into SECONDS, after one that does not count."""
    step()
    begun = time.perf_counter()
    times: list[float] = []
    while len(times) < MOST_REPETITIONS:
        times.append(step())
        if len(times) >= FEWEST and time.perf_counter() - begun > SECONDS:
            break
    return statistics.median(times)


def _sequences(config: Config, task: Task, sizes: Sizes) -> Batch:
    """Sequences of the task, repeated or cut to the sizes: their ends, which are scored."""
    assert config.curriculum.maximum is not None
    whole = task.batch(0, min(config.curriculum.maximum, LEVELS[1]))
    repeats = -(-sizes.steps // whole.input.shape[1])
    parts = (torch.cat([part] * repeats, 1)[: sizes.batch, -sizes.steps :] for part in whole)
    return Batch(*parts)


def _data_seconds(config: Config, task: Task) -> float:
    """Seconds to make a batch, at the middle of the curriculum."""
    low, high = config.curriculum.minimum, config.curriculum.maximum
    assert low is not None
    assert high is not None
    level = (low + high) // 2

    def seconds(level: int) -> float:
        def make() -> float:
            start = time.perf_counter()
            task.batch(1, level)
            return time.perf_counter() - start

        return _median(make)

    if level <= LEVELS[1]:
        return seconds(level)
    return linear(LEVELS, (seconds(LEVELS[0]), seconds(LEVELS[1])), level)

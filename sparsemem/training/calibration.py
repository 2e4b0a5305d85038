"""How long a training step will take, from short steps on this machine at the config's sizes.

Sizes that would take too long, or too much memory, are cut down, and the time is extrapolated by
the line through the cut size and half of it: a step's time is a constant and a part that grows with
the steps, the sequences, and the numbers that a memory of that many slots holds, or the rows of a
bank that are scanned. (A bank of a FAISS index counts as one of at most 65,536 rows.)
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch

from sparsemem.indexes.factory import EXACT
from sparsemem.models.base import Cell
from sparsemem.models.dense import DenseCell
from sparsemem.models.dnc import DNCCell
from sparsemem.tasks import Batch, Task
from sparsemem.training.bankplan import PROBE_ROWS
from sparsemem.training.bptt import train_batch
from sparsemem.training.config import Config
from sparsemem.training.dryrun import is_sparse, linear
from sparsemem.training.optimisers import make_optimisers
from sparsemem.training.plan import Lengths, Planned, Seconds, model_on
from sparsemem.training.setup import as_trained, device_of
from sparsemem.training.threads import threads_of

SPARSE_STEPS, DENSE_STEPS = 64, 16  # that are run, at most
MOST_SEQUENCES, MOST_HIDDEN = 64, 512
FEWEST_STEPS, FEWEST_SEQUENCES = 4, 4  # before fewer slots are run
MOST_NUMBERS = 2**26  # that a pass may hold
SECONDS, MOST_REPETITIONS, FEWEST = 1.0, 15, 3  # of each size that is run
CHEAPEST, DEAREST = 0.5, 1.5  # a step, by its share of what was run
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
    with threads_of(config), torch.random.fork_rng(devices=[]):
        step = _step_seconds(config, task, lengths) + _data_seconds(config, task)
    return Seconds(step=step, total=step * config.training.steps)


def _step_seconds(config: Config, task: Task, lengths: Lengths) -> float:
    """Seconds of a step on sequences of mean length, with its optimiser steps."""
    cell = model_on(torch.device("meta"), config, task).cell
    slots = int(config.model.options.get("num_slots", 1))
    if config.bank is not None:  # what searching in a FAISS index takes does not grow so simply
        rows = config.bank.num_rows
        slots = rows if config.bank.index == EXACT else min(rows, PROBE_ROWS)
    wanted = Sizes(config.training.batch_size, round(lengths.mean), cell.hidden_size, slots)
    cut = _cut(cell, wanted)
    if config.bank is not None:
        cut = cut._replace(slots=min(slots, PROBE_ROWS))
    changes = _changes(cell, wanted, cut)
    short = cut._replace(steps=max(1, cut.steps // 2))
    times = _timed(config, task, [cut, short, *(change.smaller for change in changes)])
    whole = _whole(times[cut], times[short], cut.steps, wanted.steps, config.training.truncate)
    for change in changes:
        whole *= change.factor(times[cut], times[change.smaller])
    return whole


def _whole(measured: float, half: float, ran: int, steps: int, truncate: int | None) -> float:
    """Seconds of all steps of a sequence, from those of `ran` of them, and of half as many.

    Each chunk of truncated backpropagation has what a pass has beside its time steps; those of
    several chunks that were run hold it. Noise may not make a step much cheaper or dearer than its
    share of what was run.
    """
    if steps <= ran:
        return measured
    share = measured / ran
    if truncate is not None and truncate < ran:
        return share * steps
    line = (measured - half) / max(ran - ran // 2, 1)
    each = min(max(line, CHEAPEST * share), DEAREST * share)
    constant = max(measured - each * ran, 0.0)
    return constant * -(-steps // (truncate or steps)) + each * steps


class Change(NamedTuple):
    """A size that was cut down: the smaller sizes to time, and how far the wanted one is off."""

    smaller: Sizes
    at: tuple[float, float]  # what time is linear in: at the smaller sizes and the cut ones
    wanted: float

    def factor(self, measured: float, smaller: float) -> float:
        """Time at the wanted size by that at the cut one, from those at the cut and the smaller."""
        low, high = self.at
        slope = max(measured - smaller, 0.0) / (high - low)
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
    if name == "slots" and isinstance(cell, DenseCell):
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
    if not sparse:
        # Rather fewer steps than fewer slots: what fits into a cache is quicker by far.
        for name, least in (("steps", FEWEST_STEPS), ("batch", FEWEST_SEQUENCES), ("slots", 1)):
            while getattr(sizes, name) > least and _pass_numbers(cell, sizes) > MOST_NUMBERS:
                sizes = sizes._replace(**{name: max(getattr(sizes, name) // 2, least)})
    return sizes


def _pass_numbers(cell: Cell, sizes: Sizes) -> float:
    return sizes.batch * sizes.steps * _numbers(cell, sizes.slots)


def _timed(config: Config, task: Task, all_sizes: list[Sizes]) -> dict[Sizes, float]:
    """Median seconds of `train_batch` on whole sequences of each of these sizes, in turns.

    In turns, so that whatever else the machine does hits all of them alike.
    """
    steps = {sizes: _training_step(config, task, sizes) for sizes in all_sizes}
    times: dict[Sizes, list[float]] = {sizes: [] for sizes in all_sizes}
    for step in steps.values():
        step()
    begun = time.perf_counter()
    for turn in range(MOST_REPETITIONS):
        if turn >= FEWEST and time.perf_counter() - begun > SECONDS * len(steps):
            break
        for sizes, step in steps.items():
            times[sizes].append(_seconds(step))
    return {sizes: statistics.median(values) for sizes, values in times.items()}


def _training_step(config: Config, task: Task, sizes: Sizes) -> Callable[[], object]:
    """A training step of a model of these sizes."""
    changes = {"hidden_size": sizes.hidden}
    if "num_slots" in config.model.options or config.bank is not None:
        changes["num_slots"] = sizes.slots
    device = device_of(config)
    plain = model_on(device, config, task, indexed=True, **changes)
    model = as_trained(config, plain) if config.training.truncate is None else plain
    optimiser = make_optimisers(config, model)
    batch = _sequences(config, task, sizes).to(device)
    clip = config.training.gradient_clip
    return lambda: train_batch(model, task, optimiser, batch, config.training.truncate, clip)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _sequences(config: Config, task: Task, sizes: Sizes) -> Batch:
    """Sequences of the task, about as long, repeated or cut to the sizes: their ends.

    Of longer ones other parts would be scored, and a chunk in which nothing is takes no backward
    pass.
    """
    low, high = config.curriculum.minimum, config.curriculum.maximum
    assert low is not None
    assert high is not None
    levels = range(low, max(low, min(high, LEVELS[1])) + 1)
    place = bisect_left(levels, sizes.steps, key=lambda level: task.batch(0, level).input.shape[1])
    whole = task.batch(0, levels[min(place, len(levels) - 1)])
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
        times = [_seconds(lambda: task.batch(1, level)) for _ in range(FEWEST)]
        return statistics.median(times)

    lengths = {task.batch(1, min(low, level)).input.shape[1] for low in LEVELS}
    if level <= LEVELS[1] or len(lengths) == 1:  # a higher level makes no longer sequences
        return seconds(level)
    return linear(LEVELS, (seconds(LEVELS[0]), seconds(LEVELS[1])), level)

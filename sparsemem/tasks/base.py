"""The contract of tasks: endless data sets of ready batches, with a loss and a metric.

Shape letters: B batch, T steps, X input size, Y output size.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sparsemem.checks import check_size, nearest

SPLITS = ("train", "validation", "test")
EVALUATION_BATCHES = 10


class Batch(NamedTuple):
    """The sequences of one batch, batch first.

    `target` holds bits in {0, 1} or class ids; `mask` is true at the steps whose output counts.
    """

    input: Float[Tensor, "B T X"]
    target: Float[Tensor, "B T Y"] | Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]

    def steps(self, start: int, stop: int | None = None) -> Batch:
        """The steps `start` to `stop` (exclusive) of every sequence, as views."""
        return Batch(*(tensor[:, start:stop] for tensor in self))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; for one on its way to a GPU nobody waits."""
        non_blocking = torch.device(device).type == "cuda"
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def check_split(split: str) -> str:
    """Return `split` if it is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    return split


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating point dtype from itself or from its name, such as "float64"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, expected a floating point dtype such as float32")
    return found


def check_choice(name: str, value: str, known: tuple[str, ...]) -> str:
    """Return `value` if it is one of the `known` ones; the error names the nearest."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, {nearest(str(value), known)}")
    return value


class Task(IterableDataset[Batch]):
    """An endless stream of batches; batch number i is a function of (seed, split, level, i) alone.

    So a run is resumed by its step number, and several workers of a
    `DataLoader(task, batch_size=None)` each take every n-th batch. Iterating reads the
    attribute `level` at every batch (workers see its value at the time that they start).

    Subclasses set `input_size`, `output_size` and `metric_name`, and implement
    `make_batch`, `normaliser`, `summed_loss` and `score`.
    """

    input_size: int
    output_size: int
    metric_name: str
    lowest_level: int = 1  # below it there is no such sequence
    min_level: int = 1  # training draws levels from min_level to max_level
    max_level: int = 1
    level: int = 1

    def __init__(
        self,
        *,
        seed: int = 0,
        batch_size: int = 16,
        split: str = "train",
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        """Check and keep what all tasks have in common.

        Raises TypeError or ValueError for a seed below 0, a batch size below 1, an unknown
        split or a dtype that is not floating point.
        """
        super().__init__()
        self.seed = check_size("seed", seed, 0)
        self.batch_size = check_size("batch_size", batch_size)
        self.split = check_split(split)
        self.dtype = check_dtype(dtype)

    @property
    def identity(self) -> str:
        """What a trained model relies on beside the sizes, such as the meaning of word ids.

        A checkpoint is refused by a task of another identity.
        """
        return ""

    def has(self, split: str) -> bool:
        """Whether there is anything in a split; endless tasks always have."""
        check_split(split)
        return True

    def parts(self) -> dict[str, Task]:
        """By name, the tasks that this one mixes, for figures of each; none for most tasks."""
        return {}

    # What differs between tasks ------------------------------------------------------

    def make_batch(self, index: int, level: int) -> Batch:
        """Batch number `index` at `level`, both already checked."""
        raise NotImplementedError

    def normaliser(self, batch: Batch) -> Int[Tensor, ""]:
        """How many terms the summed loss of `batch` has (bits or answers)."""
        raise NotImplementedError

    def summed_loss(self, output: Float[Tensor, "B T Y"], batch: Batch) -> Float[Tensor, ""]:
        """The loss summed over the steps that count; 0, with a gradient, if there are none."""
        raise NotImplementedError

    def score(
        self, output: Float[Tensor, "B T Y"], batch: Batch
    ) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
        """(wrong, total), whose sums over batches divide to the metric of all of them."""
        raise NotImplementedError

    # What they share -----------------------------------------------------------------

    def check_level(self, level: int, name: str = "level") -> int:
        """Return `level` if the task has it; levels outside of training's are allowed."""
        return check_size(name, level, self.lowest_level)

    def batch(self, index: int, level: int | None = None) -> Batch:
        """Batch number `index` at `level` (default: the attribute `level`), on the CPU.

        A pure function of its arguments and of the task's options, seed and split.
        Raises ValueError for a negative index or a level that the task does not have.
        """
        level = self.level if level is None else level
        return self.make_batch(check_size("index", index, 0), self.check_level(level))

    def __iter__(self) -> Iterator[Batch]:
        """Yield batch(0), batch(1), ...; a worker of a DataLoader yields its own stripe."""
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in itertools.count(start, step):
            yield self.batch(index)

    def with_split(self, split: str) -> Task:
        """The same task on another split: "train", "validation" or "test"."""
        other = copy.copy(self)
        other.split = check_split(split)
        return other

    def evaluation_batches(
        self, split: str = "test", count: int | None = None, level: int | None = None
    ) -> Iterator[Batch]:
        """The first `count` batches of `split` at `level`, to measure a model on.

        Default: 10 batches at the attribute `level`.
        """
        task = self.with_split(split)
        number = EVALUATION_BATCHES if count is None else check_size("count", count)
        return (task.batch(index, level) for index in range(number))

    def loss(
        self,
        output: Float[Tensor, "B T Y"],
        batch: Batch,
        normaliser: Int[Tensor, ""] | Float[Tensor, ""] | float | None = None,
    ) -> Float[Tensor, ""]:
        """Training loss: the mean over the bits or answers that count.

        For truncated BPTT give each slice `batch.steps(...)` the normaliser of the whole
        batch, `task.normaliser(batch)`: the slices' losses then add up to the whole loss.
        """
        self.check_output(output, batch)
        if normaliser is None:
            normaliser = self.normaliser(batch).clamp(min=1)
        return self.summed_loss(output, batch) / normaliser

    def metric(self, output: Float[Tensor, "B T Y"], batch: Batch) -> Float[Tensor, ""]:
        """The figure that `metric_name` names, lower is better."""
        self.check_output(output, batch)
        wrong, total = self.score(output, batch)
        return wrong / total.clamp(min=1)

    def check_output(self, output: Tensor, batch: Batch) -> None:
        """Refuse an output of another shape than the batch asks for."""
        expected = (*batch.mask.shape, self.output_size)
        if tuple(output.shape) != expected:
            raise ValueError(f"output has shape {tuple(output.shape)}, expected {expected}")

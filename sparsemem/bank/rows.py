"""Tables of rows: where they live, and how they are read with row-sparse gradients."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsemem.bank.gradients import remember, sparse_gradient
from sparsemem.devices import is_device
from sparsemem.indexes.base import Found
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.triton_switch import use_triton
from sparsemem.kernels import row_kernels_for
from sparsemem.kernels.score_gradients import score_gradients

if TYPE_CHECKING:
    from sparsemem.bank.bank import MemoryBank

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FILLED_AT_ONCE = 2**20  # random numbers drawn at once
WIDEST = 4096  # numbers of a row that a program of a GPU holds, beside its query


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Zeros that take no memory before they are touched (on the CPU).

    MemoryError where there are not as many addresses.
    """
    if math.prod(shape) and (device is None or torch.device(device).type == "cpu"):
        # Zero pages from the system, and small ones: torch.zeros would write every one of them,
        # and of those that numpy asks for (2 MB each) a few hundred scattered rows take 1 GB.
        size = math.prod(shape) * dtype.itemsize
        try:
            pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANON)
        except (OSError, OverflowError):
            raise MemoryError(f"the system does not give {size} bytes for {list(shape)}") from None
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def mapped_zeros(path: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Tables of zeros, one after another in a new file mapped into memory.

    The file is sparse: it takes up disk as rows are written. OSError where it cannot be made;
    FileExistsError where there is one already, which is never overwritten. `new_storage` removes
    it when what it is for fails.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    with open(path, "xb") as file:
        try:
            os.truncate(file.fileno(), sum(sizes))
        except OSError as error:
            path.unlink()
            raise OSError(
                error.errno,
                f"cannot make a file of {sum(sizes)} bytes: {error.strerror}",
                str(path),
            ) from None
    data = torch.from_numpy(np.memmap(path, np.uint8, "r+"))
    parts = torch.split(data, sizes)
    return [part.view(dtype).view(shape) for part, shape in zip(parts, shapes, strict=True)]


def new_tables(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str | None,
    path: Path | None,
) -> list[Tensor]:
    """Tables of zeros: in memory, or (CPU only) in a new file."""
    if path is None:
        return [zeros(*shape, dtype=dtype, device=device) for shape in shapes]
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"storage is {str(path)!r}, expected 'ram' for a bank on {device}")
    return mapped_zeros(path, shapes, dtype)


@contextmanager
def new_storage(path: Path | None) -> Iterator[None]:
    """The block makes the file of a bank's tables (None: there is none); if it fails, that goes.

    FileExistsError where there is one already, which is left alone.
    """
    if path is None:
        yield
        return
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"storage is {str(path)!r}, which is there: expected a new file")
    try:
        yield
    except FileExistsError:  # another's, made meanwhile
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def fill_normal(table: Float[Tensor, "n w"], generator: torch.Generator, deviation: float) -> None:
    """Random numbers N(0, deviation^2), the same whatever the dtype and device."""
    step = max(1, FILLED_AT_ONCE // table.shape[1])
    for start in range(0, len(table), step):
        part = table[start : start + step]
        numbers = torch.randn(part.shape, generator=generator, dtype=torch.float32)
        part.copy_(numbers.mul_(deviation))


def taken(table: Tensor, ids: Tensor, dtype: torch.dtype, all_found: bool = False) -> Tensor:
    """Rows [*S, W] as `dtype`; zeros where the id is -1, which `all_found` says is nowhere."""
    flat = ids.flatten()
    missing = None if all_found else flat < 0
    if missing is not None and (is_device(ids) or missing.any()):
        rows = table.index_select(0, flat.clamp(min=0)).to(dtype)
        rows.masked_fill_(missing.unsqueeze(1), 0)
    else:
        rows = table.index_select(0, flat).to(dtype)
    return rows.view(*ids.shape, rows.shape[1])


class GatherRows(torch.autograd.Function):
    """rows = table[ids]; the gradient is row-sparse, and none for rows that are not trainable."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, bank: MemoryBank, all_found: bool) -> Tensor:
        """Rows [*S, W] in the computing dtype; zeros where the id is -1."""
        ctx.save_for_backward(ids)
        remember(ctx, table, bank, all_found)
        return taken(table, ids, bank.computing_dtype, all_found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """A sparse COO tensor with one entry for each trainable row that was read."""
        (ids,) = ctx.saved_tensors
        return sparse_gradient(ctx, ids, gradient), None, None, None


class ScoredRows(torch.autograd.Function):
    """As `GatherRows`, with the scores that a search has computed from the same rows."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        queries: Tensor,
        ids: Tensor,
        scores: Tensor,
        bank: MemoryBank,
        all_found: bool,
    ) -> tuple[Tensor, Tensor]:
        """Rows [Q, K, W] (zeros where the id is -1) and their scores [Q, K]."""
        rows = taken(table, ids, bank.computing_dtype, all_found)
        scores = scores.clone()  # an output of its own
        ctx.save_for_backward(ids, queries, rows, scores)
        remember(ctx, table, bank, all_found)
        ctx.set_materialize_grads(False)
        return rows, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, by_score: Tensor | None) -> Any:
        """That of the table is sparse, with one entry for each trainable row that was read."""
        ids, queries, rows, scores = ctx.saved_tensors
        of_queries = None
        if by_score is not None:
            saved = (queries, rows, scores, ids)
            of_queries, gradient = through_scores(ctx.bank.metric, *saved, by_score, gradient)
        if gradient is None:  # nothing depends on either
            gradient = torch.zeros_like(rows)
        return sparse_gradient(ctx, ids, gradient), of_queries, None, None, None, None


def takes_score_gradients(rows: Tensor) -> bool:
    """Whether a kernel of a GPU makes the gradients through the scores of rows [Q, K, W]."""
    return rows.dtype == torch.float32 and 0 < rows.shape[-1] <= WIDEST and use_triton(rows)


def through_scores(
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    rows: Float[Tensor, "Q K W"],
    scores: Float[Tensor, "Q K"],
    ids: Int[Tensor, "Q K"],
    by_score: Float[Tensor, "Q K"],
    by_row: Float[Tensor, "Q K W"] | None,
) -> tuple[Float[Tensor, "Q W"], Float[Tensor, "Q K W"]]:
    """Gradients of queries and rows, from those of scores and rows; an id of -1 has no score."""
    given = (queries, rows, scores, ids, by_score, by_row)
    if takes_score_gradients(rows):
        from sparsemem.kernels.gpu import score_gradients as on_a_gpu

        return on_a_gpu.score_gradients(metric, *given)
    kernels = None if is_device(ids) else row_kernels_for(rows.dtype)
    if kernels is not None:
        return score_gradients(kernels, metric, *given)
    missing = ids < 0
    if is_device(ids) or missing.any():  # their scores are constant, and infinite
        by_score, scores = (part.masked_fill(missing, 0) for part in (by_score, scores))
    of_queries, of_rows = metric.gradients(queries, rows, scores, by_score)
    return of_queries, of_rows if by_row is None else of_rows.add_(by_row)


def gather(
    table: Float[Tensor, "N W"], ids: Int[Tensor, "*S"], bank: MemoryBank, all_found: bool = False
) -> Float[Tensor, "*S W"]:
    """Rows at ids, zero where the id is -1; differentiable with a row-sparse gradient.

    To be called under `bank.table.lock.read()`. A row that is written anew before the backward
    pass is another row: it gets no gradient from this one's. all_found: ids are of live rows.
    """
    return GatherRows.apply(table, ids, bank, all_found)  # type: ignore[no-untyped-call, no-any-return]


def gather_scored(
    table: Float[Tensor, "N W"],
    queries: Float[Tensor, "Q W"],
    found: Found,
    bank: MemoryBank,
    all_found: bool = False,
) -> tuple[Float[Tensor, "Q K W"], Float[Tensor, "Q K"]]:
    """As `gather`, the rows that a search found, and their scores, differentiable in both."""
    return ScoredRows.apply(  # type: ignore[no-untyped-call, no-any-return]
        table, queries, found.ids, found.scores, bank, all_found
    )


def gather_pairs(
    subkeys: Float[Tensor, "2 S D"], ids: Int[Tensor, "*n"], dtype: torch.dtype
) -> Float[Tensor, "*n W"]:
    """Rows of product keys: n is sub-key n // S of the first half, then n % S; id -1: zeros.

    Differentiable; the gradient of the sub-keys, which many rows share, is dense.
    """
    safe, size = ids.clamp(min=0), subkeys.shape[1]
    first, second = subkeys.to(dtype)
    halves = [F.embedding(safe // size, first), F.embedding(safe % size, second)]
    return torch.cat(halves, -1).masked_fill((ids < 0).unsqueeze(-1), 0)


class Owner:
    """A parameter's bank, which it does not keep alive; a pickled one knows of none."""

    def __init__(self, bank: MemoryBank | None = None) -> None:
        self._reference = None if bank is None else weakref.ref(bank)

    @property
    def bank(self) -> MemoryBank | None:
        """The bank, while it is there."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type[Owner], tuple[()]]:
        return Owner, ()


def own(parameter: nn.Parameter, bank: MemoryBank) -> nn.Parameter:
    """Mark a parameter as a table of `bank`, for optimisers to find."""
    parameter.memory_bank = Owner(bank)  # type: ignore[attr-defined]
    return parameter


def bank_of(parameter: Tensor) -> MemoryBank | None:
    """The bank whose rows a parameter holds, or None."""
    owner: Owner | None = getattr(parameter, "memory_bank", None)
    return None if owner is None else owner.bank

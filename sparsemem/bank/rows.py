"""Tables of rows: where they live, and how they are read with row-sparse gradients."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from sparsemem.bank.bank import MemoryBank

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Zeros that take no memory before they are touched (on the CPU)."""
    if device is None or torch.device(device).type == "cpu":
        size = torch.empty(0, dtype=dtype).element_size()
        # numpy asks the system for zero pages; torch.zeros would write every one of them.
        data = np.zeros(int(np.prod(shape)) * size, np.uint8)
        return torch.from_numpy(data).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


class GatherRows(torch.autograd.Function):
    """rows = table[ids]; the gradient is row-sparse, and none for rows that are not trainable."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, bank: MemoryBank) -> Tensor:
        """Rows [*S, W] in the computing dtype; zeros where the id is -1."""
        ctx.save_for_backward(ids)
        ctx.bank, ctx.shape = bank, table.shape
        rows = table.index_select(0, ids.flatten().clamp(min=0)).to(bank.computing_dtype)
        return rows.view(*ids.shape, -1).masked_fill_((ids < 0).unsqueeze(-1), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """A sparse COO tensor with one entry for each trainable row that was read."""
        (ids,) = ctx.saved_tensors
        flat = ids.flatten()
        kept = ctx.bank.is_trainable(flat)
        values = gradient.reshape(len(flat), -1)[kept]
        sparse = torch.sparse_coo_tensor(
            flat[kept].unsqueeze(0), values, ctx.shape, check_invariants=False
        )
        return sparse, None, None


def gather(
    table: Float[Tensor, "N W"], ids: Int[Tensor, "*S"], bank: MemoryBank
) -> Float[Tensor, "*S W"]:
    """Rows at ids, zero where the id is -1; differentiable with a row-sparse gradient."""
    return GatherRows.apply(table, ids, bank)  # type: ignore[no-untyped-call, no-any-return]


def own(parameter: nn.Parameter, bank: MemoryBank) -> nn.Parameter:
    """Mark a parameter as a table of `bank`, for optimisers to find."""
    parameter.memory_bank = weakref.ref(bank)  # type: ignore[attr-defined]
    return parameter


def bank_of(parameter: Tensor) -> MemoryBank | None:
    """The bank whose rows a parameter holds, or None."""
    reference = getattr(parameter, "memory_bank", None)
    return None if reference is None else reference()

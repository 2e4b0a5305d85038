"""Gradients as optimisers need them: each row once, and finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.triton_switch import use_triton
from sparsemem.kernels import row_kernels_for

WIDEST = 16_384  # numbers of a row that a program of a GPU holds


class Change(NamedTuple):
    """One parameter's gradient, ready to be applied."""

    name: str
    parameter: Tensor
    options: dict[str, Any]  # of its parameter group
    ids: Int[Tensor, " n"] | None  # the rows that have a gradient; None: it is dense
    gradient: Float[Tensor, "*shape"]  # [n, ...] or as the parameter, in its computing dtype
    by_entry: bool = False  # ids are in no order and may repeat; the gradient has its own dtype


def computing_dtype(parameter: Tensor) -> torch.dtype:
    """What a parameter's state is kept in: float64 for float64 parameters, else float32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def takes_entries(parameter: Tensor, options: dict[str, Any]) -> bool:
    """Whether a kernel adds up a row's gradients and steps it, so that nobody counts the rows."""
    if not parameter.is_contiguous() or 0 in parameter.stride():  # 0: its rows are elsewhere
        return False
    if parameter.device.type == "cpu" and not use_triton(parameter):
        return row_kernels_for(parameter.dtype) is not None
    if not use_triton(parameter) or computing_dtype(parameter) != torch.float32:
        return False
    if options.get("rounding_seed") is not None and parameter.dtype == torch.bfloat16:
        return False
    width = parameter.numel() // max(1, len(parameter))
    return width <= WIDEST


def row_steps(parameter: Tensor) -> Any:
    """The module of the kernels that step its rows, where it `takes_entries`."""
    if use_triton(parameter):
        from sparsemem.kernels.gpu import row_steps

        return row_steps
    from sparsemem.kernels import row_steps as on_the_host

    return on_the_host


def make_change(name: str, parameter: Tensor, options: dict[str, Any]) -> Change:
    """A parameter's gradient; but for `takes_entries`, a repeated row's entries are added up.

    It is what autograd accumulates: dense, or sparse COO over the parameter's first dimension.
    """
    gradient, dtype = parameter.grad, computing_dtype(parameter)
    assert gradient is not None
    if parameter.is_complex():
        raise TypeError(f"{name} is {parameter.dtype}, expected a real dtype")
    if gradient.layout == torch.strided:
        return Change(name, parameter, options, None, gradient.to(dtype))
    if gradient.layout != torch.sparse_coo or gradient.sparse_dim() != 1:
        kind = str(gradient.layout).removeprefix("torch.")
        if gradient.layout == torch.sparse_coo:
            kind += f" with {gradient.sparse_dim()} sparse dimensions"
        raise TypeError(f"the gradient of {name} is {kind}, expected dense or sparse_coo with 1")
    if takes_entries(parameter, options):
        ids, values = gradient._indices()[0].contiguous(), gradient._values()
        return Change(name, parameter, options, ids, values, by_entry=True)
    # Added up in the computing dtype: a bfloat16 sum would lose its small terms.
    whole = gradient.to(dtype).coalesce()
    return Change(name, parameter, options, whole.indices()[0], whole.values())


def check_gradients(changes: Sequence[Change]) -> None:
    """Refuse NaN and infinite gradients, naming the first parameter and row that has one."""
    if not changes:
        return
    device = changes[0].gradient.device
    # One number in all, so that a GPU is waited for once. A sum is finite unless an element is not
    # (or it overflowed: then look closer).
    sums = [_sum(change.gradient).to(device, torch.float64) for change in changes]
    if math.isfinite(reduce(torch.add, sums).item()):
        return
    for change in changes:
        bad = (~change.gradient.isfinite()).nonzero()
        if len(bad):
            place = bad[0].tolist()
            value = change.gradient[tuple(place)].item()
            if change.ids is not None:
                place[0] = int(change.ids[place[0]])
            raise ValueError(
                f"the gradient of {change.name} at {place} is {value}, expected finite values;"
                " nothing was stepped"
            )


def _sum(gradient: Tensor) -> Tensor:
    is_double = gradient.dtype == torch.float64
    return gradient.sum(dtype=torch.float64 if is_double else torch.float32)

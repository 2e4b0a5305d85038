"""Steps of the row optimisers on the CPU: the interface of gpu/row_steps.py, by compiled code.

What is compiled are the equations in row_equations.py; Numba is not imported before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.kernels import row_kernels_for
from sparsemem.kernels.row_gradient import Gradient

# As in row_equations.py, which imports Numba.
SGD, ADAGRAD, ADAM = 0, 1, 2
OUT_OF_RANGE = -1
NUMBERS = 9  # that an equation gets, the last ones unused


def step_sgd(
    table: Tensor, gradient: Gradient, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Int[Tensor, " stepped"]:
    """`RowSGD`'s step of the rows of a table, in place; which rows were stepped, each once."""
    numbers = (options["lr"], options["weight_decay"], options["momentum"], options["nesterov"])
    return _launch(SGD, table, gradient, state.get("momentum_buffer"), None, None, numbers)


def step_adagrad(
    table: Tensor, gradient: Gradient, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Int[Tensor, " stepped"]:
    """As `step_sgd`, `RowAdagrad`'s."""
    numbers = options["lr"], options["weight_decay"], options["eps"]
    return _launch(ADAGRAD, table, gradient, None, None, state["sum"], numbers)


def step_adam(
    table: Tensor,
    gradient: Gradient,
    state: Mapping[str, Tensor],
    options: Mapping[str, Any],
    decoupled: bool,
) -> Int[Tensor, " stepped"]:
    """As `step_sgd`, `RowAdam`'s; `decoupled`: `RowAdamW`'s."""
    lr, decay = float(options["lr"]), options["weight_decay"]
    beta1, beta2 = options["betas"]
    numbers = (
        lr,
        0.0 if decoupled else decay,
        1.0 - lr * decay if decoupled else 1.0,
        options["eps"],
        1.0 - beta1,
        _log(beta1),
        beta2,
        1.0 - beta2,
        _log(beta2),
    )
    moments = state["exp_avg"], state["exp_avg_sq"]
    return _launch(ADAM, table, gradient, *moments, state["step"], numbers)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _launch(
    kind: int,
    table: Tensor,
    gradient: Gradient,
    first: Tensor | None,
    second: Tensor | None,
    narrow: Tensor | None,
    numbers: tuple[Any, ...],
) -> Tensor:
    """State is one or two wide tables, whose rows may lie apart, and a narrow one."""
    kernels = row_kernels_for(table.dtype)
    assert kernels is not None  # or there would be no Gradient
    ids, order, values, *marks = gradient
    stepped = torch.empty_like(ids)
    count, width = len(ids), table.numel() // max(1, len(table))
    strides = [0 if wide is None else wide.stride(0) for wide in (first, second)]
    tensors = (ids, order, values, stepped, table, first, second, narrow, *marks)
    done = kernels.step_rows(
        kernels.like,
        (kind, count, width, len(table), *strides),
        (*map(float, numbers), *[0.0] * (NUMBERS - len(numbers))),
        tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors]),
    )
    if done == OUT_OF_RANGE:
        low, high = int(ids[0]), int(ids[-1])
        raise IndexError(f"a gradient holds row {low if low < 0 else high} of {len(table)}")
    if done:
        torch.autograd.graph.increment_version(table)
    return stepped[:done]

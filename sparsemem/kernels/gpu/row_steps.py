# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels of the row optimisers' steps: a program finds its row's gradient, and steps it.

A program for each entry of a row-sparse gradient. The one at a row's first entry adds up the
others, looks whether the row is trainable, and steps row and state; the rest have nothing to do.
So nobody waits for the number of distinct rows. A barrier stands between what is loaded and what
is stored: every warp loads a row's number for itself, and one of them stores it. The equations are
those of `sparsemem/optim/{sgd,adagrad,adam}.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemem.indexes.launching import launch
from sparsemem.kernels.gpu.equations import kernel
from sparsemem.kernels.gpu.rows import is_first, segment_sum
from sparsemem.kernels.row_gradient import Gradient


@kernel
def _is_due(ids, place, live, frozen, selected, IN_BANK: tl.constexpr, IS_SELECTION: tl.constexpr):
    """Whether the entry at `place` is its row's first, and the row may be stepped."""
    row = tl.load(ids + place)
    due = is_first(ids, place) & (row >= 0)
    if IN_BANK:
        due = due & (tl.load(live + row, mask=row >= 0, other=0) != 0)
        due = due & (tl.load(frozen + row, mask=row >= 0, other=1) == 0)
        if IS_SELECTION:
            due = due & (tl.load(selected + row, mask=row >= 0, other=0) != 0)
    return due


@kernel(do_not_specialize=["count"])
def _sgd(
    ids,
    order,
    values,
    count,
    width,
    live,
    frozen,
    selected,
    table,
    stride,
    velocity,
    velocity_stride,
    lr,
    momentum,
    decay,
    IN_BANK: tl.constexpr,
    IS_SELECTION: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    if _is_due(ids, place, live, frozen, selected, IN_BANK, IS_SELECTION):
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        gradient = segment_sum(ids, order, values, count, width, place, columns, inside, BLOCK)
        row = tl.load(ids + place).to(tl.int64)
        at = table + row * stride + columns
        old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gradient += decay * old
        if HAS_MOMENTUM:
            velocity_at = velocity + row * velocity_stride + columns
            speed = momentum * tl.load(velocity_at, mask=inside, other=0.0) + gradient
            tl.debug_barrier()
            tl.store(velocity_at, speed, mask=inside)
            if NESTEROV:
                gradient += momentum * speed
            else:
                gradient = speed
        tl.store(at, (old - lr * gradient).to(table.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["count"])
def _adagrad(
    ids,
    order,
    values,
    count,
    width,
    live,
    frozen,
    selected,
    table,
    stride,
    total,
    lr,
    decay,
    eps,
    IN_BANK: tl.constexpr,
    IS_SELECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    if _is_due(ids, place, live, frozen, selected, IN_BANK, IS_SELECTION):
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        gradient = segment_sum(ids, order, values, count, width, place, columns, inside, BLOCK)
        row = tl.load(ids + place).to(tl.int64)
        at = table + row * stride + columns
        old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gradient += decay * old
        squares = tl.load(total + row) + tl.sum(gradient * gradient, 0) / width
        tl.debug_barrier()
        tl.store(total + row, squares)
        new = old - lr * gradient / (tl.sqrt(squares) + eps)
        tl.store(at, new.to(table.dtype.element_ty), mask=inside)


@kernel
def _correction(log_beta, steps):
    """1 - beta^steps; in float64, as beta^steps may be near 1."""
    return (1.0 - tl.exp(steps.to(tl.float64) * log_beta)).to(tl.float32)


@kernel(do_not_specialize=["count"])
def _adam(
    ids,
    order,
    values,
    count,
    width,
    live,
    frozen,
    selected,
    table,
    stride,
    mean,
    mean_stride,
    square,
    square_stride,
    steps,
    lr,
    decay,
    shrink,
    log_beta1,
    rate1,
    log_beta2,
    beta2,
    rate2,
    eps,
    IN_BANK: tl.constexpr,
    IS_SELECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    if _is_due(ids, place, live, frozen, selected, IN_BANK, IS_SELECTION):
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        gradient = segment_sum(ids, order, values, count, width, place, columns, inside, BLOCK)
        row = tl.load(ids + place).to(tl.int64)
        at = table + row * stride + columns
        old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gradient += decay * old
        old = old * shrink
        number = tl.load(steps + row) + 1.0
        mean_at, square_at = (
            mean + row * mean_stride + columns,
            square + row * square_stride + columns,
        )
        first = tl.load(mean_at, mask=inside, other=0.0)
        first += rate1 * (gradient - first)
        second = beta2 * tl.load(square_at, mask=inside, other=0.0) + rate2 * gradient * gradient
        tl.debug_barrier()
        tl.store(steps + row, number)
        tl.store(mean_at, first, mask=inside)
        tl.store(square_at, second, mask=inside)
        root = tl.sqrt(second / _correction(log_beta2, number)) + eps
        new = old - lr * (first / _correction(log_beta1, number)) / root
        tl.store(at, new.to(table.dtype.element_ty), mask=inside)


def step_sgd(
    table: Tensor, gradient: Gradient, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """`RowSGD`'s step of the rows of a table, in place."""
    momentum = float(options["momentum"])
    velocity = state["momentum_buffer"] if momentum else table
    _launch(
        _sgd,
        table,
        gradient,
        (velocity, velocity.stride(0)),
        (float(options["lr"]), momentum, float(options["weight_decay"])),
        HAS_MOMENTUM=momentum > 0,
        NESTEROV=bool(options["nesterov"]),
    )


def step_adagrad(
    table: Tensor, gradient: Gradient, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """`RowAdagrad`'s step of the rows of a table, in place."""
    numbers = float(options["lr"]), float(options["weight_decay"]), float(options["eps"])
    _launch(_adagrad, table, gradient, (state["sum"],), numbers)


def step_adam(
    table: Tensor,
    gradient: Gradient,
    state: Mapping[str, Tensor],
    options: Mapping[str, Any],
    decoupled: bool,
) -> None:
    """`RowAdam`'s step of the rows of a table, in place; `decoupled`: `RowAdamW`'s."""
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    lr, decay = float(options["lr"]), float(options["weight_decay"])
    beta1, beta2 = options["betas"]
    _launch(
        _adam,
        table,
        gradient,
        (mean, mean.stride(0), square, square.stride(0), state["step"]),
        (
            lr,
            0.0 if decoupled else decay,
            1.0 - lr * decay if decoupled else 1.0,
            _log(beta1),
            1.0 - beta1,
            _log(beta2),
            float(beta2),
            1.0 - beta2,
            float(options["eps"]),
        ),
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _launch(
    program: Any,
    table: Tensor,
    gradient: Gradient,
    state: tuple[Tensor | int, ...],
    numbers: tuple[float, ...],
    **constants: bool,
) -> None:
    """One program an entry. What is not there is stood in for by `table`, and not looked at."""
    if not gradient.values.numel():
        return
    count, width = len(gradient.ids), gradient.values[0].numel()
    block = triton.next_power_of_2(width)
    marks = [
        table if mark is None else mark.view(torch.uint8)
        for mark in (gradient.live, gradient.frozen, gradient.selected)
    ]
    with torch.cuda.device_of(table):
        launch(
            program,
            (count,),
            gradient.ids,
            gradient.order,
            gradient.values,
            count,
            width,
            *marks,
            table,
            table.stride(0),
            *state,
            *numbers,
            IN_BANK=gradient.live is not None,
            IS_SELECTION=gradient.selected is not None,
            **constants,
            BLOCK=block,
            num_warps=min(8, max(1, block // 256)),
        )
    torch.autograd.graph.increment_version(table)

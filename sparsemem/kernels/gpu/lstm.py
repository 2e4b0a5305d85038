"""The LSTM's nonlinearities, forward and backward; its products with weights are torch's.

The equations are those of ../controller.py. Gates are in torch's order: i, f, g, o.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.kernels.gpu.equations import kernel


@kernel
def tanh(x):
    """By the logistic sigmoid."""
    return tl.sigmoid(x * 2) * 2 - 1


@kernel(
    do_not_specialize=["stride"],
    do_not_specialize_on_alignment=["gates", "cell", "next_cell", "hidden"],
)
def lstm_kernel(gates, cell, next_cell, hidden, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Gates [B, 4 D] before and after their nonlinearity, in place, and cell [B, D]; made: the next
    cell and, in rows of `stride`, the hidden state. Grid (B, parts of D).
    """
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gates += b * 4 * SIZE + at
    taken = tl.sigmoid(tl.load(gates, mask=inside, other=0))
    kept = tl.sigmoid(tl.load(gates + SIZE, mask=inside, other=0))
    new = tanh(tl.load(gates + 2 * SIZE, mask=inside, other=0))
    shown = tl.sigmoid(tl.load(gates + 3 * SIZE, mask=inside, other=0))
    remembered = kept * tl.load(cell + b * SIZE + at, mask=inside, other=0) + taken * new
    tl.store(gates, taken, mask=inside)
    tl.store(gates + SIZE, kept, mask=inside)
    tl.store(gates + 2 * SIZE, new, mask=inside)
    tl.store(gates + 3 * SIZE, shown, mask=inside)
    tl.store(next_cell + b * SIZE + at, remembered, mask=inside)
    tl.store(hidden + b * stride + at, tanh(remembered) * shown, mask=inside)


@kernel(
    do_not_specialize=["stride"],
    do_not_specialize_on_alignment=["gates", "cell", "next_cell", "to_hidden", "to_gates"],
)
def lstm_backward_kernel(
    gates, cell, next_cell, to_hidden, to_cell, to_gates, stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the hidden state [B, D], in rows of `stride`, to the gates [B, 4 D] before their
    nonlinearity. `to_cell` [B, D] is the next cell's gradient, and then the cell's.
    """
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gates += b * 4 * SIZE + at
    to_gates += b * 4 * SIZE + at
    to_cell += b * SIZE + at
    taken = tl.load(gates, mask=inside, other=0)
    kept = tl.load(gates + SIZE, mask=inside, other=0)
    new = tl.load(gates + 2 * SIZE, mask=inside, other=0)
    shown = tl.load(gates + 3 * SIZE, mask=inside, other=0)
    before = tl.load(cell + b * SIZE + at, mask=inside, other=0)
    squashed = tanh(tl.load(next_cell + b * SIZE + at, mask=inside, other=0))
    gradient = tl.load(to_hidden + b * stride + at, mask=inside, other=0)
    of_cell = tl.load(to_cell, mask=inside, other=0)
    of_cell += gradient * shown * (1 - squashed * squashed)
    tl.store(to_gates, of_cell * new * taken * (1 - taken), mask=inside)
    tl.store(to_gates + SIZE, of_cell * before * kept * (1 - kept), mask=inside)
    tl.store(to_gates + 2 * SIZE, of_cell * taken * (1 - new * new), mask=inside)
    tl.store(to_gates + 3 * SIZE, gradient * squashed * shown * (1 - shown), mask=inside)
    tl.store(to_cell, of_cell * kept, mask=inside)

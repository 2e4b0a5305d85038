"""The LSTM cell and products with weights, for several elements of a batch, compiled.

A weight is read once for all elements: matrices are walked through by rows, and each row is added
to the outputs of all of them. Shape letters as in steps.py; D is the controller's hidden size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, import-untyped"
from __future__ import annotations

from functools import partial
from math import factorial

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from sparsemem.kernels.compiled import add_scaled, part, strict_part

# ln 2 in two parts, the first of so few bits that its product with an exponent is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.121944400546905827679e-4
LOG2_E = 1.4426950408889634
TERMS = 12  # of the series, for |x| up to ln(2) / 2: the rest is below 2^-53
SINGLE, DOUBLE = (32, 23, 127, 87.0), (64, 52, 1023, 708.0)  # bits, mantissa, bias, largest |x|


@intrinsic
def exponential(_context, x):
    """e^x to the last bits of x's dtype, made of nothing that keeps a loop off vectors.

    e^x = 2^k e^r. Adding 1.5 * 2^mantissa leaves k, rounded, in the lowest bits of a number;
    shifted to the exponent's place they are 2^k. For strict kernels only. Beyond what the dtype
    can hold x is taken for the nearest that it can; not-a-number stays one.
    """

    def generate(_context, builder, signature, arguments):
        (x,), kind = arguments, arguments[0].type
        bits, mantissa, bias, limit = SINGLE if isinstance(kind, ir.FloatType) else DOUBLE
        number = partial(ir.Constant, kind)
        for order, bound in (("<", number(-limit)), (">", number(limit))):
            x = builder.select(builder.fcmp_ordered(order, x, bound), bound, x)
        shift = number(1.5 * 2**mantissa + bias)
        shifted = builder.fadd(builder.fmul(x, number(LOG2_E)), shift)
        k, rest = builder.fsub(shifted, shift), x
        for some in (LN2_HIGH, LN2_LOW):
            rest = builder.fsub(rest, builder.fmul(k, number(some)))
        total = number(1 / factorial(TERMS))
        for power in reversed(range(TERMS)):
            total = builder.fadd(builder.fmul(total, rest), number(1 / factorial(power)))
        exponent = builder.shl(
            builder.bitcast(shifted, ir.IntType(bits)), ir.Constant(ir.IntType(bits), mantissa)
        )
        return builder.fmul(total, builder.bitcast(exponent, kind))

    return x(x), generate


@strict_part
def sigmoids(values):
    """1 / (1 + e^-x), in place."""
    one = values.dtype.type(1)
    for i in range(len(values)):
        values[i] = one / (one + exponential(-values[i]))


@strict_part
def tanhs(values):
    """tanh(x) = 1 - 2 / (e^2x + 1), in place."""
    one, two = values.dtype.type(1), values.dtype.type(2)
    for i in range(len(values)):
        values[i] = one - two / (exponential(two * values[i]) + one)


@part
def lstm(gates, cell, next_cell, hidden):
    """A step of an LSTM: gates [4 D] before and after their nonlinearity, in place; in torch's
    order i, f, g, o. `hidden` is D long, or longer.
    """
    size = len(cell)
    sigmoids(gates[: 2 * size])
    tanhs(gates[2 * size : 3 * size])
    sigmoids(gates[3 * size :])
    taken, kept, new = gates[:size], gates[size : 2 * size], gates[2 * size : 3 * size]
    for i in range(size):
        next_cell[i] = kept[i] * cell[i] + taken[i] * new[i]
        hidden[i] = next_cell[i]
    tanhs(hidden[:size])
    for i in range(size):
        hidden[i] *= gates[3 * size + i]


@part
def lstm_backward(gates, cell, next_cell, to_hidden, to_cell, to_gates):
    """From the hidden state's gradient to that of the gates before their nonlinearity. `to_cell`
    is the next cell's gradient, and then the cell's.
    """
    size = len(cell)
    one, squashed, shown = gates.dtype.type(1), next_cell.copy(), gates[3 * size :]
    taken, kept, new = gates[:size], gates[size : 2 * size], gates[2 * size : 3 * size]
    tanhs(squashed)
    for i in range(size):
        to_cell[i] += to_hidden[i] * shown[i] * (one - squashed[i] * squashed[i])
    for i in range(size):
        to_gates[i] = to_cell[i] * new[i] * taken[i] * (one - taken[i])
    for i in range(size):
        to_gates[size + i] = to_cell[i] * cell[i] * kept[i] * (one - kept[i])
    for i in range(size):
        to_gates[2 * size + i] = to_cell[i] * taken[i] * (one - new[i] * new[i])
    for i in range(size):
        to_gates[3 * size + i] = to_hidden[i] * squashed[i] * shown[i] * (one - shown[i])
    for i in range(size):
        to_cell[i] *= kept[i]


@part
def add_four(to, other_to, at, other, i, row, second, third, fourth):
    """Add four rows, times entries i .. i + 3 of `at` and of `other`, to one and another."""
    a, b, c, d = at[i], at[i + 1], at[i + 2], at[i + 3]
    e, f, g, h = other[i], other[i + 1], other[i + 2], other[i + 3]
    for j in range(len(row)):
        to[j] += a * row[j] + b * second[j] + c * third[j] + d * fourth[j]
        other_to[j] += e * row[j] + f * second[j] + g * third[j] + h * fourth[j]


@part
def add_product(inputs, weights, outputs, begin, end):
    """outputs [B, .. J] += inputs [B, .. I] weights [I, J], for elements begin .. end - 1.

    Two elements at a time, the last of an odd number beside itself: so none depends on others.
    """
    rows, spare = len(weights), np.zeros_like(outputs[begin])
    for i in range(0, rows - 3, 4):
        for b in range(begin, end, 2):
            other = min(b + 1, end - 1)
            add_four(
                outputs[b], outputs[other] if other > b else spare, inputs[b], inputs[other], i,
                weights[i], weights[i + 1], weights[i + 2], weights[i + 3],
            )  # fmt: skip
    for i in range(rows - rows % 4, rows):
        for b in range(begin, end):
            add_scaled(outputs[b, : weights.shape[1]], inputs[b, i], weights[i])

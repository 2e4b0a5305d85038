"""Products and comparisons of many codes at once, on vectors; compiled.

Written for LLVM directly: a loop over LANES codes, however it is put, reads and writes its sums
again and again, and takes twice as long. Addresses are whole numbers; behind each there have to be
LANES numbers, and widths are 1 at least.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 64
BYTE, SHORT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(64)
BYTES, SHORTS = ir.VectorType(BYTE, LANES), ir.VectorType(SHORT, LANES)


def load(builder: Any, address: Any, kind: Any) -> Any:
    """What is at an address, of any kind, wherever it begins."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def repeated(builder: Any, number: Any) -> Any:
    """A vector of the same short."""
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    nothing = ir.Constant(SHORTS, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, nothing, places)


@intrinsic
def multiply(_context, codes, width, query, products):
    """Products [LANES] of a query [width] with codes [width, LANES]: bytes, the others shorts."""
    signature = types.void(codes, width, query, products)

    def generate(context, builder, _signature, arguments):
        codes, width, query, products = arguments
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at, total = builder.phi(LONG), builder.phi(SHORTS)
        ours = load(builder, builder.add(codes, builder.mul(at, LONG(LANES))), BYTES)
        factor = load(builder, builder.add(query, builder.mul(at, LONG(2))), SHORT)
        product = builder.mul(builder.sext(ours, SHORTS), repeated(builder, factor))
        following, added = builder.add(at, LONG(1)), builder.add(total, product)
        for value, first, later in ((at, LONG(0), following), (total, SHORTS(None), added)):
            value.add_incoming(first, before)
            value.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, width), loop, after)
        builder.position_at_end(after)
        place = builder.inttoptr(products, SHORTS.as_pointer())
        builder.store(added, place).align = 2
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def at_least(_context, scores, least):
    """Which of LANES shorts are `least` or more: a bit for each, the lowest for the first."""
    signature = types.int64(scores, least)

    def generate(_context, builder, _signature, arguments):
        scores, least = arguments
        limit = repeated(builder, builder.trunc(least, SHORT))
        large = builder.icmp_signed(">=", load(builder, scores, SHORTS), limit)
        return builder.bitcast(large, LONG)

    return signature, generate


@intrinsic
def lowest(_context, bits):
    """The place of the lowest bit that is set, of some."""
    signature = types.int64(bits)

    def generate(_context, builder, _signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return signature, generate

"""Bytes on the wire: counted, and what a training step takes by a formula.

Letters: S shards, Q queries, K rows read a query, W and V widths of keys and values.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from sparsemem.distributed.wire import Packed

ID_BYTES = 8
# What describes a call or an answer beside its arrays, measured; of "step" and "fetched" a table.
# It depends on the lengths of numbers and of an optimiser's options, a little.
FRAMES = {"find": 100, "fetch": 105, "counted": 60, "step": 300, "found": 115, "fetched": 60}
FRAMES |= {"push": 200, "asked": 120, "norms": 120}  # where gradients are pushed
COUNTED = 16  # queries of a read, at most, of which shards are told what counted


class Traffic:
    """Bytes that a client has sent to shards and received from them.

    Arrays and what describes them; what a transport adds of its own is left out (Ray: about 1 KB a
    call).
    """

    def __init__(self) -> None:
        self.sent = self.received = 0

    def count_sent(self, packed: Packed) -> Packed:
        """A call goes out."""
        self.sent += size(packed)
        return packed

    def count_received(self, packed: Packed) -> Packed:
        """An answer came in."""
        self.received += size(packed)
        return packed


def size(packed: Packed) -> int:
    """Bytes of a packed value."""
    frame = json.dumps([packed.tree, packed.dtypes], separators=(",", ":"))
    return len(frame) + sum(int(array.nbytes) for array in packed.arrays)


class StepBytes(NamedTuple):
    """What a training step sends and receives."""

    sent: int
    received: int


def wire_bytes(
    num_shards: int,
    queries: int,
    top_k: int,
    width: int,
    value_width: int | None = None,
    *,
    distinct: int | None = None,
    row_bytes: int = 4,
    gradient_bytes: int = 4,
    number_bytes: int = 4,
    exact: bool = False,
    pushed: bool = False,
    by_sub_keys: bool = False,
) -> StepBytes:
    """Bytes of one training step: a read, and the row optimiser's step of what was read.

    Every shard gets all Q queries and answers with scores and ids of its own K best rows of each;
    then the rows that are the best of all are fetched from their owners, and stepped there. With
    product keys the shards hold the values, W is the width of those, and nobody asks for scores.

    Args:
        num_shards: S.
        queries: Q, over all positions and heads.
        top_k: K.
        width: W.
        value_width: V; None: the keys are the values.
        distinct: distinct rows that are read; None: Q K, the most there can be.
        row_bytes: of a number in a row as it is sent: of the tables' dtype, or 2.
        gradient_bytes: of a number of a gradient as it is sent: 4, or 2 on a narrow wire.
        number_bytes: of a number in a query, and of a score: of the computing dtype.
        pushed: the gradients go ahead of the step, for their norm over several workers.
        exact: the shards search exactly; else they are told what of some queries counted.
        by_sub_keys: workers find rows by product keys; the shards hear that there was a read.
    """
    numbers = width + (value_width or 0)
    tables = 1 if value_width is None else 2
    read = queries * top_k
    rows = read if distinct is None else distinct
    asked = 0 if by_sub_keys else queries
    find = num_shards * (FRAMES["find"] + asked * width * number_bytes)
    fetch = num_shards * FRAMES["fetch"] + read * ID_BYTES
    if not (exact or by_sub_keys):
        counted = -(-queries // -(-queries // COUNTED)) * (width + 1)
        fetch += num_shards * (FRAMES["counted"] + counted * number_bytes)
    step = num_shards * FRAMES["step"] * tables
    if pushed:
        step += num_shards * (FRAMES["push"] * tables + FRAMES["asked"])
    step += rows * (numbers * gradient_bytes + tables * ID_BYTES)
    found = num_shards * (FRAMES["found"] + asked * top_k * (ID_BYTES + number_bytes))
    fetched = num_shards * FRAMES["fetched"] * tables + read * numbers * row_bytes
    norms = num_shards * FRAMES["norms"] * pushed
    return StepBytes(find + fetch + step, found + fetched + norms)

"""A row-sparse gradient as the kernels of the row optimisers' steps take it, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Gradient(NamedTuple):
    """Entries of a row-sparse gradient, sorted by row, and which rows may be stepped."""

    ids: Int[Tensor, " n"]  # ascending; a row may have several
    order: Int[Tensor, " n"]  # where each entry's values are
    values: Float[Tensor, "n ..."]
    live: Bool[Tensor, " N"] | None  # None: all rows may be
    frozen: Bool[Tensor, " N"] | None
    selected: Bool[Tensor, " N"] | None  # None: nobody selected any


def sorted_gradient(
    ids: Tensor,
    values: Tensor,
    live: Tensor | None,
    frozen: Tensor | None,
    selected: Tensor | None,
) -> Gradient:
    """Entries of rows as the kernels take them.

    On the host in the order in which torch's `coalesce` adds them up (its sort is not stable), so
    that a bank's rows are, to the last bit, those of its shards, which get sums.
    """
    ids, order = torch.sort(ids, stable=ids.device.type != "cpu")
    return Gradient(ids, order, values.contiguous(), live, frozen, selected)

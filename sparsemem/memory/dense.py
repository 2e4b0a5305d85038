"""A memory whose every row is read and written at every step (NTM, DNC).

Shape letters: B batch, N slots, W slot width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.indexes.metrics import inverse_norm
from sparsemem.memory import addressing
from sparsemem.memory.products import WeightedSum, Write, erase_factors

# Heads that erase at once take 2^G products of their weights a row.
ERASE_TOGETHER = 4


class DenseMemory(NamedTuple):
    """All rows of a memory. A write returns a new memory and leaves this one as it was.

    `inverse_norms` are those of the rows as a write left them, for both of its searches.
    """

    rows: Float[Tensor, "B N W"]
    inverse_norms: Float[Tensor, "B N"] | None = None

    def similarity(
        self, keys: Float[Tensor, "B H W"], masks: Float[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, "B H N"]:
        """Cosine of every key with every row, under the head's mask if there is one."""
        if masks is not None:
            return addressing.masked_cosine_similarity(keys, masks, self.rows)
        norms = inverse_norm(self.rows) if self.inverse_norms is None else self.inverse_norms
        return addressing.cosine_similarity(keys, self.rows, norms)

    def read(self, weights: Float[Tensor, "B H N"]) -> Float[Tensor, "B H W"]:
        """r_h = sum_i w_h(i) M(i) (NTM Eq. 2, DNC)."""
        return WeightedSum.apply(weights, self.rows)  # type: ignore[no-untyped-call, no-any-return]

    def write(
        self,
        weights: Float[Tensor, "B H N"],
        erases: Float[Tensor, "B H W"],
        words: Float[Tensor, "B H W"],
        kept: Float[Tensor, "B N"] | None = None,
    ) -> DenseMemory:
        """M prod_h (1 - w_h e_h^T) + sum_h w_h a_h^T (NTM Eqs. 3 and 4; DNC with one head).

        `kept` scales the old rows before: the DNC's retention where de-allocation erases.
        """
        every = torch.ones_like(weights[:, :1])
        scale = every if kept is None else kept.unsqueeze(1)
        together = torch.split(weights, ERASE_TOGETHER, 1)
        factors = [erase_factors(part) for part in torch.split(erases, ERASE_TOGETHER, 1)]
        rows, nothing = self.rows, (weights[:, :0], words[:, :0])
        for erasing, factor in zip(together[:-1], factors[:-1], strict=True):
            rows, _ = Write.apply(rows, scale, erasing, factor, *nothing)  # type: ignore[no-untyped-call]
            scale = every
        written = Write.apply(rows, scale, together[-1], factors[-1], weights, words)  # type: ignore[no-untyped-call]
        return DenseMemory(*written)

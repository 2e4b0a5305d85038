"""A memory whose every row is read and written at every step (NTM, DNC).

Shape letters: B batch, N slots, W slot width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.memory import addressing


class DenseMemory(NamedTuple):
    """All rows of a memory. A write returns a new memory and leaves this one as it was."""

    rows: Float[Tensor, "B N W"]

    def similarity(
        self, keys: Float[Tensor, "B H W"], masks: Float[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, "B H N"]:
        """Cosine of every key with every row, under the head's mask if there is one."""
        if masks is None:
            return addressing.cosine_similarity(keys, self.rows)
        return addressing.masked_cosine_similarity(keys, masks, self.rows)

    def read(self, weights: Float[Tensor, "B H N"]) -> Float[Tensor, "B H W"]:
        """r_h = sum_i w_h(i) M(i) (NTM Eq. 2, DNC)."""
        return weights @ self.rows

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
        rows = self.rows if kept is None else self.rows * kept.unsqueeze(-1)
        for weight, erase in zip(weights.unbind(1), erases.unbind(1), strict=True):
            erased = weight.unsqueeze(-1) * erase.unsqueeze(-2)
            rows = torch.addcmul(rows, rows, erased, value=-1)
        return DenseMemory(torch.baddbmm(rows, weights.mT, words))

"""Slots that a search may return: ranked by score on the grid, then by slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.ranking import GRID_BITS, on_grid

LOWEST = torch.iinfo(torch.int64).min  # as a key: no candidate
LARGEST_SCORE = 8  # that keys can hold; sums of weights exceed 1 a little
KEY_BITS = 59  # of an int64 beside the sign and LARGEST_SCORE


def max_slots(dtype: torch.dtype) -> int:
    """How many slots can be ranked: a key holds a score on its grid and a slot."""
    return int(2 ** (KEY_BITS - GRID_BITS[dtype]))


class Candidates(NamedTuple):
    """Slots and their scores, in no order; slot -1: none."""

    slots: Int[Tensor, "*Q C"]
    scores: Float[Tensor, "*Q C"]

    def best(self, k: int) -> Candidates:
        """The k best, best first (all of them where there are fewer)."""
        chosen = best_positions(self.scores, self.slots, min(k, self.slots.shape[-1]))
        return Candidates(self.slots.gather(-1, chosen), self.scores.gather(-1, chosen))


def best_positions(
    scores: Float[Tensor, "*Q C"], slots: Int[Tensor, "*Q C"], k: int
) -> Int[Tensor, "*Q K"]:
    """Positions of the k best scores, best first, ties by lower slot; slot -1 comes last."""
    limited = scores.nan_to_num(0).clamp(-LARGEST_SCORE, LARGEST_SCORE)
    key = on_grid(limited).long().mul_(max_slots(scores.dtype)).sub_(slots)
    return key.masked_fill_(slots < 0, LOWEST).topk(k).indices


def joined_candidates(*parts: Candidates) -> Candidates:
    """All candidates of the same queries."""
    return Candidates(*(torch.cat(tensors, -1) for tensors in zip(*parts, strict=True)))

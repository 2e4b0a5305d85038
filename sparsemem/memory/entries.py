"""Sparse vectors over slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Entries(NamedTuple):
    """Sparse vectors, E entries each: ids and weights. An id may repeat; its weights add up."""

    ids: Int[Tensor, "*B E"]
    weights: Float[Tensor, "*B E"]

    def detach(self) -> Entries:
        """The same entries without gradient."""
        return Entries(self.ids, self.weights.detach())


def same_ids(ids: Int[Tensor, "*B E"]) -> Tensor:
    """Which entries have the same id: bool [*B, E, E]."""
    return ids.unsqueeze(-1) == ids.unsqueeze(-2)


def totals(entries: Entries) -> Float[Tensor, "*B E"]:
    """Total weight of every entry's id (the same at each repetition)."""
    return (same_ids(entries.ids) * entries.weights.unsqueeze(-2)).sum(-1)


def joined(*parts: Entries) -> Entries:
    """Sum of sparse vectors."""
    return Entries(*(torch.cat(tensors, -1) for tensors in zip(*parts, strict=True)))

"""Which shard owns a row: a pure function of its id and the number of shards.

Neighbouring ids belong to different shards, so that rows written one after another, as `append`
writes them, fill all shards alike. Shape letters: S shards, n ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.checks import check_at_most, check_size

MISSING = -1  # as an id: no row


class Part(NamedTuple):
    """What one shard has to do with a list of ids."""

    places: Int[Tensor, " m"]  # in the list, ascending
    local: Int[Tensor, " m"]  # the shard's own numbers of these rows


class Placement(NamedTuple):
    """`num_rows` rows over `num_shards` shards: row id is row id // S of shard id % S."""

    num_rows: int
    num_shards: int

    @classmethod
    def of(cls, num_rows: int, num_shards: int) -> Placement:
        """Checked: there is a row for each shard."""
        check_size("num_rows", num_rows)
        check_at_most("num_shards", check_size("num_shards", num_shards), "num_rows", num_rows)
        return cls(num_rows, num_shards)

    def rows_of(self, shard: int) -> int:
        """Number of rows of a shard; they differ by one at most."""
        return (self.num_rows - shard + self.num_shards - 1) // self.num_shards

    def owner(self, ids: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The shard of each row; -1 stays -1."""
        return torch.where(ids < 0, MISSING, ids.remainder(self.num_shards))

    def local(self, ids: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Each row's number in its shard; -1 stays -1."""
        return torch.where(ids < 0, MISSING, ids.div(self.num_shards, rounding_mode="floor"))

    def ids(self, shard: int, local: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The ids of a shard's rows, by its own numbers; -1 stays -1."""
        return torch.where(local < 0, MISSING, local * self.num_shards + shard)

    def split(self, ids: Int[Tensor, " n"]) -> list[Part]:
        """For each shard where its rows are in a list, in the list's order; none for ids of -1."""
        owner, local = self.owner(ids), self.local(ids)
        parts = []
        for shard in range(self.num_shards):
            places = (owner == shard).nonzero().squeeze(1)
            parts.append(Part(places, local[places]))
        return parts

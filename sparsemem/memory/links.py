"""Sparse temporal links between rows written one after the other (Rae et al. 2016, supplement D).

Every head links its own writes: each has a follows matrix N, a precedes matrix P, both with at
most L non-zeros a row, and a precedence vector p with at most L. No gradient flows through them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.ranking import top_k
from sparsemem.memory.candidates import best_positions
from sparsemem.memory.entries import Entries, joined, totals


class LinkedRows(NamedTuple):
    """Rows that follow (or precede) the last reads, and how they depend on the read weights."""

    ids: Int[Tensor, "B H K"]
    weights_of: Float[Tensor, "B H K S"]


class TemporalLinks:
    """N, P and p of B episodes of H heads over the first `capacity` positions; in place.

    Ids are positions of an episode's table. Equal weights are ordered by slot: where a position
    is not its slot, `slots` [B, M] tells the slot of each (-1: of none).
    """

    def __init__(self, follows: Entries, precedes: Entries, precedence: Entries) -> None:
        self.follows = follows  # N: [B, H, capacity, L]
        self.precedes = precedes  # P: [B, H, capacity, L]
        self.precedence = precedence  # p: [B, H, L]

    @staticmethod
    def start(batch_size: int, num_heads: int, num_links: int, like: Tensor) -> TemporalLinks:
        """No links yet; device and dtype as `like`."""

        def empty(*shape: int) -> Entries:
            ids = torch.zeros(shape, dtype=torch.int64, device=like.device)
            return Entries(ids, like.new_zeros(shape))

        table = (batch_size, num_heads, 0, num_links)
        return TemporalLinks(empty(*table), empty(*table), empty(batch_size, num_heads, num_links))

    def reserve(self, capacity: int) -> None:
        """Make room for positions 0 .. capacity - 1."""
        if capacity > self.follows.ids.shape[2]:
            self.follows = grown(self.follows, capacity)
            self.precedes = grown(self.precedes, capacity)

    def update(self, write: Entries, extent: int, slots: Int[Tensor, "B M"] | None = None) -> None:
        """Link what a step wrote ([B, H, U]) behind what was written before it.

        N(i,j) = (1 - w(i)) N(i,j) + w(i) p(j);  P(i,j) = (1 - w(j)) P(i,j) + w(j) p(i);
        p = (1 - sum w) p + w, with p of the step before in N and P.
        """
        at = totals(write).unsqueeze(-1)
        rows = take(self.follows, write.ids)
        put(self.follows, write.ids, mixed(rows, 1 - at, self.precedence, at, slots))

        written = scattered(write, extent).flatten(0, 1)
        ids = self.precedes.ids[:, :, :extent]
        decay = 1 - written.gather(1, ids.flatten(0, 1).flatten(1)).view_as(ids)
        self.precedes.weights[:, :, :extent] *= decay
        at = totals(self.precedence).unsqueeze(-1)
        rows = take(self.precedes, self.precedence.ids)
        put(self.precedes, self.precedence.ids, mixed(rows, torch.ones_like(at), write, at, slots))

        left = 1 - write.weights.sum(-1, keepdim=True)
        before = Entries(self.precedence.ids, left * self.precedence.weights)
        self.precedence = largest(joined(before, write), before.ids.shape[-1], slots)

    def follow(
        self,
        table: Entries,
        read: Entries,
        k: int,
        extent: int,
        slots: Int[Tensor, "B M"] | None = None,
    ) -> LinkedRows:
        """The k largest entries of `table` times the read weights; as weights_of @ read.weights.

        table = self.follows gives f = N wR, table = self.precedes b = P wR.
        """
        read_weights = scattered(read, extent).flatten(0, 1)
        ids, values = table.ids[:, :, :extent], table.weights[:, :, :extent]
        at_ids = read_weights.gather(1, ids.flatten(0, 1).flatten(1)).view_as(values)
        weights = (values * at_ids).sum(-1)
        if slots is None:
            chosen = top_k(nonzero_first(weights), k)
        else:
            of = slots[:, :extent].unsqueeze(1).expand_as(weights)
            chosen = best_positions(nonzero_first(weights), of, k)
        rows = take(table, chosen)
        same = rows.ids.unsqueeze(-1) == read.ids[:, :, None, None]
        weights_of = (same * rows.weights.unsqueeze(-1)).sum(-2)
        return LinkedRows(chosen, weights_of * (weights.gather(2, chosen) > 0).unsqueeze(-1))

    def to(self, device: torch.device, dtype: torch.dtype) -> TemporalLinks:
        """An independent copy."""
        parts = (self.follows, self.precedes, self.precedence)
        return TemporalLinks(
            *(
                Entries(part.ids.to(device, copy=True), part.weights.to(device, dtype, copy=True))
                for part in parts
            )
        )


def grown(table: Entries, capacity: int) -> Entries:
    """The same table with room for more rows."""
    shape = (*table.ids.shape[:2], max(capacity, 2 * table.ids.shape[2]), table.ids.shape[3])
    larger = Entries(table.ids.new_zeros(shape), table.weights.new_zeros(shape))
    for new, old in zip(larger, table, strict=True):
        new[:, :, : old.shape[2]] = old
    return larger


def take(table: Entries, at: Int[Tensor, "B H R"]) -> Entries:
    """Rows `at` of a table [B, H, capacity, L]: [B, H, R, L]."""
    index = at.unsqueeze(-1).expand(*at.shape, table.ids.shape[-1])
    return Entries(table.ids.gather(2, index), table.weights.gather(2, index))


def put(table: Entries, at: Int[Tensor, "B H R"], rows: Entries) -> None:
    """Replace rows `at` of a table; repeated rows must be equal."""
    index = at.unsqueeze(-1).expand_as(rows.ids)
    table.ids.scatter_(2, index, rows.ids)
    table.weights.scatter_(2, index, rows.weights)


def scattered(entries: Entries, extent: int) -> Float[Tensor, "B H M"]:
    """Dense [B, H, extent] vectors."""
    dense = entries.weights.new_zeros(*entries.ids.shape[:2], extent)
    return dense.scatter_add_(2, entries.ids, entries.weights)


def mixed(
    rows: Entries, scale: Tensor, vector: Entries, factor: Tensor, slots: Tensor | None
) -> Entries:
    """scale * rows [B, H, R, L] + factor * vector [B, H, E], cut to the L largest of each row."""
    ids = vector.ids.unsqueeze(2).expand(-1, -1, rows.ids.shape[2], -1)
    added = Entries(ids, factor * vector.weights.unsqueeze(2))
    both = joined(Entries(rows.ids, scale * rows.weights), added)
    return largest(both, rows.ids.shape[-1], slots)


def largest(entries: Entries, count: int, slots: Tensor | None = None) -> Entries:
    """The `count` largest entries after adding up repeated ids; ties by lower id, or slot."""
    ids, order = entries.ids.sort(dim=-1, stable=True)
    if slots is not None:
        order = slots.gather(1, entries.ids.flatten(1)).view_as(ids).argsort(dim=-1, stable=True)
        ids = entries.ids.gather(-1, order)
    weights = totals(Entries(ids, entries.weights.gather(-1, order)))
    weights[..., 1:].masked_fill_(ids[..., 1:] == ids[..., :-1], 0)
    chosen = top_k(nonzero_first(weights), count)
    return Entries(ids.gather(-1, chosen), weights.gather(-1, chosen))


def nonzero_first(weights: Float[Tensor, "*B M"]) -> Float[Tensor, "*B M"]:
    """Ranking scores under which no zero comes before a weight, however small."""
    return weights.masked_fill(weights == 0, -1)

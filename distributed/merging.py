"""What several shards found, as one: pure functions.

Shape letters: Q queries, K rows a query, S shards, n rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.distributed.placement import Part, Placement
from sparsemem.indexes.base import Found, best_of
from sparsemem.indexes.metrics import Metric


class Offer(NamedTuple):
    """Rows that a shard would give to new ones, in its order: see `sparsemem.bank.usage.Room`."""

    local: Int[Tensor, " n"]
    rank: Int[Tensor, " n"]  # 0: never used, 1: removed, 2: live
    last_access: Int[Tensor, " n"]  # counts between live rows only


class Fetched(NamedTuple):
    """The rows found, with what they hold."""

    scores: Float[Tensor, "Q K"]
    ids: Int[Tensor, "Q K"]
    rows: Float[Tensor, "Q K W"]
    values: Float[Tensor, "Q K V"] | None  # None: the rows are the values


def merged(placement: Placement, found: Sequence[Found], k: int, metric: Metric) -> Found:
    """The k best of what each shard found by its own numbers: by score, ties by id.

    The k best of all rows are among the k best of each shard, so nothing is lost.
    """
    ids = torch.cat([placement.ids(shard, part.ids) for shard, part in enumerate(found)], 1)
    return best_of(torch.cat([part.scores for part in found], 1), ids, k, metric)


def assembled(parts: Sequence[Part], rows: Sequence[Tensor], count: int) -> Tensor:
    """Rows [m, ...] of each shard at their places in a list of `count`; zeros elsewhere."""
    like = rows[0]
    result = like.new_zeros(count, *like.shape[1:])
    for part, own in zip(parts, rows, strict=True):
        result.index_copy_(0, part.places, own)
    return result


class Chosen(NamedTuple):
    """Rows for new ones, and when they were used last as the offers have it."""

    ids: Int[Tensor, " n"]
    last_access: Int[Tensor, " n"]


def chosen(placement: Placement, offers: Sequence[Offer], count: int) -> Chosen:
    """The rows that come first of all offers, as one bank would choose them.

    Never used rows by id, then removed ones by id, then live ones by (last access, id). Each
    shard's first `count` rows have to be among its offer, or all it has.
    """
    ids = torch.cat([placement.ids(shard, offer.local) for shard, offer in enumerate(offers)])
    rank = torch.cat([offer.rank for offer in offers])
    access = torch.cat([offer.last_access for offer in offers])
    order = ids.argsort(stable=True)
    for key in (torch.where(rank == 2, access, 0), rank):  # stable sorts, least key to greatest
        order = order[key[order].argsort(stable=True)]
    order = order[:count]
    return Chosen(ids[order], access[order])


class NewRows(NamedTuple):
    """What `append` stores."""

    rows: Float[Tensor, "n W"]
    values: Float[Tensor, "n V"] | None
    tags: Int[Tensor, " n"]

    def at(self, places: Int[Tensor, " m"]) -> NewRows:
        """Some of them."""
        return NewRows(*(None if part is None else part[places] for part in self))  # type: ignore[arg-type]


def in_order(ids: Tensor, removed: list[Tensor]) -> Tensor:
    """Those of `ids` that were removed, in their order."""
    return ids[torch.isin(ids, torch.cat(removed))]

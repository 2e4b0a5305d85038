"""LifelongMemory: classes learned from single examples, in a bank (Kaiser et al. 2017).

Letters: Q queries, W their width, K neighbours a query.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem.bank.contract import Bank, check_bank_contract
from sparsemem.checks import check_at_most, check_positive, check_size
from sparsemem.indexes.metrics import Metric

UNKNOWN = -1  # as a label: no neighbour, or none that is near enough


class Recall(NamedTuple):
    """The neighbours of each query, best first; where no more are stored: label UNKNOWN, id -1."""

    labels: Int[Tensor, "Q K"]
    scores: Float[Tensor, "Q K"]  # cosines; differentiable in the queries
    ids: Int[Tensor, "Q K"]

    def predict(self, threshold: float = -math.inf) -> Int[Tensor, " Q"]:
        """The nearest neighbour's label, or UNKNOWN where its cosine is under `threshold`."""
        return self.labels[:, 0].masked_fill(self.scores[:, 0] < threshold, UNKNOWN)


class LifelongMemory(nn.Module):
    """Stores labelled examples in a bank, reads the nearest, and ages out (arXiv 1703.03129).

    An example whose nearest neighbour has its label is added to that neighbour's row, so that the
    row's direction becomes an average; any other takes a new row. When the bank is full, the rows
    that were not found for longest give way. A label is stored as the row's tag (plus 1): it is
    saved with the bank.

    Rows are written, not trained: the gradient of the bank's keys is turned off. What trains the
    network that makes the queries is the gradient of `Recall.scores`.

    Args:
        bank: of metric "cosine", with any index; a `MemoryBank` or a `ShardedBank`.
        top_k: K, neighbours a query. One is enough to predict; the losses want more.
        inertia: the most examples that a row's past counts as against a new one. With 1 (the
            paper) row and example count the same, which follows a network in training; with
            infinity all examples of a row do, which suits a network that does not change.
    """

    def __init__(self, bank: Bank, top_k: int = 256, *, inertia: float = 1.0) -> None:
        super().__init__()
        check_bank_contract(bank)
        if bank.metric is not Metric.cosine:
            raise ValueError(f"bank has metric '{bank.metric}', expected 'cosine'")
        self.top_k = check_at_most(
            "top_k", check_size("top_k", top_k), "bank.num_rows", bank.num_rows
        )
        if inertia != math.inf:
            check_positive("inertia", inertia)
        self.inertia = inertia
        self.bank = bank
        bank.get_parameter("keys").requires_grad_(False)

    def forward(self, queries: Float[Tensor, "Q W"]) -> Recall:
        """The K nearest stored examples of each query."""
        if queries.ndim != 2 or queries.shape[1] != self.bank.width:
            raise ValueError(
                f"queries has shape {tuple(queries.shape)}, expected [Q, {self.bank.width}]"
            )
        hit = self.bank.read(queries, self.top_k)
        return Recall(self._labels(hit.ids), hit.scores, hit.ids)

    @torch.no_grad()
    def remember(
        self, queries: Float[Tensor, "Q W"], labels: Int[Tensor, " Q"], recall: Recall | None = None
    ) -> Int[Tensor, " Q"]:
        """Store examples; returns the row of each. What they recall is read unless it is given.

        The examples of a call do not see each other: two of a new class take a row each.
        ValueError for labels under 0, and if more new rows are needed than the bank can give.
        """
        _check_labels(labels, len(queries))
        if recall is None:
            recall = self(queries)
        elif len(recall.ids) != len(queries):
            raise ValueError(
                f"recall is of {len(recall.ids)} queries, expected that of these {len(queries)}"
            )
        ids = recall.ids[:, 0].clone()
        new = self._labels(ids) != labels  # as the rows are now
        room = self.bank.capacity()
        check_at_most("number of new rows", int(new.sum()), "num_rows - frozen rows", room)
        unit = F.normalize(queries, dim=1)
        self._add(ids[~new], unit[~new])
        if new.any():
            ids[new] = self.bank.append(unit[new], tags=labels[new] + 1)
        return ids

    def forget(self, label: int) -> Int[Tensor, " removed"]:
        """Remove all rows of a class; returns their ids. Costs O(N)."""
        return self.bank.remove(tag=check_size("label", label, 0) + 1)

    def _labels(self, ids: Tensor) -> Tensor:
        return (self.bank.tags_of(ids) - 1).masked_fill(ids < 0, UNKNOWN)

    def _add(self, ids: Tensor, unit: Tensor) -> None:
        """Add examples to rows. The metric ignores a row's length, which so can be its weight."""
        if not len(ids):
            return
        rows, place = torch.unique(ids, return_inverse=True)
        keys = self.bank.gather(rows)
        length = keys.norm(dim=1, keepdim=True).clamp_min(torch.finfo(keys.dtype).tiny)
        kept = keys * (self.inertia / length).clamp(max=1)
        self.bank.write(rows, kept.index_add_(0, place, unit.to(kept.dtype)))


def neighbour_loss(
    recall: Recall, labels: Int[Tensor, " Q"], temperature: float = 0.1
) -> Float[Tensor, ""]:
    """Mean of -log p, p the share of the right class in softmax(cosines / temperature).

    Neighbourhood components (Goldberger et al. 2004) over the K neighbours. Queries without a
    neighbour of their class do not count; without any that counts the loss is 0.
    """
    check_positive("temperature", temperature)
    scores, right, count = _counted(recall, labels)
    logits = scores / temperature
    share = logits.masked_fill(~right, -math.inf).logsumexp(1) - logits.logsumexp(1)
    return -share.sum() / count


def margin_loss(
    recall: Recall, labels: Int[Tensor, " Q"], margin: float = 0.1
) -> Float[Tensor, ""]:
    """Mean of max(0, best wrong neighbour's cosine - best right one's + margin).

    Kaiser et al. 2017, section 3. Queries without a neighbour of their class do not count, those
    without a wrong one count 0; without any that counts the loss is 0.
    """
    check_positive("margin", margin)
    scores, right, count = _counted(recall, labels)
    best_right = scores.masked_fill(~right, -math.inf).amax(1)
    best_wrong = scores.masked_fill(right, -math.inf).amax(1)
    return (best_wrong - best_right + margin).clamp(min=0).sum() / count


def _counted(recall: Recall, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Scores and right neighbours of the queries that have a right one, and how many (or 1)."""
    _check_labels(labels, len(recall.labels))
    right = recall.labels == labels.unsqueeze(1)
    counts = right.any(1)
    return recall.scores[counts], right[counts], max(1, int(counts.sum()))


def _check_labels(labels: Tensor, count: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}, expected int64 [{count}]")
    if count and int(labels.min()) < 0:
        raise ValueError(f"labels holds {int(labels.min())}, expected at least 0")

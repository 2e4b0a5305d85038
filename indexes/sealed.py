"""An index over the older rows of long episodes; the younger rows are searched exactly."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.ranking import top_k

PROBED_LISTS = 16
SPARE_CANDIDATES = 8  # more than k are asked for: FAISS computes in float32, off the grid
TAIL = 2048  # rows that are scanned before they are sealed together
CHANGES = 4  # changes of a sealed row, on average, before the lists are trained anew
TRAINING_POINTS = 32  # a centroid
ITERATIONS = 6


class SealedRows:
    """FAISS inverted lists over rows 0 .. sealed - 1 of B growing tables, by cosine.

    Reads see every write: rows behind the sealed ones (the tail) are scanned, and a sealed row
    that changes is updated in its list at once. The tail is sealed when it has grown long; the
    lists are trained anew when the rows have doubled or changed. The index only proposes rows: the
    caller scores them.
    """

    def __init__(self, batch_size: int, width: int, minimum: int) -> None:
        self.width = width
        self.minimum = minimum
        self.sealed = 0
        self._trained_at = 0
        self._changed = 0  # changes of sealed rows, of all tables, since the lists were trained
        self._lists: list[Any] = [None] * batch_size

    def absorb(
        self, touched: Int[Tensor, " B"], rows: Float[Tensor, "B M W"], norms: Float[Tensor, "B M"]
    ) -> bool:
        """Seal what is due of the rows that all episodes have touched; False while there are few.

        An exact scan is cheaper then.
        """
        extent = int(touched.min())
        if extent < self.minimum or load_faiss() is None:
            return False
        many = CHANGES * self._trained_at * len(self._lists)
        if extent >= 2 * self._trained_at or self._changed >= many:
            self._train(extent, rows, norms)
        elif extent >= self.sealed + TAIL:
            for element, lists in enumerate(self._lists):
                # From where these lists end: an interrupted call may have added to some.
                lists.add(unit_rows(rows[element], norms[element], slice(lists.ntotal, extent)))
            self.sealed = extent
        return True

    def update(
        self, ids: Int[Tensor, "B n"], rows: Float[Tensor, "B M W"], norms: Float[Tensor, "B M"]
    ) -> None:
        """Take over the rows at ids that are sealed."""
        if not self.sealed:
            return
        for element, lists in enumerate(self._lists):
            changed = torch.unique(ids[element][ids[element] < self.sealed])
            if len(changed):
                vectors = unit_rows(rows[element], norms[element], changed)
                lists.update_vectors(changed.cpu().numpy(), vectors)
                self._changed += len(changed)

    def proposed(self, queries: Float[Tensor, "B H W"], k: int) -> Int[Tensor, "B H C"]:
        """Sealed rows among which the k best of them should be, in any order; -1: none."""
        found = [
            lists.search(query, k + SPARE_CANDIDATES)[1]
            for lists, query in zip(self._lists, to_numpy(queries.nan_to_num(0, 0, 0)), strict=True)
        ]
        return torch.from_numpy(np.stack(found)).to(queries.device)

    def candidates(
        self,
        queries: Float[Tensor, "B H W"],
        k: int,
        rows: Float[Tensor, "B M W"],
        norms: Float[Tensor, "B M"],
    ) -> tuple[Int[Tensor, "B H C"], Float[Tensor, "B H C"]]:
        """Proposed ids, ascending and without repetitions, and their scores.

        The k best of the tail are among them, exactly. Where an index knew too few, id 0 stands
        at score -inf.
        """
        start = min(self.sealed, rows.shape[1] - k)
        tail = torch.bmm(queries, rows[:, start:].mT) * norms[:, start:].unsqueeze(1)
        sealed = self.proposed(queries, k)
        sealed = sealed.masked_fill(sealed >= start, -1)  # those are in the tail
        ids = torch.cat([sealed, top_k(tail, k) + start], 2).sort(2).values
        flat = ids.clamp(min=0).flatten(1)
        element = torch.arange(len(flat), device=ids.device).unsqueeze(1)
        picked = rows[element, flat].view(*ids.shape, self.width)
        scores = (picked @ queries.unsqueeze(-1)).squeeze(-1) * norms[element, flat].view_as(ids)
        return ids.clamp(min=0), scores.masked_fill(ids < 0, -torch.inf)

    def _train(self, extent: int, rows: Tensor, norms: Tensor) -> None:
        self._lists = [
            trained_lists(unit_rows(rows[element], norms[element], slice(0, extent)))
            for element in range(len(rows))
        ]
        self.sealed = self._trained_at = extent
        self._changed = 0


def trained_lists(vectors: Any) -> Any:
    """FAISS inverted lists that hold unit vectors [n, W] and can update them in place."""
    faiss = load_faiss()
    count, width = max(1, int(2 * len(vectors) ** 0.5)), vectors.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, count, metric)
    lists.cp.niter = ITERATIONS
    lists.cp.max_points_per_centroid = TRAINING_POINTS
    lists.cp.min_points_per_centroid = 1
    lists.nprobe = PROBED_LISTS
    lists.train(vectors)
    lists.set_direct_map_type(faiss.DirectMap.Array)
    lists.add(vectors)
    return lists


def unit_rows(
    rows: Float[Tensor, "M W"], norms: Float[Tensor, " M"], which: slice | Int[Tensor, " n"]
) -> Any:
    """Rows scaled by their inverse norms, as float32 numpy [n, W]; NaN becomes 0."""
    # FAISS refuses NaN; a diverged network is the training loop's to report.
    return to_numpy((rows[which] * norms[which].unsqueeze(-1)).nan_to_num(0, 0, 0))


def to_numpy(tensor: Tensor) -> Any:
    """Contiguous float32 numpy values of a tensor on any device."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


@cache
def load_faiss() -> Any:
    """FAISS, or None with one warning where it is not installed."""
    try:
        import faiss  # after torch: they share one OpenMP pool
    except ImportError:
        warnings.warn(
            "long episodes are searched by exact scans, which grow with the rows touched:"
            " install FAISS (sparsemem[cpu] or sparsemem[gpu]) for an index",
            stacklevel=2,
        )
        return None
    return faiss

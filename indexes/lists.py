"""The inverted lists of a FAISS index: which is nearest to a row, and how near is usual."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsemem.indexes.kinds import faiss_module, thorough_assignment

OFFSET_BITS = 32  # FAISS's direct map: the list of a label in the upper bits, its place below
MEASURED = 16_384  # training rows whose distances are taken
# A row strays when its squared distance is beyond the training rows' upper quartile by four times
# what lies between median and quartile, as it is for 2 in 1,000 of normal rows. Not a higher
# quantile: a fifth of the training rows may be on the move.
QUARTILES, SPANS, LEAST = (0.5, 0.75), 4.0, 1.25


def squares(vectors: Any, others: Any) -> Any:
    """Squared distances [n] of vectors [n, W] from others [n, W]."""
    away = vectors - others
    return np.einsum("nw,nw->n", away, away)


class Lists:
    """The lists of a trained `IndexIVF`, by their centroids."""

    def __init__(self, index: Any, centroids: Any, training: Any) -> None:
        self._index, self._thorough = index, thorough_assignment(index)
        self.centroids, self._squares = centroids, np.einsum("lw,lw->l", centroids, centroids)
        some = training[:: max(1, len(training) // MEASURED)]
        self.reach = np.inf
        middle, upper = np.quantile(self.nearest(some)[1], QUARTILES)
        self.usual = float(upper)  # squared distance that three quarters of the rows keep within
        self.reach = float(max(upper + SPANS * (upper - middle), LEAST * upper))

    @staticmethod
    def centroids_of(index: Any) -> Any | None:
        """Centroids [L, W]; None for an index without lists of its own or that hides them."""
        if not isinstance(index, faiss_module().IndexIVF):
            return None
        try:
            return index.quantizer.reconstruct_n(0, index.nlist)
        except RuntimeError:
            return None

    def nearest(self, vectors: Any) -> tuple[Any, Any]:
        """The list that each vector [n, W] belongs to, and its squared distance.

        Where that is unusually far, the search for the nearest centroid may have missed it: it
        is done again, more thoroughly.
        """
        lists, squares = self._searched(vectors, None)
        far = squares > self.reach
        if far.any() and self._thorough is not None:
            lists[far], squares[far] = self._searched(vectors[far], self._thorough)
        return lists, squares

    def squares(self, vectors: Any, lists: Any) -> Any:
        """Squared distances of vectors [n, W] from the centroids of given lists [n]."""
        return squares(vectors, self.centroids[lists])

    @property
    def places(self) -> Any:
        """FAISS's direct map as it is: where the entry of each label is."""
        places = self._index.direct_map.array
        return faiss_module().rev_swig_ptr(places.data(), places.size())

    def of(self, labels: Any) -> Any:
        """The lists [n] that labels [n] are in; of an index with a direct map."""
        return self.places[labels] >> OFFSET_BITS

    def _searched(self, vectors: Any, parameters: Any) -> tuple[Any, Any]:
        scores, lists = self._index.quantizer.search(vectors, 1, params=parameters)
        scores, lists = scores[:, 0], lists[:, 0].clip(min=0)  # -1, infinitely far: none was found
        if self._index.metric_type == faiss_module().METRIC_L2:
            return lists, scores
        return lists, np.einsum("nw,nw->n", vectors, vectors) + self._squares[lists] - 2 * scores

"""Recall on real vectors: SIFT descriptors and their published nearest neighbours.

siftsmall of http://corpus-texmex.irisa.fr: 10,000 base vectors, 100 queries, the 100 nearest of
each by distance.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

# Recall@1, @10 and @100 of a search as deep as a new index starts with: with 16 probes of 64
# lists, or efSearch 16. Measured values less about 0.02.
FLOORS = {
    "Flat": (1.0, 1.0, 1.0),
    "IVF64,Flat": (0.98, 0.97, 0.97),
    "IVF64,SQ8": (0.98, 0.97, 0.97),
    "IVF64,PQ32x4np": (0.95, 0.95, 0.96),
    "IVF64,PQ32x4fs": (0.92, 0.93, 0.96),
    "IVF64,RaBitQ": (0.87, 0.89, 0.95),
    "HNSW32": (0.96, 0.96, 0.83),
    "LSH512rt": (0.95, 0.93, 0.96),
}


class Sift(NamedTuple):
    base: Tensor
    queries: Tensor
    truth: Tensor
    distances: Tensor  # [Q, N], exact


@pytest.fixture(scope="module")
def sift(data_dir) -> Sift:
    with np.load(data_dir / "sift" / "siftsmall.npz") as arrays:
        base, queries, truth = (
            torch.from_numpy(arrays[name]) for name in ("base", "query", "groundtruth")
        )
    # Whole numbers up to 2^24: these products are exact in float64.
    wide, asked = base.double(), queries.double()
    squares = wide.square().sum(1) + asked.square().sum(1, keepdim=True)
    return Sift(base.float(), queries.float(), truth.long(), squares - 2 * asked @ wide.T)


def make(sift: Sift, name: str, **options):
    table = RowTable(sift.base.clone(), torch.ones(len(sift.base), dtype=torch.bool))
    return make_index(name, table, Metric.l2, **options)


def recall(sift: Sift, ids: Tensor) -> float:
    """Share of the k that were found that are as near as the k-th of the published."""
    k = ids.shape[1]
    assert all(len(set(row)) == k for row in ids.tolist())
    found, true = (sift.distances.gather(1, some) for some in (ids, sift.truth[:, :k]))
    return float((found <= true[:, -1:]).double().mean())


def test_exact_search_finds_the_published_neighbours(sift):
    found = make(sift, "exact").search(sift.queries, 100)
    expected = sift.distances.gather(1, sift.truth)
    assert found.scores.double().tolist() == expected.tolist()
    for ids, truth, distances in zip(found.ids, sift.truth, expected, strict=True):
        different = (ids != truth).nonzero().squeeze(1).tolist()
        for place in different:  # the published order of equal distances is arbitrary
            others = torch.cat([distances[:place], distances[place + 1 :]])
            assert distances[place] in others or place == 99
    for k in (1, 10, 100):
        assert recall(sift, found.ids[:, :k]) == 1.0


@pytest.mark.parametrize("name", list(FLOORS))
def test_recall_of_faiss_kinds(sift, name):
    index = make(sift, name, background=False, exact_below=1, min_recall=None)
    assert not index.stats()["exact"]
    for k, floor in zip((1, 10, 100), FLOORS[name], strict=True):
        found = index.search(sift.queries, k)
        assert torch.equal(found.scores.double(), sift.distances.gather(1, found.ids))
        assert recall(sift, found.ids) >= floor


def test_min_recall_is_held_on_live_queries(sift):
    index = make(sift, "IVF64,Flat", background=False, exact_below=1, min_recall=0.99)
    for _ in range(3):
        for some in sift.queries.split(4):
            index.search(some, 10)
    assert not index.stats()["exact"]
    assert recall(sift, index.search(sift.queries, 10).ids) >= 0.98

"""Which list is nearest to a row, how near is usual, and rows entered where they belong."""

import numpy as np
import pytest
import torch

from sparsemem.indexes.kinds import enter_in_place, new_faiss_index, quicken
from sparsemem.indexes.lists import Lists
from sparsemem.indexes.metrics import Metric

faiss = pytest.importorskip("faiss")
W = 8


def trained(name: str, metric: Metric, rows: np.ndarray):
    index = new_faiss_index(name, W, metric)
    index.train(rows)
    return index, Lists.centroids_of(index)


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, W)).astype(np.float32)


@pytest.mark.parametrize("metric", [Metric.l2, Metric.ip])
def test_nearest(metric):
    rows = normal(500)
    index, centroids = trained("IVF16,Flat", metric, rows)
    lists, squares = Lists(index, centroids, rows).nearest(rows)
    distances = ((rows[:, None] - centroids) ** 2).sum(2)
    products = rows @ centroids.T
    expected = distances.argmin(1) if metric is Metric.l2 else products.argmax(1)
    assert lists.tolist() == expected.tolist()
    np.testing.assert_allclose(squares, distances[np.arange(500), lists], rtol=1e-4)


def test_a_row_for_which_no_list_was_found_is_infinitely_far():
    index, centroids = trained("IVF1024,Flat", Metric.l2, normal(3000))
    kept = quicken(index)
    measured = Lists(index, centroids, normal(100, 1))
    kept[-1].reset()  # no centroid is left to be found
    lists, squares = measured.nearest(normal(3, 2))
    assert lists.tolist() == [0, 0, 0]
    assert (squares > measured.reach).all()


@pytest.mark.parametrize("width_of_noise", [0.01, 1.0])
def test_rows_like_those_of_the_training_are_within_reach(width_of_noise):
    centres = 10 * normal(16, 3)
    rng = np.random.default_rng(4)
    rows = centres[rng.integers(16, size=4000)] + width_of_noise * normal(4000, 5)
    index, centroids = trained("IVF128,Flat", Metric.l2, rows)  # so that every centre has some
    lists = Lists(index, centroids, rows)
    like = centres[rng.integers(16, size=4000)] + width_of_noise * normal(4000, 6)
    assert (lists.nearest(like)[1] > lists.reach).mean() < 0.02
    between = (centres[:8] + centres[8:]) / 2
    assert (lists.nearest(between)[1] > lists.reach).mean() > 0.7


def test_the_lists_of_labels_and_the_distances_from_them():
    rows = normal(500)
    index, centroids = trained("IVF16,Flat", Metric.l2, rows)
    index.set_direct_map_type(faiss.DirectMap.Array)
    index.add(rows)
    lists = Lists(index, centroids, rows)
    labels = np.array([499, 0, 7, 7])
    nearest, squares = lists.nearest(rows[labels])
    assert lists.of(labels).tolist() == nearest.tolist()
    np.testing.assert_allclose(lists.squares(rows[labels], nearest), squares, rtol=1e-4)
    assert 0.7 < (lists.nearest(rows)[1] <= lists.usual).mean() < 0.8


def test_what_seems_far_is_looked_up_again_more_thoroughly():
    rows = normal(6000)
    index, centroids = trained("IVF1024,Flat", Metric.l2, rows)
    kept = quicken(index)
    lists = Lists(index, centroids, rows)
    kept[-1].nprobe = 1
    hasty = index.quantizer.search(rows, 1)[0][:, 0]
    squares = lists.nearest(rows)[1]
    far = hasty > lists.reach
    assert far.sum() > 20
    assert (squares[far] > lists.reach).sum() < far.sum() / 3
    assert (squares[~far] == hasty[~far]).all()


@pytest.mark.parametrize("name", ["IVF16,SQ8", "HNSW16", "PCA4,IVF16,Flat", "LSH"])
def test_kinds_with_and_without_lists_of_their_own(name):
    assert (trained(name, Metric.l2, normal(500))[1] is None) == (name != "IVF16,SQ8")


@pytest.mark.parametrize("name", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ4np", "IVF16,RaBitQ"])
def test_entered_in_place_as_faiss_does_it(name):
    rows, new = normal(500), normal(40, 7)
    ours, theirs = (trained(name, Metric.l2, rows)[0] for _ in range(2))
    labels = np.random.default_rng(8).permutation(500)[:40]
    for index in (ours, theirs):
        index.set_direct_map_type(faiss.DirectMap.Array)
        index.add(rows)
    lists = ours.quantizer.search(new, 1)[1][:, 0]
    enter_in_place(ours, labels, new, np.ascontiguousarray(lists))
    theirs.update_vectors(labels, new)
    for index in (ours, theirs):
        index.nprobe = 16
    assert [ours.invlists.list_size(i) for i in range(16)] == [
        theirs.invlists.list_size(i) for i in range(16)
    ]
    queries = torch.from_numpy(normal(30, 9)).numpy()
    for one, other in zip(ours.search(queries, 5), theirs.search(queries, 5), strict=True):
        np.testing.assert_array_equal(one, other)

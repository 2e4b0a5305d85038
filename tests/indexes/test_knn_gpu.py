"""FAISS's brute force on a GPU against the exact search, and what it refuses anywhere."""

import re
import threading

import pytest
import torch

from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.knn_gpu import knn_gpu
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

CUDA = torch.device("cuda")
ROWS, QUERIES = torch.ones(5, 4), torch.ones(2, 4)
WRONG = [
    (ROWS, QUERIES, 2049, Metric.ip, ValueError, "k is 2049, expected at most 2048 for FAISS"),
    (ROWS, QUERIES, 0, Metric.ip, ValueError, "k is 0, expected at least 1"),
    (ROWS.double(), QUERIES, 1, Metric.ip, TypeError, "rows is torch.float64, expected one of"),
    (
        torch.ones(4, 5).T,
        QUERIES,
        1,
        Metric.ip,
        ValueError,
        "strides (1, 5), expected [N, W]",
    ),
    (ROWS, QUERIES, 1, Metric.cosine, ValueError, "metric is 'cosine', expected 'ip' or 'l2'"),
    (ROWS, torch.ones(2, 3), 1, Metric.ip, ValueError, "queries has shape (2, 3), expected [Q, 4]"),
    (ROWS, QUERIES, 1, Metric.ip, ValueError, "rows is on cpu and queries on cpu, expected both"),
]


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(("rows", "queries", "k", "metric", "error", "message"), WRONG)
def test_what_is_refused(rows, queries, k, metric, error, message):
    with pytest.raises(error, match=re.escape(message)):
        knn_gpu(rows, queries, k, metric)


@pytest.fixture
def faiss():
    """FAISS, built for GPUs, and a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    module = pytest.importorskip("faiss")
    if not hasattr(module, "StandardGpuResources"):
        pytest.skip("this FAISS is not built for GPUs")
    return module


def exactly(rows: torch.Tensor, queries: torch.Tensor, k: int, metric: Metric):
    live = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return ExactIndex(RowTable(rows, live), metric).search(queries.to(rows.dtype).float(), k)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_finds_what_exact_search_finds(metric, dtype, faiss):
    rows = torch.nn.functional.normalize(torch.randn(5000, 64, device=CUDA)).to(dtype)
    queries = torch.randn(7, 64, device=CUDA)
    if metric is Metric.cosine:
        queries = torch.nn.functional.normalize(queries)
    before = rows.clone(), queries.clone()
    found = knn_gpu(rows, queries, 5, metric, unit=True)
    expected = exactly(rows, queries, 5, metric)
    loose = 1e-5 if dtype == torch.float32 else 2e-2  # FAISS's products of half rows
    torch.testing.assert_close(found.scores, expected.scores, rtol=loose, atol=loose)
    if dtype == torch.float32:
        assert torch.equal(found.ids, expected.ids)
    assert torch.equal(rows, before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.gpu
def test_works_on_the_stream_of_torch_in_any_thread(faiss):
    results = []

    def search(seed: int) -> None:
        generator = torch.Generator(CUDA).manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            rows = torch.randn(20_000, 32, device=CUDA, generator=generator)
            queries = rows[:4] * 1.0
            knn_gpu(rows, queries, 1, Metric.l2)  # makes the thread's resources
            found = knn_gpu(rows + 1, queries + 1, 1, Metric.l2)
            results.append(found.ids.flatten().tolist())

    threads = [threading.Thread(target=search, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert results == [[0, 1, 2, 3]] * 2


@pytest.mark.gpu
def test_fewer_rows_than_asked_for(faiss):
    rows = torch.randn(3, 8, device=CUDA)
    found = knn_gpu(rows, rows[:1], 5, Metric.l2)
    assert found.ids[0, 0] == 0
    assert sorted(found.ids[0].tolist()) == [-1, -1, 0, 1, 2]
    found = knn_gpu(rows[:0], rows[:1], 2, Metric.ip)
    assert found.ids.tolist() == [[-1, -1]]

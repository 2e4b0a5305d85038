"""FAISS's brute force on a GPU, over rows where they are: what exact search is measured against.

It looks at every row it is given and knows no marks, its ties fall as they may, and it takes
queries in the dtype of the rows only. So it is for tables whose rows are all there.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.checks import check_size
from sparsemem.indexes.base import Found, check_queries
from sparsemem.indexes.kinds import faiss_module
from sparsemem.indexes.metrics import Metric

MOST_K = 2048
# FAISS cuts its products so that those at hand take 512 MiB; l2 adds 4 bytes a row for norms.
TEMPORARY_BYTES = 2**30
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _Resources(threading.local):
    """FAISS's temporary memory, handles and streams: not for two threads at a time."""

    def __init__(self) -> None:
        self.made: Any = None

    def get(self) -> Any:
        """Those of the calling thread."""
        if self.made is None:
            self.made = faiss_module().StandardGpuResources()
            self.made.setTempMemory(TEMPORARY_BYTES)
            self.made.setPinnedMemory(0)  # for what is on the host
        return self.made


_resources = _Resources()


def knn_gpu(
    rows: Float[Tensor, "N W"],
    queries: Float[Tensor, "Q W"],
    k: int,
    metric: Metric,
    *,
    unit: bool = False,
) -> Found:
    """The k nearest of all rows [N, W] on a GPU, best first; id -1 where there are no more.

    Queries are rounded to the dtype of the rows. Distances of `l2` are squared. FAISS has no
    cosine: for that all rows have length 1, as `unit` is there to say, and queries are scaled.
    The host waits once, to see that the queries are finite. Each thread that calls this holds
    `TEMPORARY_BYTES` on the GPU.
    """
    check(rows, queries, k, metric, unit)
    if metric is Metric.cosine:
        queries = torch.nn.functional.normalize(queries.float())
    queries = queries.to(rows.dtype).contiguous()
    scores = torch.empty(len(queries), k, device=rows.device)
    ids = torch.empty(len(queries), k, device=rows.device, dtype=torch.int64)
    faiss, number = faiss_module(), rows.get_device()
    stream = torch.cuda.current_stream(rows.device).cuda_stream
    resources = _resources.get()
    resources.setDefaultStream(number, faiss.cast_integer_to_cudastream_t(stream))
    if len(queries) and len(rows):
        faiss.bfKnn(resources, task(rows, queries, scores, ids, metric))
    else:
        scores.fill_(metric.missing)
        ids.fill_(-1)
    return Found(scores, ids)


def check(rows: Tensor, queries: Tensor, k: int, metric: Metric, unit: bool) -> None:
    """Refuse what FAISS would not, or not in words."""
    check_size("k", k)
    if k > MOST_K:
        raise ValueError(f"k is {k}, expected at most {MOST_K} for FAISS on a GPU")
    if rows.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise TypeError(f"rows is {rows.dtype}, expected one of {names}")
    if rows.ndim != 2 or not rows.is_contiguous():
        raise ValueError(
            f"rows has shape {tuple(rows.shape)} and strides {rows.stride()}, expected [N, W],"
            " contiguous"
        )
    if metric is Metric.cosine and not unit:
        raise ValueError(
            "metric is 'cosine', expected 'ip' or 'l2', which FAISS knows; or rows of length 1 and"
            " unit=True"
        )
    check_queries(queries, rows.shape[1])
    if not rows.is_cuda or queries.device != rows.device:
        raise ValueError(
            f"rows is on {rows.device} and queries on {queries.device}, expected both on one GPU"
        )


def task(rows: Tensor, queries: Tensor, scores: Tensor, ids: Tensor, metric: Metric) -> Any:
    """What is to be searched, and where results go, as addresses."""
    faiss = faiss_module()
    made = faiss.GpuDistanceParams()
    made.metric = faiss.METRIC_L2 if metric is Metric.l2 else faiss.METRIC_INNER_PRODUCT
    made.k, made.dims, made.device = scores.shape[1], rows.shape[1], rows.get_device()
    kind = getattr(faiss, f"DistanceDataType_{DTYPES[rows.dtype]}")
    made.vectors, made.vectorType = faiss.cast_integer_to_void_ptr(rows.data_ptr()), kind
    made.queries, made.queryType = faiss.cast_integer_to_void_ptr(queries.data_ptr()), kind
    made.numVectors, made.numQueries = len(rows), len(queries)
    made.vectorsRowMajor = made.queriesRowMajor = True
    made.outDistances = faiss.cast_integer_to_float_ptr(scores.data_ptr())
    made.outIndices = faiss.cast_integer_to_void_ptr(ids.data_ptr())
    made.outIndicesType = faiss.IndicesDataType_I64
    made.use_cuvs = False
    return made

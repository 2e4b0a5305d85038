"""Small clustered tables, FAISS indices over them, and how well these agree with a scan."""

import time

import torch

from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.recall import recall
from sparsemem.indexes.table import RowTable

N, W, K = 600, 8, 5
LISTS = "IVF16,Flat"


def clustered(count: int = N, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, W, generator=generator)
    which = torch.randint(20, (count,), generator=generator)
    return centres[which] + 0.3 * torch.randn(count, W, generator=generator)


def table_of(rows: torch.Tensor) -> RowTable:
    return RowTable(rows.clone(), torch.ones(len(rows), dtype=torch.bool))


def make(name=LISTS, rows=None, **options):
    options = {"background": False, "exact_below": 50, **options}
    return make_index(
        name, table_of(clustered() if rows is None else rows), Metric.cosine, **options
    )


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def agreement(index, queries, k=K) -> float:
    truth = ExactIndex(index.table, index.metric).search(queries, k)
    return recall(index.search(queries, k), truth, index.metric)

"""Small indices on the device of their rows, and how well they agree with a scan."""

import torch

from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.recall import recall
from sparsemem.indexes.table import RowTable
from tests.oracles.fresh_index import LISTS, K, clustered


def make(device, name=LISTS, rows=None, metric=Metric.cosine, **options):
    rows = (clustered() if rows is None else rows).to(device, copy=True)
    table = RowTable(rows, torch.ones(len(rows), dtype=torch.bool, device=device))
    options = {"background": False, "exact_below": 50, "min_recall": None, **options}
    return make_index(name, table, metric, **options)


def ids_of(start, stop, device):
    return torch.arange(start, stop, device=device)


def first(index, queries) -> list[int]:
    return index.search(queries.to(index.table.rows.device), 1).ids.flatten().tolist()


def agreement(index, queries, k=K) -> float:
    queries = queries.to(index.table.rows.device)
    truth = ExactIndex(index.table, index.metric).search(queries, k)
    return recall(index.search(queries, k), truth, index.metric)

"""Indices by name."""

from __future__ import annotations

from typing import Any

from sparsemem.indexes.base import Index
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable


def make_index(name: str, table: RowTable, metric: Metric, **options: Any) -> Index:
    """The index of a name: "exact", or a FAISS factory string such as "IVF4096,Flat".

    SKELETON: FAISS kinds to come.
    """
    if name == "exact":
        return ExactIndex(table, metric)
    raise ValueError(f"index is {name!r}, expected 'exact' or a FAISS factory string")

"""Indices by name."""

from __future__ import annotations

import inspect
from typing import Any

from sparsemem.checks import nearest
from sparsemem.indexes.base import Index
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.product_key import ProductKeyIndex
from sparsemem.indexes.table import RowTable

EXACT, PRODUCT_KEY = "exact", "product-key"


def make_index(name: str, table: RowTable, metric: Metric, **options: Any) -> Index:
    """The index of a name over a table.

    "exact", "product-key" (over a `ProductTable`), or a FAISS factory string such as
    "IVF4096,Flat", "IVF4096,SQ8", "HNSW32" (https://github.com/facebookresearch/faiss/wiki);
    options are those of the index's class. ValueError names an unknown name or option.
    """
    if name == EXACT:
        kind: Any = ExactIndex
    elif name == PRODUCT_KEY:
        kind = ProductKeyIndex
    else:
        from sparsemem.indexes.fresh import FreshIndex

        kind, options = FreshIndex, {"name": name, **options}
    known = set(inspect.signature(kind).parameters) - {"table", "metric"}
    for option in options:
        if option not in known:
            raise ValueError(
                f"unknown option {option!r} of index {name!r}: {nearest(option, known)}"
            )
    index: Index = kind(table, metric, **options)
    return index

"""Recall and time of every kind of index on SIFT: python benchmarks/sift_recall.py (1 minute).

siftsmall of http://corpus-texmex.irisa.fr: 10,000 vectors of width 128, 100 queries and the
published 100 nearest of each; squared distances, one thread. For each kind and k = 1, 10, 100:

- recall: the share of the true k nearest among the k found (a row as near as the k-th counts);
- nearest_found: the share of queries whose nearest neighbour is among the k found;
- milliseconds for the 100 queries in one batch.

"as_built" searches as deep as a new index starts with; "held_at_0.95" has min_recall=0.95 and has
been tuned on live queries (an index that cannot hold that searches exactly: "exact" says so).
"product-key" is not among them: its rows are pairs of sub-keys, which these vectors are not.
Writes sift_recall.json.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from common import machine, seconds
from torch import Tensor

from sparsemem.indexes.base import Index
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SPARSEMEM_DATA", ROOT.parent / "shared" / "data"))
KINDS = ["Flat", "IVF64,Flat", "IVF64,SQ8", "IVF64,PQ16np", "IVF64,PQ32x4np", "IVF64,PQ32x4fs"]
KINDS += ["IVF64,RaBitQ", "HNSW32", "LSH512rt"]
DEPTHS = (1, 10, 100)
FLOOR = 0.95
LIVE_BATCH, LIVE_ROUNDS = 4, 3  # queries at a time, each asked so many times, before it counts
REPETITIONS = 15
RESULT = Path(__file__).with_suffix(".json")


class Sift:
    """The base vectors, the queries, and the published nearest neighbours."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            base, queries, truth = (arrays[name] for name in ("base", "query", "groundtruth"))
        self.base = torch.from_numpy(base).float()
        self.queries = torch.from_numpy(queries).float()
        self.truth = torch.from_numpy(truth).long()

    def distances(self, ids: Tensor) -> Tensor:
        """Of each query to its rows; whole numbers under 2^24, so exact."""
        return Metric.l2.scores(self.queries, self.base[ids])

    def index(self, name: str, **options: Any) -> Index:
        """An index over a copy of the base vectors."""
        table = RowTable(self.base.clone(), torch.ones(len(self.base), dtype=torch.bool))
        return make_index(name, table, Metric.l2, **options)


def measured(sift: Sift, index: Index, k: int) -> dict[str, Any]:
    """Recall and time of one search of all queries."""
    ids = index.search(sift.queries, k).ids
    true = sift.distances(sift.truth[:, :k])
    times = [seconds(lambda: index.search(sift.queries, k)) for _ in range(REPETITIONS)]
    return {
        "recall": round(float((sift.distances(ids) <= true[:, -1:]).double().mean()), 4),
        "nearest_found": float((ids == sift.truth[:, :1]).any(1).double().mean()),
        "milliseconds": round(1e3 * statistics.median(times), 2),
    }


def as_built(sift: Sift, name: str) -> dict[str, Any]:
    """A new index that is not tuned."""
    start = time.perf_counter()
    index = sift.index(name, background=False, exact_below=1, min_recall=None)
    built = time.perf_counter() - start
    result = {f"@{k}": measured(sift, index, k) for k in DEPTHS}
    stats = index.stats()
    figures = {key: stats[key] for key in ("effort", "oversample", "bytes")}
    return {"build_seconds": round(built, 2), **figures, **result}


def held(sift: Sift, name: str) -> dict[str, Any]:
    """For each k an index that was tuned on live queries."""
    result = {}
    for k in DEPTHS:
        index = sift.index(name, background=False, exact_below=1, min_recall=FLOOR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the result says which are exact
            for _ in range(LIVE_ROUNDS):
                for some in torch.split(sift.queries, LIVE_BATCH):
                    index.search(some, k)
        figures = measured(sift, index, k)
        stats = index.stats()
        result[f"@{k}"] = figures | {key: stats[key] for key in ("effort", "oversample", "exact")}
    return result


def main(output: Annotated[Path, typer.Option()] = RESULT) -> None:
    """Measure every kind, and write the figures."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    sift = Sift(DATA / "sift" / "siftsmall.npz")
    exact = sift.index("exact")
    result: dict[str, Any] = {
        "machine": machine() | {"faiss": faiss.__version__},
        "exact": {f"@{k}": measured(sift, exact, k) for k in DEPTHS},
    }
    for name in KINDS:
        result[name] = {"as_built": as_built(sift, name), f"held_at_{FLOOR}": held(sift, name)}
        print(name, json.dumps(result[name]), flush=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""One contract for every kind of index: random work against a dictionary and loops."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.indexes.metrics import Metric
from tests.oracles.row_dictionary import OPERATIONS, Kind, ProductWork, Work

# Built from the first row on, not tuned (that is measured elsewhere), in the calling thread.
FRESH = (("background", False), ("exact_below", 1), ("min_recall", None))


def faiss_kind(name: str, exhaustive: bool = False, **other) -> Kind:
    return Kind(name, exhaustive=exhaustive, options=FRESH, **other)


KINDS = [
    Kind("exact", exact=True),
    Kind("product-key", exact=True, metrics=(Metric.ip, Metric.l2)),
    faiss_kind("Flat", exhaustive=True),
    faiss_kind("IVF4,Flat", exhaustive=True),  # all four lists are probed
    faiss_kind("IVF4,SQ8"),
    faiss_kind("IVF4,PQ2x4np"),
    faiss_kind("IVF4,RaBitQ"),
    faiss_kind("HNSW8"),
    faiss_kind("LSH", metrics=(Metric.cosine, Metric.l2)),
]
CASES = [(kind, metric) for kind in KINDS for metric in kind.metrics]

work = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), min_size=1, max_size=10
)
filled = st.sampled_from((0, 3, 20, 40))


def run(kind: Kind, metric: Metric, operations, filled: int, dtype=torch.float64) -> None:
    driver = ProductWork if kind.name == "product-key" else Work
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of upkeep that fails, as it is made to
        done = driver(kind, metric, dtype, filled)
        for operation, seed in operations:
            done.apply(operation, seed)


def sequences(count: int):
    return settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize(("kind", "metric"), CASES, ids=lambda value: getattr(value, "name", value))
def test_random_work(kind, metric):
    sequences(20)(given(work, filled)(lambda ops, full: run(kind, metric, ops, full)))()

"""One contract for every kind of index: random work against a dictionary and loops."""

import re
import warnings
from contextlib import contextmanager
from random import Random
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.indexes import recall, upkeep
from sparsemem.indexes.metrics import Metric
from tests.oracles.device_kind import DeviceKind
from tests.oracles.row_dictionary import (
    LARGE_BUFFER,
    OPERATIONS,
    Kind,
    Manner,
    ProductWork,
    Work,
)

KINDS = [
    Kind("exact", exact=True, fresh=False),
    Kind("product-key", exact=True, fresh=False, metrics=(Metric.ip, Metric.l2)),
    Kind("Flat", exhaustive=True),
    Kind("IVF4,Flat", exhaustive=True),  # all four lists are probed
    Kind("IVF4,SQ8"),
    Kind("IVF4,PQ2x4np"),
    Kind("IVF4,RaBitQ"),
    Kind("HNSW8"),
    Kind("LSH", metrics=(Metric.cosine, Metric.l2)),
]
# Tuned to the floor of its recall while it works, it looks into some of its lists only: asked for
# few rows, as all lists are needed where they hold less than was asked for.
TUNED = Kind("IVF8,Flat", floor=0.8, ks=(1, 2, 3))
KINDS.append(TUNED)
KINDS += [DeviceKind("IVF4,Flat", exhaustive=True), DeviceKind("IVF4,SQ8")]
EAGER = {"CHECK_ROWS": 3, "CHECK_QUERIES": 4, "WATCH_EVERY": 2}
CASES = [(kind, metric) for kind in KINDS for metric in kind.metrics]

work = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), min_size=1, max_size=10
)
manners = st.builds(
    Manner,
    filled=st.sampled_from((0, 3, 20, 40)),
    buffer_rows=st.sampled_from((3, LARGE_BUFFER)),
    steady=st.booleans(),
)
STEADY = {"STALE": 1e9, "GROWN": 1e9, "REPLACED": 1e9, "UNEVEN": 1e9, "PATIENT_CALLS": 0}


@contextmanager
def patched(changed):
    """Other constants of upkeep, and a few queries are enough to tune by."""
    with mock.patch.multiple(upkeep, **changed), mock.patch.object(recall, "ENOUGH", 2):
        yield


def run(kind: Kind, metric: Metric, operations, manner: Manner, dtype=torch.float64) -> None:
    driver = ProductWork if kind.name == "product-key" else Work
    changed = STEADY if manner.steady else {"PATIENT_CALLS": 0}
    if kind.floor is not None:
        changed = {**changed, **EAGER}
    with warnings.catch_warnings(), patched(changed):
        warnings.simplefilter("ignore", UserWarning)  # of upkeep that fails, as it is made to
        done = driver(kind, metric, dtype, manner)
        for operation, seed in operations:
            done.apply(operation, seed)


def sequences(count: int):
    return settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)


def named(value) -> str:
    place = "device " if isinstance(value, DeviceKind) else ""
    return place + getattr(value, "name", str(value))


cases = pytest.mark.parametrize(("kind", "metric"), CASES, ids=named)
kinds = pytest.mark.parametrize("kind", KINDS, ids=named)


@cases
def test_random_work(kind, metric):
    sequences(6)(given(work, manners)(lambda ops, manner: run(kind, metric, ops, manner)))()


@pytest.mark.parametrize("metric", Metric)
def test_the_tuned_kind_looks_into_some_of_its_lists_and_is_tuned_while_it_works(metric):
    with patched({**STEADY, **EAGER}):
        done = Work(TUNED, metric, torch.float64, Manner(40, 3, steady=True))
        efforts, recalls = [], []
        for seed in range(60):
            done.apply(("update", "touch", "remove")[seed % 3], seed)
            stats = done.index.stats()
            efforts.append(stats["effort"])
            recalls.append(stats["recall"])
            assert not stats["exact"]
    assert max(efforts) < 8
    assert len(set(efforts)) > 1
    assert len(set(recalls)) > 5
    assert TUNED.floor <= min(recalls) < 1


@pytest.mark.slow
@cases
@pytest.mark.usefixtures("plain_errors")  # shapes are checked above, at ten times the time
def test_much_random_work(kind, metric):
    sequences(400)(given(work, manners)(lambda ops, manner: run(kind, metric, ops, manner)))()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", [Metric.ip, Metric.l2])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]], ids=named)
def test_random_work_in_other_dtypes(kind, metric, dtype):
    # All that is summed is exact in float32, so scores are still compared as they are.
    sequences(4)(given(work, manners)(lambda ops, manner: run(kind, metric, ops, manner, dtype)))()


def begin(kind: Kind, filled: int = 20) -> Work:
    driver = ProductWork if kind.name == "product-key" else Work
    return driver(kind, Metric.l2, torch.float32, Manner(filled, LARGE_BUFFER, steady=True))


@kinds
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_empty_table_has_nothing_to_find(kind):
    index = begin(kind, filled=0).index
    found = index.search(torch.ones(3, 4), 2)
    assert found.ids.tolist() == [[-1, -1]] * 3
    assert found.scores.tolist() == [[torch.inf, torch.inf]] * 3


@kinds
def test_no_queries_no_results(kind):
    found = begin(kind).index.search(torch.empty(0, 4), 3)
    assert found.ids.shape == found.scores.shape == (0, 3)


@kinds
def test_no_ids_no_change(kind):
    done = begin(kind)
    none = torch.empty(0, dtype=torch.int64)
    done.index.update(none, torch.empty(0, 4))
    done.index.remove(none)
    done.search(Random(0))


QUERIES = [
    (torch.ones(4), 1, ValueError, r"queries has shape (4,), expected [Q, 4]"),
    (torch.ones(2, 3), 1, ValueError, r"queries has shape (2, 3), expected [Q, 4]"),
    (torch.ones(2, 4, dtype=torch.int64), 1, TypeError, "queries is torch.int64, expected a float"),
    (torch.tensor([[0, 0, 0, torch.nan]]), 1, ValueError, "queries[0, 3] is nan, expected finite"),
    (torch.tensor([[0, torch.inf, 0, 0]]), 1, ValueError, "queries[0, 1] is inf, expected finite"),
    (torch.ones(2, 4), 0, ValueError, "k is 0, expected at least 1"),
    (torch.ones(2, 4), 1.0, TypeError, "k is 1.0, expected an int"),
]


@kinds
@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(("queries", "k", "error", "message"), QUERIES, ids=lambda _: "")
def test_wrong_queries_are_refused(kind, queries, k, error, message):
    with pytest.raises(error, match=re.escape(message)):
        begin(kind).index.search(queries, k)


ROWS = torch.ones(2, 4)
CHANGES = [
    (torch.tensor([0, 36]), ROWS, ValueError, "ids holds 36, expected 0 .. 35"),
    (torch.tensor([-1, 3]), ROWS, ValueError, "ids holds -1, expected 0 .. 35"),
    (torch.tensor([3, 3]), ROWS, ValueError, "ids holds 3 more than once, expected distinct rows"),
    (torch.tensor([1, 2], dtype=torch.int32), ROWS, TypeError, "ids is torch.int32 [2], expected"),
    (torch.tensor([[1, 2]]), ROWS, TypeError, "ids is torch.int64 [1, 2], expected int64 [n]"),
    (torch.tensor([1, 2, 3]), ROWS, ValueError, "rows has shape (2, 4), expected [3, 4]"),
    (torch.tensor([1, 2]), ROWS[:, :3], ValueError, "rows has shape (2, 3), expected [2, 4]"),
    (torch.tensor([1, 2]), ROWS.long(), TypeError, "rows is torch.int64, expected a floating"),
    (torch.tensor([1, 2]), ROWS / 0, ValueError, "rows[0, 0] is inf, expected finite values"),
]


@kinds
@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(("ids", "rows", "error", "message"), CHANGES, ids=lambda _: "")
def test_wrong_changes_are_refused_and_change_nothing(kind, ids, rows, error, message):
    with mock.patch.object(Work, "num_rows", 36):
        done = begin(kind)
    with pytest.raises(error, match=re.escape(message)):
        done.index.update(ids, rows)
    if message.startswith("ids"):
        with pytest.raises(error, match=re.escape(message)):
            done.index.remove(ids)
    for seed in range(5):
        done.search(Random(seed))

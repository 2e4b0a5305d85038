"""Scores of rows, by torch and by compiled loops, against float64; the loops of an index."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.indexes import scoring
from sparsemem.indexes.base import best_of
from sparsemem.indexes.compiling import loops_for
from sparsemem.indexes.derived import Derived
from sparsemem.indexes.kinds import comparable, to_faiss
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.scoring import Scoring, TableScoring
from sparsemem.indexes.table import RowTable

N, W, Q, C = 50, 13, 5, 9
metrics = pytest.mark.parametrize("metric", list(Metric))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


@pytest.fixture(params=["auto", "reference"])
def both(request, monkeypatch):
    """Compiled loops, and torch in their place."""
    monkeypatch.setenv("SPARSEMEM_KERNELS", request.param)
    assert (loops_for(torch.zeros(1)) is None) == (request.param == "reference")


def table_of(rows: torch.Tensor) -> RowTable:
    return RowTable(rows, torch.ones(len(rows), dtype=torch.bool))


def given_rows(dtype: torch.dtype) -> tuple[RowTable, torch.Tensor, torch.Tensor]:
    """A table, queries [Q, W] in its computing dtype, and ids [Q, C], some of them -1."""
    generator = torch.Generator().manual_seed(3)
    table = table_of(torch.randn(N, W, generator=generator).to(dtype))
    queries = torch.randn(Q, W, generator=generator, dtype=table.dtype)
    return table, queries, torch.randint(-1, N, (Q, C), generator=generator)


@metrics
@dtypes
def test_scores_are_those_of_float64(metric, dtype, both, monkeypatch):
    table, queries, ids = given_rows(dtype)
    rows, there = table.rows.double()[ids.clamp(min=0)], ids >= 0
    exactly = metric.scores(queries.double(), rows)
    tolerance = 1e-5 if table.dtype == torch.float32 else 1e-13
    for numbers in (scoring.SCORED_NUMBERS, 2 * C * W):  # at once, and two queries at a time
        monkeypatch.setattr(scoring, "SCORED_NUMBERS", numbers)
        scores = TableScoring(table, metric).own(queries, ids)
        assert scores.dtype == table.dtype
        torch.testing.assert_close(
            scores.double()[there], exactly[there], rtol=tolerance, atol=tolerance
        )
    each = TableScoring(table, metric).each(queries[0], table.take(torch.arange(N)))
    torch.testing.assert_close(
        each.double(),
        metric.scores(queries[0].double(), table.rows.double()),
        rtol=tolerance,
        atol=tolerance,
    )


@metrics
@dtypes
def test_a_row_scores_the_same_wherever_it_stands(metric, dtype, both):
    table, queries, _ = given_rows(dtype)
    table.rows[7:] = table.rows[3]
    tested = TableScoring(table, metric)
    query, among = queries[:1], tested.own(queries[:1], torch.tensor([[3, 40, 1, 22]]))
    alone = tested.own(query, torch.tensor([[49]]))
    whole = tested.each(query[0], table.take(torch.arange(5, 31)))
    first = tested.top(query, torch.tensor([[1, 9, 3, 30]]), 4)
    assert set(first.scores[first.ids != 1].tolist()) == {float(alone)}
    assert {float(among[0, 0]), float(among[0, 1]), float(among[0, 3])} == {float(alone)}
    assert set(whole[2:].tolist()) == {float(alone)}


@metrics
def test_what_is_not_a_number_is_as_bad_as_no_row(metric, both):
    table, queries, _ = given_rows(torch.float32)
    table.rows[2, 1], table.rows[3, 0], table.rows[4, 0] = torch.nan, torch.inf, -torch.inf
    ids, plain = torch.tensor([[2, 3, 4, 5]]), Scoring(table.take, metric)
    scores = TableScoring(table, metric).own(queries[:1], ids)
    assert scores[0, 0] == metric.missing
    torch.testing.assert_close(scores, plain.own(queries[:1], ids))
    found = TableScoring(table, metric).top(queries[:1], ids, 4)
    assert found.ids[0, -1] in (2, 3, 4)
    assert (found.ids >= 0).all()


numbers = st.lists(
    st.tuples(st.integers(-1, N - 1), st.sampled_from([-1.0, 0.0, 1.0, 2.0])), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(numbers, st.integers(1, 15), st.sampled_from([Metric.ip, Metric.l2]))
def test_the_best_are_those_of_two_stable_sorts(candidates, k, metric):
    """Rows of one number each, so that many tie."""
    candidates = list(dict(candidates).items())  # a row is proposed once
    rows = torch.zeros(N, 1)
    for id, number in candidates:
        rows[id] = number if id >= 0 else rows[id]
    ids = torch.tensor([[id for id, _ in candidates]], dtype=torch.int64).view(1, -1)
    query = torch.ones(1, 1)
    found = TableScoring(table_of(rows), metric).top(query, ids, k)
    expected = best_of(metric.scores(query, rows[ids.clamp(min=0)]), ids, k, metric)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("k", [3, 300])  # by insertion, and by torch's sorts
def test_many_are_kept_as_few_are(k, both):
    rows = torch.randn(700, W, requires_grad=True)  # as a parameter is
    ids = torch.randperm(700).view(1, -1)
    found = TableScoring(table_of(rows), Metric.ip).top(torch.ones(1, W), ids, k)
    expected = rows.detach().sum(1).sort(descending=True)
    assert torch.equal(found.ids[0], expected.indices[:k])
    torch.testing.assert_close(found.scores[0], expected.values[:k])


@metrics
@dtypes
def test_queries_reach_faiss_as_it_is_to_see_them(metric, dtype, both):
    rows = torch.randn(6, W).to(dtype)
    rows[0, 1], rows[1], rows[2, 0] = torch.nan, 0, torch.inf
    np.testing.assert_allclose(to_faiss(rows, metric), comparable(rows, metric).numpy(), rtol=2e-6)


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_valid_entries_are_the_latest_of_live_rows_outside_the_buffer(count, monkeypatch):
    generator = np.random.default_rng(4)
    table = table_of(torch.randn(N, W))
    tested = Derived(table, Metric.cosine, "Flat")
    tested._add(np.arange(N), to_faiss(table.rows, Metric.cosine))
    moved = generator.permutation(N)[:10]
    tested._add(moved, to_faiss(table.rows[moved], Metric.cosine))  # so their first labels are old
    table.set_live(torch.arange(5, 15), False)
    tested.buffer.mark(np.arange(12, 25))
    labels = np.array([generator.permutation(N + 10)[:C] for _ in range(count)])
    labels[::3, 4:] = -1  # the index had no more
    for k in (1, 4, C):
        monkeypatch.setenv("SPARSEMEM_KERNELS", "auto")
        ids, short = tested._rows_of(labels, k)
        rows = np.concatenate([np.arange(N), moved])[labels]
        old = (labels < N) & np.isin(rows, moved)
        valid = (labels >= 0) & ~old & ~((rows >= 5) & (rows < 25))
        assert np.array_equal(ids, np.where(valid, rows, -1))
        assert np.array_equal(short, (valid.sum(1) < k) & (labels >= 0).all(1))
        monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")
        again, shorter = tested._rows_of(labels, k)
        assert np.array_equal(ids, again)
        assert np.array_equal(short, shorter)

"""Exact search against a plain sort of the rows' own scores: ties, rounding, extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.indexes import exact, scoring
from sparsemem.indexes.exact import ExactIndex, first_best, highest, upper_bounds
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

metrics = pytest.mark.parametrize("metric", list(Metric))


def table_of(rows: torch.Tensor, live: torch.Tensor | None = None) -> RowTable:
    return RowTable(rows, torch.ones(len(rows), dtype=torch.bool) if live is None else live)


def plain(table: RowTable, metric: Metric, queries: torch.Tensor, k: int, among=None):
    """Every live row's own score, sorted with its id: scores and ids, filled up."""
    rows = table.rows.to(table.dtype)
    there = [i for i, live in enumerate(table.live.tolist()) if live]
    if among is not None:
        there = [i for i in there if i in among]
    scores, ids = [], []
    for query in queries.to(table.dtype):
        own = metric.scores(query, rows).tolist()
        best = sorted(there, key=lambda i: (-metric.sign * own[i], i))[:k]
        lack = k - len(best)
        scores.append([own[i] for i in best] + [metric.missing] * lack)
        ids.append(best + [-1] * lack)
    return torch.tensor(scores, dtype=table.dtype), torch.tensor(ids)


def agrees(table: RowTable, metric: Metric, queries: torch.Tensor, k: int) -> None:
    found = ExactIndex(table, metric).search(queries, k)
    scores, ids = plain(table, metric, queries, k)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.scores, scores)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_ROWS", 50)
    monkeypatch.setattr(exact, "SPAN", 4)


@pytest.fixture
def rescanned(monkeypatch):
    """Counts the queries that are scanned again, row by row."""
    counted = []

    def counting(metric, queries, *rest):
        counted.append(len(queries))
        return row_by_row(metric, queries, *rest)

    row_by_row = exact.row_by_row
    monkeypatch.setattr(exact, "row_by_row", counting)
    return counted


def rows_of(kind: str, count: int, width: int) -> torch.Tensor:
    normal, some = torch.randn(count, width), torch.randn(7, width)
    return {
        "normal": normal,
        "rounded": normal.round(),
        "zero": torch.zeros(count, width),
        "constant": torch.full((count, width), 0.3),
        "few": some[torch.randint(5, (count,))],
        "scaled": some[torch.randint(7, (count,))] * torch.randint(1, 4, (count, 1)),
        "close": 0.7 + 1e-6 * normal,
        "far": 1000 + normal,
        "large": 1e15 * normal,
        "tiny": 1e-25 * normal,
        "outlier": torch.cat([1e12 * normal[:1], normal[1:]]),
    }[kind]


KINDS = ["normal", "rounded", "zero", "constant", "few", "scaled", "close", "far", "large"]
KINDS += ["tiny", "outlier"]


@metrics
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_a_sort_of_all_scores(metric, kind, dtype, small_blocks):
    rows = rows_of(kind, 333, 5).to(dtype)
    live = torch.rand(333) < 0.8
    live[100:160] = False  # one block without any
    table = table_of(rows, live)
    queries = torch.cat([rows[:4].float() + 0.1, rows_of("rounded", 3, 5), torch.zeros(1, 5)])
    for k in (1, 7, 60, 400):
        agrees(table, metric, queries, k)


@metrics
def test_ties_go_to_the_first_row_however_many_there_are(metric, small_blocks, rescanned):
    table = table_of(torch.ones(5_000, 8))
    table.set_live(torch.tensor([0, 2, 51]), False)
    found = ExactIndex(table, metric).search(torch.randn(3, 8), 4)
    assert found.ids.tolist() == [[1, 3, 4, 5]] * 3
    assert (found.scores == found.scores[:, :1]).all()
    assert rescanned == [3]


@metrics
def test_a_better_row_behind_many_ties(metric, small_blocks):
    rows = torch.zeros(1_000, 4)
    rows[777] = torch.tensor([1.0, 0, 0, 0])
    found = ExactIndex(table_of(rows), metric).search(torch.tensor([[2.0, 0, 0, 0]]), 3)
    assert found.ids.tolist() == [[777, 0, 1]]


@metrics
def test_scattered_rows_need_no_second_scan(metric, rescanned):
    rows = torch.randn(20_000, 16)
    agrees(table_of(rows), metric, rows[:5] + 0.1, 8)
    assert rescanned == []


def test_distances_far_from_the_origin_need_no_second_scan(rescanned):
    rows = 1000 + torch.randn(20_000, 16)
    agrees(table_of(rows), Metric.l2, rows[:5] + 0.1, 8)
    assert rescanned == []


@metrics
def test_half_rows_are_summed_in_float32(metric):
    # In float16 the inner product, 4 * 200^2, would overflow.
    rows = torch.full((3, 4), 200.0, dtype=torch.float16)
    rows[1] = 180
    table = table_of(rows)
    found = ExactIndex(table, metric).search(torch.full((1, 4), 200.0), 3)
    assert found.scores.dtype == torch.float32
    if metric is Metric.ip:
        assert found.ids.tolist() == [[0, 2, 1]]
        assert found.scores.tolist() == [[160_000, 160_000, 144_000]]
    agrees(table, metric, torch.full((1, 4), 200.0), 3)


@metrics
def test_rows_beyond_what_squares_can_hold(metric, small_blocks):
    rows = torch.randn(120, 4)
    rows[7] = 3e38
    rows[70] = -3e38
    found = ExactIndex(table_of(rows), metric).search(torch.ones(1, 4), 120)
    assert sorted(found.ids[0].tolist()) == list(range(120))
    ordinary = ExactIndex(table_of(rows[8:50]), metric).search(torch.ones(1, 4), 42)
    kept = [i for i in found.ids[0].tolist() if 8 <= i < 50]
    assert kept == (ordinary.ids[0] + 8).tolist()


@metrics
def test_a_row_that_is_not_a_number_ranks_last(metric, small_blocks):
    rows = torch.randn(120, 4)
    rows[60] = torch.nan
    found = ExactIndex(table_of(rows), metric).search(torch.ones(2, 4), 120)
    assert found.ids[:, -1].tolist() == [60, 60]
    assert found.scores[:, -1].tolist() == [metric.missing] * 2
    assert found.scores[:, :-1].isfinite().all()


@metrics
def test_many_queries_are_the_same_as_each_alone(metric, monkeypatch):
    table = table_of(torch.randn(500, 6).round())
    queries = torch.randn(30, 6).round()
    together = ExactIndex(table, metric).search(queries, 9)
    monkeypatch.setattr(exact, "BATCH_QUERIES", 7)
    monkeypatch.setattr(scoring, "SCORED_NUMBERS", 100)
    apart = ExactIndex(table, metric).search(queries, 9)
    assert torch.equal(together.ids, apart.ids)
    assert torch.equal(together.scores, apart.scores)


@metrics
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_do_not_change_the_result(metric, precision):
    torch.set_float32_matmul_precision(precision)
    try:
        agrees(table_of(torch.randn(300, 6)), metric, torch.randn(4, 6), 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            agrees(table_of(torch.randn(300, 6)), metric, torch.randn(4, 6), 5)
    finally:
        torch.set_float32_matmul_precision("highest")


@metrics
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_exceeds_its_bound(metric, kind):
    rows = rows_of(kind, 300, 33)
    queries = torch.cat([rows[:3], torch.randn(3, 33), torch.zeros(1, 33)])
    bounds = upper_bounds(metric, queries, rows)
    own = torch.stack([metric.scores(query, rows) for query in queries]) * metric.sign
    exactly = torch.stack([metric.scores(query.double(), rows.double()) for query in queries])
    assert (bounds >= own).all()
    assert (bounds >= exactly * metric.sign).all()
    if kind == "normal":  # and they are of use
        assert (bounds - own).max() < 0.02


def test_a_row_removed_between_the_scans_is_missed_but_breaks_nothing(monkeypatch, small_blocks):
    # Upkeep measures recall without the table's lock.
    table = table_of(torch.ones(20, 4))

    def removing(*arguments):
        table.set_live(torch.arange(18), False)
        return row_by_row(*arguments)

    row_by_row = exact.row_by_row
    monkeypatch.setattr(exact, "row_by_row", removing)
    found = exact.scan(table, Metric.ip, torch.ones(1, 4), 3)
    assert found.ids.tolist() == [[18, 19, -1]]


values = st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=40)


@settings(max_examples=50)
@given(values, st.integers(1, 45))
def test_first_best_is_a_stable_sort(numbers, k):
    places = first_best(torch.tensor([numbers, numbers[::-1]]), k).tolist()
    for row, given_numbers in zip(places, (numbers, numbers[::-1]), strict=True):
        order = sorted(range(len(numbers)), key=lambda i: -given_numbers[i])
        assert row == order[:k]


@settings(max_examples=30)
@given(st.integers(1, 700), st.integers(1, 12))
def test_highest_is_topk(columns, keep):
    numbers = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    top, places = highest(numbers, keep)
    assert torch.equal(top, numbers.topk(min(keep, columns), 1).values)
    assert torch.equal(numbers.gather(1, places), top)

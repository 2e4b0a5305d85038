"""Product keys against exact search over all their rows written out."""

import re
import resource
import time
from pathlib import Path

import pytest
import torch

from sparsemem.indexes import product_key
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.product_key import (
    ProductKeyIndex,
    ProductTable,
    dominant_pairs,
    num_subkeys,
)
from sparsemem.indexes.table import RowTable

metrics = pytest.mark.parametrize("metric", [Metric.ip, Metric.l2])


def written_out(table: ProductTable) -> RowTable:
    """All rows, in plain loops."""
    first, second = table.subkeys
    rows = torch.stack([torch.cat([left, right]) for left in first for right in second])
    return RowTable(rows, table.live)


def agrees(table: ProductTable, metric: Metric, queries: torch.Tensor, k: int) -> None:
    found = ProductKeyIndex(table, metric).search(queries, k)
    expected = ExactIndex(written_out(table), metric).search(queries, k)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def subkeys_of(kind: str, half: int, width: int) -> torch.Tensor:
    normal = torch.randn(2, half, width)
    return {
        "normal": normal,
        "rounded": normal.round(),
        "zero": torch.zeros_like(normal),
        "one half zero": torch.stack([normal[0], torch.zeros(half, width)]),
        "unequal": torch.stack([1e9 * normal[0], 1e-9 * normal[1]]),
        "close": 5 + 1e-4 * normal,
        "float16": normal.half(),
        "float64": normal.round().double(),
    }[kind]


@metrics
@pytest.mark.parametrize("half", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "kind",
    ["normal", "rounded", "zero", "one half zero", "unequal", "close", "float16", "float64"],
)
def test_equals_exact_search_over_all_rows(metric, kind, half):
    table = ProductTable(subkeys_of(kind, half, 3))
    queries = torch.cat([torch.randn(3, 6).round(), torch.randn(3, 6), torch.zeros(1, 6)])
    for k in (1, 5, 40):
        agrees(table, metric, queries, k)
    table.set_live(torch.randperm(half**2)[: half**2 // 2], False)
    agrees(table, metric, queries, 5)
    table.set_live(torch.arange(half**2)[3:], False)
    agrees(table, metric, queries, 5)


@metrics
@pytest.mark.parametrize("most_alike", [1, product_key.MOST_ALIKE])
def test_the_best_rows_removed_uncover_the_next(metric, most_alike, monkeypatch):
    monkeypatch.setattr(product_key, "MOST_ALIKE", most_alike)
    table = ProductTable(torch.randn(2, 60, 4))
    index = ProductKeyIndex(table, metric)
    query = torch.randn(1, 8)
    everything = ExactIndex(written_out(table), metric).search(query, 3600).ids
    for gone in (1, 10, 100, 1000, 3590):
        index.remove(everything[0, :gone])
        assert index.search(query, 5).ids.tolist() == everything[:, gone : gone + 5].tolist()
    assert index.search(query, 20).ids.tolist()[0] == everything[0, 3590:].tolist() + [-1] * 10


@metrics
def test_a_scan_where_most_rows_are_removed(metric, monkeypatch):
    monkeypatch.setattr(product_key, "MOST_PAIRS", 50)
    table = ProductTable(torch.randn(2, 30, 4))
    table.set_live(torch.randperm(900)[:800], False)
    agrees(table, metric, torch.randn(5, 8), 7)


@metrics
def test_more_equal_rows_than_are_looked_at(metric):
    some = torch.randn(3, 16)
    subkeys = some[torch.randint(3, (2, 500))]  # some 28,000 rows of each kind
    table, query = ProductTable(subkeys), torch.randn(4, 32)
    found = ProductKeyIndex(table, metric).search(query, 9)
    expected = ExactIndex(table, metric).search(query, 9)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


@metrics
def test_autocast_changes_nothing(metric):
    table = ProductTable(102.5 + 0.24 * torch.rand(2, 30, 1))  # bfloat16 has 102.5 for them all
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agrees(table, metric, torch.ones(1, 2), 1)


@metrics
def test_few_queries_at_a_time_are_the_same(metric, monkeypatch):
    monkeypatch.setattr(product_key, "PAIRS_AT_ONCE", 1)
    agrees(ProductTable(torch.randn(2, 30, 4).round()), metric, torch.randn(5, 8), 7)


@metrics
def test_scattered_rows_need_no_second_look(metric, monkeypatch):
    depths = []

    def counting(index, queries, k, depth, exactly):
        depths.append(depth)
        return search_pairs(index, queries, k, depth, exactly)

    search_pairs = ProductKeyIndex._search_pairs
    monkeypatch.setattr(ProductKeyIndex, "_search_pairs", counting)
    index = ProductKeyIndex(ProductTable(torch.randn(2, 300, 16)), metric)
    index.search(torch.randn(9, 32), 5)
    assert depths == [5 + product_key.SPARE]


def test_rows_that_rounding_makes_equal_come_in_the_order_of_their_ids():
    # In float32 all first halves drown in the second; their own order is another.
    first = 1e-6 * torch.randn(20, 1)
    table = ProductTable(torch.stack([first, torch.full((20, 1), 1e6)]))
    agrees(table, Metric.ip, torch.ones(1, 2), 4)
    found = ProductKeyIndex(table, Metric.ip).search(torch.ones(1, 2), 4)
    assert found.ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("depth", "size"), [(1, 1), (5, 9), (9, 3), (30, 6), (64, 200)])
def test_dominant_pairs_hold_the_best_of_any_scores(depth, size):
    left, right = dominant_pairs(depth, size, torch.device("cpu"))
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    assert len(pairs) == len(left)
    for _ in range(20):
        halves = torch.rand(2, size).sort(descending=True).values
        sums = halves[0].unsqueeze(1) + halves[1]
        best = sums.flatten().topk(min(depth, size**2)).indices
        assert {(n // size, n % size) for n in best.tolist()} <= pairs


def test_rows_follow_their_subkeys():
    subkeys = torch.randn(2, 5, 2)
    table = ProductTable(subkeys)
    ids = torch.tensor([[0, 7], [24, 13]])
    expected = [
        [subkeys[0, n // 5].tolist() + subkeys[1, n % 5].tolist() for n in row]
        for row in ids.tolist()
    ]
    assert table.take(ids).tolist() == expected
    index = ProductKeyIndex(table, Metric.l2)
    subkeys[1, 3] = 9.0
    query = torch.cat([subkeys[0, 2], subkeys[1, 3]]).unsqueeze(0)
    found = index.search(query, 1)
    assert found.ids.tolist() == [[13]]
    assert found.scores.tolist() == [[0.0]]


def test_update_takes_rows_as_they_are_and_no_others():
    table = ProductTable(torch.randn(2, 4, 2).half())
    index = ProductKeyIndex(table, Metric.l2)
    ids = torch.tensor([3, 9])
    rows = table.take(ids)
    index.remove(ids)
    assert (table.num_live, table.is_live(ids).tolist()) == (14, [False, False])
    other = rows.clone()
    other[1, 0] += 1
    with pytest.raises(ValueError, match="row 9 differs from what its two sub-keys make"):
        index.update(ids, other)
    assert table.num_live == 14  # row 3 was not written either
    index.update(ids, rows)
    assert (table.num_live, table.is_live(ids).tolist()) == (16, [True, True])
    assert index.search(rows, 1).ids.tolist() == [[3], [9]]


def test_marks_can_be_the_callers():
    removed = torch.zeros(9, dtype=torch.bool)
    removed[4] = True
    table = ProductTable(torch.ones(2, 3, 1), removed)
    ProductKeyIndex(table, Metric.ip).remove(torch.tensor([0]))
    assert removed.nonzero().squeeze(1).tolist() == [0, 4]
    assert table.num_live == 7
    assert table.live.tolist() == [not mark for mark in removed.tolist()]


@pytest.mark.usefixtures("plain_errors")
def test_what_product_keys_cannot_be():
    table = ProductTable(torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match="metric is 'cosine', expected 'ip' or 'l2'"):
        make_index("product-key", table, Metric.cosine)
    with pytest.raises(TypeError, match="table is a RowTable, expected a ProductTable"):
        make_index("product-key", written_out(table), Metric.ip)
    with pytest.raises(ValueError, match=r"subkeys has shape \(3, 2\), expected \[2, S, W/2\]"):
        ProductTable(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"subkeys has shape \(2, 0, 2\), expected"):
        ProductTable(torch.ones(2, 0, 2))
    with pytest.raises(TypeError, match=r"subkeys is torch.int64, expected a floating dtype"):
        ProductTable(torch.ones(2, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("removed is torch.bool [4], expected a mark")):
        ProductTable(torch.ones(2, 3, 2), torch.zeros(4, dtype=torch.bool))


def test_numbers_of_rows():
    assert num_subkeys(2**26) == 2**13
    with pytest.raises(ValueError, match=r"num_rows is 1000, .* such as 961 or 1024"):
        num_subkeys(1000)


def resident() -> int:
    """Bytes of this process that are in memory."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        pytest.skip("needs /proc/self/statm")
    return int(statistics.read_text().split()[1]) * resource.getpagesize()


@metrics
def test_a_hundred_million_rows(metric):
    before = resident()
    half = 10_000
    table = ProductTable(torch.randn(2, half, 16))
    index = ProductKeyIndex(table, metric)
    ids = torch.randint(half**2, (16,))
    queries = table.take(ids)
    start = time.thread_time()
    found = index.search(queries, 8)
    took = time.thread_time() - start
    if metric is Metric.l2:
        assert found.ids[:, 0].tolist() == ids.tolist()
    else:  # the pair of each half's best
        halves = [
            (q @ keys.T).argmax(1)
            for q, keys in zip(queries.chunk(2, 1), table.subkeys, strict=True)
        ]
        assert found.ids[:, 0].tolist() == (halves[0] * half + halves[1]).tolist()
    index.remove(found.ids[0])
    again = index.search(queries[:1], 8)
    assert not set(again.ids[0].tolist()) & set(found.ids[0].tolist())
    assert took < 1.0  # a pass over all rows takes ten times that
    assert resident() - before < 64 * 2**20  # the marks of all rows would take 100 MB

"""What shards find and offer, merged, is what one bank finds and chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.distributed.merging import Offer, assembled, chosen, merged
from sparsemem.distributed.placement import Placement
from sparsemem.indexes.exact import scan
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable


def tables(rows, live, placement):
    for shard in range(placement.num_shards):
        yield RowTable(rows[shard :: placement.num_shards], live[shard :: placement.num_shards])


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("num_shards", [1, 3, 4])
def test_the_best_of_all_shards_are_the_best_of_all_rows(metric, num_shards):
    generator = torch.Generator().manual_seed(num_shards)
    rows = torch.randn(50, 8, generator=generator)
    rows[10:20] = rows[:10]  # ties
    live = torch.rand(50, generator=generator) < 0.8
    queries, placement = torch.randn(5, 8, generator=generator), Placement.of(50, num_shards)
    whole = scan(RowTable(rows, live), metric, queries, 7)
    parts = [scan(table, metric, queries, 7) for table in tables(rows, live, placement)]
    found = merged(placement, parts, 7, metric)
    assert torch.equal(found.ids, whole.ids)
    assert torch.equal(found.scores, whole.scores)


def test_fewer_rows_than_asked_for():
    placement, rows = Placement.of(4, 3), torch.eye(4)
    live = torch.tensor([False, True, False, True])
    parts = [scan(t, Metric.ip, torch.ones(1, 4), 3) for t in tables(rows, live, placement)]
    found = merged(placement, parts, 3, Metric.ip)
    assert found.ids.tolist() == [[1, 3, -1]]
    assert found.scores.tolist() == [[1.0, 1.0, -torch.inf]]


def test_rows_come_back_to_their_places():
    placement, ids = Placement.of(12, 3), torch.tensor([5, -1, 7, 0, 5])
    table = torch.arange(12.0).unsqueeze(1).expand(12, 2)
    parts = placement.split(ids)
    rows = [table[placement.ids(shard, part.local)] for shard, part in enumerate(parts)]
    assert assembled(parts, rows, len(ids))[:, 0].tolist() == [5.0, 0.0, 7.0, 0.0, 5.0]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(0, 12),
)
def test_chosen_as_by_one_bank(rows, num_shards, count):
    placement = Placement.of(max(len(rows), num_shards), num_shards)

    def key(id):
        rank, access = rows[id]
        return rank, access if rank == 2 else 0, id

    offers = []
    for shard in range(num_shards):
        own = sorted(range(shard, len(rows), num_shards), key=key)[:count]
        values = [[id // num_shards for id in own], *([rows[id][i] for id in own] for i in (0, 1))]
        offers.append(Offer(*(torch.tensor(value, dtype=torch.int64) for value in values)))
    expected = sorted(range(len(rows)), key=key)[:count]
    found = chosen(placement, offers, count)
    assert found.ids.tolist() == expected
    assert found.last_access.tolist() == [rows[id][1] for id in expected]

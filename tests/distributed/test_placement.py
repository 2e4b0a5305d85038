"""Every row has one owner and one place there, whatever the number of shards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.distributed.placement import Placement


@given(st.integers(1, 60), st.integers(1, 9))
def test_rows_and_places_correspond_one_to_one(num_rows, num_shards):
    placement = Placement.of(max(num_rows, num_shards), num_shards)
    ids = torch.arange(placement.num_rows)
    owner, local = placement.owner(ids), placement.local(ids)
    for shard in range(num_shards):
        own = local[owner == shard]
        assert own.tolist() == list(range(placement.rows_of(shard)))
        assert placement.ids(shard, own).tolist() == ids[owner == shard].tolist()


@given(st.lists(st.integers(-1, 40)), st.integers(1, 7))
def test_a_split_keeps_order_and_leaves_out_what_is_no_row(ids, num_shards):
    placement = Placement.of(41, num_shards)
    parts = placement.split(torch.tensor(ids, dtype=torch.int64))
    for shard, part in enumerate(parts):
        expected = [place for place, id in enumerate(ids) if id >= 0 and id % num_shards == shard]
        assert part.places.tolist() == expected
        assert part.local.tolist() == [ids[place] // num_shards for place in expected]


def test_no_row_stays_no_row():
    placement, none = Placement.of(10, 3), torch.tensor([-1, 4])
    assert placement.owner(none).tolist() == [-1, 1]
    assert placement.local(none).tolist() == [-1, 1]
    assert placement.ids(2, none).tolist() == [-1, 14]


def test_more_shards_than_rows_are_refused():
    with pytest.raises(ValueError, match="num_shards is 4, expected at most num_rows = 3"):
        Placement.of(3, 4)

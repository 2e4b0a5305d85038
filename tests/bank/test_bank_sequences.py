"""Random sequences of calls against a bank of dictionaries and loops."""

import copy
from functools import partial
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.bank import MemoryBank, usage
from tests.oracles.sharded import sharded, whole

WIDTH = 2


class Loops:
    """A bank with values and tags, the plain way. Rows are whole numbers: scores are exact."""

    def __init__(self, num_rows, metric):
        self.num_rows, self.metric, self.clock = num_rows, metric, 0
        self.rows, self.values, self.tags, self.expiry = {}, {}, {}, {}
        self.last, self.count, self.frozen = {}, {}, set()

    def score(self, query, row):
        if self.metric == "ip":
            return sum(q * r for q, r in zip(query, row, strict=True))
        return -sum((q - r) ** 2 for q, r in zip(query, row, strict=True))

    def drop(self, ids):
        for row in ids:
            for column in (self.rows, self.values, self.tags, self.expiry, self.count):
                column.pop(row, None)
            self.frozen.discard(row)

    def tick(self):
        self.clock += 1
        self.drop([row for row, time in self.expiry.items() if time <= self.clock])

    def access(self, row):
        self.last[row] = self.clock
        self.count[row] = self.count.get(row, 0) + 1

    def read(self, query, k):
        self.tick()
        order = sorted(self.rows, key=lambda row: (-self.score(query, self.rows[row]), row))[:k]
        for row in order:
            self.access(row)
        return order + [-1] * (k - len(order))

    def put(self, row, key, value, tag, ttl):
        self.rows[row] = self.rows[row] if key is None else key
        self.values[row] = value
        if tag is not None:
            self.tags[row] = tag
        if ttl is not None:
            self.expiry.pop(row, None)
        if ttl:
            self.expiry[row] = self.clock + ttl + 1
        self.access(row)

    def append(self, keys, value, tag, ttl):
        self.tick()
        ids = range(self.num_rows)
        fresh = [row for row in ids if row not in self.last]
        removed = [row for row in ids if row in self.last and row not in self.rows]
        old = sorted(set(self.rows) - self.frozen, key=lambda row: (self.last[row], row))
        chosen = (fresh + removed + old)[: len(keys)]
        for row, key in zip(chosen, keys, strict=True):
            self.drop([row])
            self.put(row, key, value, tag, ttl)
        return chosen

    def write(self, ids, key, value, tag, ttl):
        self.tick()
        for row in ids:
            self.put(row, key, value, tag, ttl)

    def stays(self, row):
        return row in self.rows and self.expiry.get(row, self.clock + 2) > self.clock + 1

    def remove(self, ids):
        # The bank lets rows go that would not be found by the next call anyway.
        self.drop([row for row, time in self.expiry.items() if time <= self.clock + 1])
        self.drop(ids)


ROW = st.tuples(st.integers(-2, 2), st.integers(-2, 2))
TAG = st.sampled_from([None, 0, 1, 2])
TTL = st.sampled_from([None, None, 0, 1, 3])
IDS = st.lists(st.integers(0, 7), max_size=4, unique=True)
CALL = st.one_of(
    st.tuples(st.just("read"), ROW, st.integers(1, 3)),
    st.tuples(st.just("read"), ROW, st.integers(1, 3)),
    st.tuples(st.just("append"), st.lists(ROW, max_size=4), TAG, TTL),
    st.tuples(st.just("append"), st.lists(ROW, max_size=4), TAG, TTL),
    st.tuples(st.just("write"), IDS, ROW, TAG, TTL),
    st.tuples(st.just("revalue"), IDS, TAG, TTL),
    st.tuples(st.just("remove"), IDS),
    st.tuples(st.just("remove_tag"), st.integers(1, 2)),
    st.tuples(st.just("expire")),
    st.tuples(st.just("freeze"), IDS),
    st.tuples(st.just("unfreeze"), IDS),
)


def table(rows):
    return torch.tensor(rows, dtype=torch.float64).view(-1, WIDTH)


def run(call, bank, loops):
    kind, *rest = call
    if kind == "read":
        query, k = rest[0], min(rest[1], loops.num_rows)
        hit = bank.read(table([query]), k)
        expected = loops.read(query, k)
        assert hit.ids.tolist() == [expected]
        found = [row for row in expected if row >= 0]
        assert hit.rows[0, : len(found)].tolist() == [list(loops.rows[row]) for row in found]
        assert hit.values[0, : len(found)].tolist() == [[loops.values[row]] for row in found]
    elif kind == "append":
        keys, tag, ttl = rest
        keys = keys[: loops.num_rows - len(loops.frozen)]
        values = torch.full((len(keys), 1), float(loops.clock), dtype=torch.float64)
        ids = bank.append(table(keys), values, tags=tag, ttl=ttl)
        assert ids.tolist() == loops.append(keys, values[0, 0].item() if keys else 0, tag, ttl)
    elif kind == "write":
        ids, key, tag, ttl = rest
        ids = [row for row in ids if row < loops.num_rows]
        values = torch.full((len(ids), 1), float(loops.clock), dtype=torch.float64)
        bank.write(
            torch.tensor(ids, dtype=torch.int64), table([key] * len(ids)), values, tags=tag, ttl=ttl
        )
        loops.write(ids, key, float(loops.clock), tag, ttl)
    elif kind == "revalue":
        ids, tag, ttl = rest
        ids = [row for row in ids if loops.stays(row)]
        values = torch.full((len(ids), 1), float(loops.clock), dtype=torch.float64)
        bank.write(torch.tensor(ids, dtype=torch.int64), values=values, tags=tag, ttl=ttl)
        loops.write(ids, None, float(loops.clock), tag, ttl)
    elif kind == "remove":
        ids = [row for row in rest[0] if row < loops.num_rows]
        bank.remove(torch.tensor(ids, dtype=torch.int64))
        loops.remove(ids)
    elif kind == "remove_tag":
        bank.remove(tag=rest[0])
        loops.remove([row for row, tag in loops.tags.items() if tag == rest[0]])
    elif kind == "expire":
        bank.expire()
        loops.remove([])
    elif kind == "freeze":
        ids = [row for row in rest[0] if row in loops.rows]
        bank.freeze(torch.tensor(ids, dtype=torch.int64))
        loops.frozen.update(ids)
    else:
        ids = [row for row in rest[0] if row < loops.num_rows]
        bank.unfreeze(torch.tensor(ids, dtype=torch.int64))
        loops.frozen.difference_update(ids)


def assert_same(bank, loops):
    assert bank.stats()["num_live"] == len(loops.rows)  # first: a shard lets rows go when asked
    book, keys = whole(bank)
    assert book.live.nonzero().flatten().tolist() == sorted(loops.rows)
    assert book.frozen.nonzero().flatten().tolist() == sorted(loops.frozen)
    assert bank.stats()["num_frozen"] == len(loops.frozen)
    assert bank.stats()["clock"] == loops.clock
    for row in loops.rows:
        assert keys[row].tolist() == list(loops.rows[row])
        assert book.last_access[row] == loops.last[row]
        assert book.accesses[row] == loops.count[row]
        assert book.tags[row] == loops.tags.get(row, 0)
        assert book.expiry[row] == loops.expiry.get(row, 0)


BANKS = st.tuples(
    st.integers(1, 8),
    st.sampled_from(["ip", "l2"]),
    st.sampled_from([1, 2, 64]),
    st.sampled_from([1, 2, 1024]),
)
CALLS = st.lists(CALL, max_size=40)


def check_calls(make, sizes, calls):
    num_rows, metric, share, window = sizes
    with mock.patch.object(usage, "SHARE", share), mock.patch.object(usage, "WINDOW", window):
        bank = make(num_rows, WIDTH, 1, metric=metric, dtype=torch.float64)
        loops = Loops(num_rows, metric)
        for call in calls:
            run(call, bank, loops)
            assert_same(bank, loops)


@settings(max_examples=150)
@given(BANKS, CALLS)
def test_equals_dictionaries_and_loops(sizes, calls):
    check_calls(MemoryBank, sizes, calls)


@settings(max_examples=30)
@given(st.sampled_from([1, 3, 4]), BANKS, CALLS)
def test_so_does_a_sharded_bank(num_shards, sizes, calls):
    check_calls(partial(sharded, min(num_shards, sizes[0])), sizes, calls)


@settings(max_examples=40)
@given(st.lists(CALL, max_size=20), st.lists(CALL, max_size=20))
def test_a_copy_goes_on_alone_as_the_bank_would(before, after):
    bank, loops = MemoryBank(8, WIDTH, 1, metric="l2", dtype=torch.float64), Loops(8, "l2")
    for call in before:
        run(call, bank, loops)
    state = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    again, loaded = copy.deepcopy(bank), MemoryBank(8, WIDTH, 1, metric="l2", dtype=torch.float64)
    loaded.load_state_dict(state)
    loops_again, loops_loaded = copy.deepcopy(loops), copy.deepcopy(loops)
    for call in after:
        run(call, again, loops_again)
        run(call, loaded, loops_loaded)
    assert_same(bank, loops)
    assert_same(again, loops_again)
    assert_same(loaded, loops_loaded)

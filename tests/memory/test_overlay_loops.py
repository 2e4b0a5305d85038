"""An episode over a bank against loops and dictionaries, while the bank changes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from tests.memory.over_bank import F64, bank_of, found_slots, ids, read_slots, write_slot


class Loops:
    """One episode over a bank, in dictionaries, ranked by sorting all slots."""

    def __init__(self, bank):
        self.bank, self.own, self.accessed, self.time = bank, {}, {}, 0

    def row(self, slot):
        if slot not in self.own:
            live = bool(self.bank.table.live[slot])
            self.own[slot] = self.bank.keys.detach()[slot] * live
        return self.own[slot]

    def peek(self, slot):
        fresh = slot not in self.own
        row = self.row(slot)
        if fresh:
            del self.own[slot]
        return row

    def search(self, query, k):
        scores = []
        for slot in range(self.bank.num_rows):
            row = self.peek(slot)
            norms = (query.dot(query) + 1e-6).sqrt() * (row.dot(row) + 1e-6).sqrt()
            scores.append((-round(float(query.dot(row) / norms) * 2**28), slot))
        found = [slot for _, slot in sorted(scores)[:k]]
        for slot in found:
            self.row(slot)
        return found

    def least_recent(self, count):
        def rank(slot):
            never = -1 if self.bank.table.live[slot] else -2
            return self.accessed.get(slot, never), slot

        return sorted(range(self.bank.num_rows), key=rank)[:count]


N, WIDTH = 12, 2
ROWS = st.sampled_from([(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.0, -2.0), (1.0, 1.0), (-1.0, 3.0)])
OPERATIONS = st.one_of(
    st.tuples(st.just("search"), ROWS, st.integers(1, N)),
    st.tuples(st.just("write"), ROWS, st.integers(0, N - 1), st.booleans()),
    st.tuples(st.just("read"), st.integers(0, N - 1)),
    st.tuples(st.just("use"), st.integers(1, 2), ROWS),
    st.tuples(st.just("change"), st.integers(0, N - 1), ROWS),
    st.tuples(st.just("remove"), st.integers(0, N - 1)),
    st.tuples(st.just("fork")),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), ROWS), min_size=N, max_size=N), st.data())
def test_equals_loops_whatever_happens(initial, data):
    """Also while rows of the bank are written and removed."""
    rows = torch.tensor([row for _, row in initial], dtype=F64)
    bank = bank_of(rows, live=[live for live, _ in initial])
    episode, loops, used = Episode.over(bank, 1), Loops(bank), 0
    for operation, *arguments in data.draw(st.lists(OPERATIONS, max_size=20)):
        if operation == "search":
            query, k = torch.tensor(arguments[0], dtype=F64), arguments[1]
            assert found_slots(episode, query, k) == [loops.search(query, k)]
        elif operation == "write":
            word, slot, keep = torch.tensor(arguments[0], dtype=F64), *arguments[1:]
            episode = write_slot(episode, slot, word, keep)
            loops.own[slot] = word + (loops.row(slot) if keep else 0)
        elif operation == "read":
            read, episode = read_slots(episode, arguments[0])
            assert read[0, 0].tolist() == loops.row(arguments[0]).tolist()
        elif operation == "use" and used + arguments[0] <= N:
            count, word = arguments[0], torch.tensor(arguments[1], dtype=F64)
            used += count  # a later lap keeps the order that it began with
            expected = loops.least_recent(count)
            at = episode.least_recent(count)
            assert episode.slots_of(at).tolist() == [expected]
            weights = torch.ones(1, 1, count, dtype=F64)
            episode = episode.write(at.unsqueeze(1), weights, word.view(1, 1, -1), at)
            episode.mark_accessed(Entries(at.unsqueeze(1), weights))
            for slot in expected:
                loops.own[slot], loops.accessed[slot] = word, loops.time
            loops.time += 1
        elif operation == "change":
            bank.write(ids(arguments[0]), torch.tensor([arguments[1]], dtype=F64))
        elif operation == "remove":
            bank.remove(ids(arguments[0]))
        elif operation == "fork":
            episode = episode.clone()
    assert episode.touched.tolist() == [len(loops.own)]
    held = dict(zip(episode.slots[0].tolist(), episode.rows()[0].tolist(), strict=True))
    assert held == {slot: row.tolist() for slot, row in loops.own.items()}

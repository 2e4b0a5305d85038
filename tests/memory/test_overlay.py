"""Episodes over a bank: copy-on-write."""

import pytest
import torch

from sparsemem.bank import MemoryBank
from sparsemem.indexes.base import Found
from sparsemem.memory import overlay, row_tree
from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from sparsemem.memory.overlay import filled
from tests.memory.over_bank import F64, bank_of, found_slots, ids, read_slots, write_slot


def test_rows_are_those_of_the_bank_and_free_slots_hold_zeros():
    bank = bank_of([[1.0, 2], [3, 4], [5, 6], [7, 8]], live=[True, False, True, True])
    bank.remove(ids(3))  # what it held is still in the table
    rows, episode = read_slots(Episode.over(bank, 2), 2, 1, 3, 0)
    assert rows.tolist() == [[[5, 6], [0, 0], [0, 0], [1, 2]]] * 2
    assert episode.slots.tolist() == [[2, 1, 3, 0]] * 2
    assert episode.touched.tolist() == [4, 4]
    assert (episode.num_slots, episode.bank) == (4, bank)


def test_search_ranks_touched_rows_live_rows_and_free_slots():
    bank = bank_of([[1.0, 0], [-1, 0], [9, 9], [1, 0], [1, 1]], live=[1, 1, 0, 1, 1])
    episode = Episode.over(bank, 1)
    assert found_slots(episode, [1.0, 0], 5) == [[0, 3, 4, 2, 1]]
    assert found_slots(episode, [0.0, 0], 3) == [[0, 1, 2]], "ties by slot"
    episode = write_slot(episode, 3, [-1.0, 0])
    episode = write_slot(episode, 1, [1.0, 0])
    assert found_slots(episode, [1.0, 0], 5) == [[0, 1, 4, 2, 3]]
    assert found_slots(Episode.over(bank, 1), [1.0, 0], 5) == [[0, 3, 4, 2, 1]]


def test_no_episode_sees_the_writes_of_another_and_the_bank_none():
    bank = bank_of(torch.randn(6, 3, dtype=F64))
    before = bank.keys.detach().clone()
    episode, other = Episode.over(bank, 3), Episode.over(bank, 3)
    at = episode.positions(ids([4], [4], [2]))
    words = torch.tensor([[[1.0, 0, 0]], [[0, 1, 0]], [[0, 0, 1]]], dtype=F64)
    episode = episode.write(at.unsqueeze(2), torch.ones(3, 1, 1, dtype=F64), words, at)
    rows, _ = read_slots(episode, *range(6))
    expected = before.repeat(3, 1, 1)
    expected[ids(0, 1, 2), ids(4, 4, 2)] = words.squeeze(1)
    assert torch.equal(rows.detach(), expected)
    untouched, _ = read_slots(other, *range(6))
    assert torch.equal(untouched.detach(), before.expand(3, -1, -1))
    assert torch.equal(bank.keys.detach(), before)


def test_a_row_that_an_episode_copies_is_in_use():
    bank = bank_of(torch.eye(6, dtype=F64), live=[1, 1, 1, 1, 0, 0])
    start = bank.book.now
    episode = Episode.over(bank, 2)
    queries = torch.eye(6, dtype=F64)[[1, 3]].unsqueeze(1)
    for _ in range(3):  # copied by the first search
        at = episode.search(queries, 1)
        _, episode = episode.read(at)
    assert bank.book.now == start + 1
    assert bank.book.last_access[:4].gt(start).tolist() == [False, True, False, True]
    before = bank.book.accesses.clone()
    Episode.over(bank, 2).search(queries[[0, 0]], 1)
    assert (bank.book.accesses - before).tolist() == [0, 2, 0, 0, 0, 0]
    assert bank.select(top=2).tolist() == [1, 3]
    bank.append(torch.ones(2, 6, dtype=F64))
    assert sorted(bank.append(torch.ones(2, 6, dtype=F64)).tolist()) == [0, 2], "least used"


def test_what_is_overwritten_at_once_is_not_in_use():
    bank = bank_of(torch.eye(3, dtype=F64), live=[1, 1, 0])
    episode, start = Episode.over(bank, 1), bank.book.now
    at = episode.least_recent(2)  # the free one, and row 0
    words = torch.ones(1, 1, 3, dtype=F64)
    episode.write(at.unsqueeze(1), torch.ones(1, 1, 2, dtype=F64), words, at)
    assert bank.book.now == start
    assert not bank.book.last_access[:2].gt(start).any()


def test_no_episode_finds_a_row_whose_time_is_over():
    bank = bank_of(torch.eye(3, dtype=F64), live=[1, 1, 0])
    bank.write(ids(1), ttl=1)
    live = []
    for _ in range(2):
        Episode.over(bank, 1).search(torch.eye(3, dtype=F64)[:1].unsqueeze(0), 1)
        live.append(bool(bank.book.live[1]))
    assert live == [True, False], "there for one call after the write"


def test_least_recent_takes_free_slots_then_live_ones_then_those_accessed_longest_ago():
    bank = bank_of(torch.randn(5, 2, dtype=F64), live=[1, 0, 1, 1, 0])
    episode, seen = Episode.over(bank, 1), []
    for _ in range(8):
        at = episode.least_recent(1)
        seen.append(int(episode.slots_of(at)))
        episode.mark_accessed(Entries(at.unsqueeze(1), torch.ones(1, 1, 1)))
    assert seen == [1, 4, 0, 2, 3, 1, 4, 0]


def test_a_change_of_the_bank_is_seen_in_untouched_rows_only():
    bank = bank_of([[1.0, 0], [2, 0], [3, 0], [4, 0]])
    rows, episode = read_slots(Episode.over(bank, 1), 1)
    with torch.no_grad(), bank.table.lock.write():  # as an optimiser does
        bank.keys.data[ids(1, 2)] = 7.0
        bank.changed(ids(1, 2))
    bank.remove(ids(3))
    rows, episode = read_slots(episode, 1, 2, 3)
    assert rows.tolist() == [[[2, 0], [7, 7], [0, 0]]]
    assert found_slots(episode, [1.0, 1], 4) == [[2, 1, 0, 3]]
    assert found_slots(episode, [-1.0, 0], 1) == [[3]], "what was removed holds zeros"
    bank.write(ids(3), ids([-1, 0]).double())
    assert found_slots(Episode.over(bank, 1), [-1.0, 0], 1) == [[3]]
    assert found_slots(episode, [-1.0, 1], 1) == [[2]], "touched before it was written"


def test_a_row_that_leaves_the_bank_is_a_free_slot_from_then_on():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    episode = Episode.over(bank, 1)
    first = episode.least_recent(1)
    assert episode.slots_of(first).tolist() == [[0]]
    episode.mark_accessed(Entries(first.unsqueeze(1), torch.ones(1, 1, 1)))
    bank.remove(ids(2))
    assert episode.slots_of(episode.least_recent(3)).tolist() == [[2, 1, 3]]


def test_forks_are_independent():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    trunk = write_slot(Episode.over(bank, 1), 3, [5.0, 5])
    fork = trunk.clone()
    fork = write_slot(fork, 0, [7.0, 7])
    trunk = write_slot(trunk, 1, [8.0, 8])
    assert read_slots(fork, 0, 1, 2, 3)[0].tolist() == [[[7, 7], [1, 1], [1, 1], [5, 5]]]
    assert read_slots(trunk, 0, 1, 2, 3)[0].tolist() == [[[1, 1], [8, 8], [1, 1], [5, 5]]]


def test_a_million_rows_take_memory_for_those_touched():
    bank = MemoryBank(2**20, 8, initial="normal")
    episode = Episode.over(bank, 8)
    queries = torch.randn(8, 2, 8)
    positions = episode.search(queries, 4)
    similar = (
        torch.nn.functional.normalize(queries, dim=-1)
        @ torch.nn.functional.normalize(bank.keys.detach(), dim=-1).mT
    )
    assert torch.equal(episode.slots_of(positions), similar.topk(4).indices)
    rows, episode = episode.read(positions)
    assert torch.equal(rows, bank.keys.detach()[episode.slots_of(positions)])
    assert episode.slots_of(episode.least_recent(3)).tolist() == [[0, 1, 2]] * 8, "a full bank"
    store = episode._store
    parts = [*vars(store).values(), *vars(store.slots).values(), *vars(store.order).values()]
    assert sum(part.nbytes for part in parts if isinstance(part, torch.Tensor)) < 100_000
    assert episode.touched.max() <= 11
    rows.sum().backward()
    assert bank.keys.grad._indices().shape[1] == 8 * 2 * 4


def test_a_search_asks_the_index_deeper_where_what_it_finds_was_overwritten():
    rows = torch.zeros(200, 2, dtype=F64)
    rows[:, 0] = 1
    rows[:, 1] = torch.linspace(0, 1, 200)
    bank = bank_of(rows)
    episode = Episode.over(bank, 1)
    at = episode.positions(torch.arange(100)[None])
    words = torch.tensor([[[-1.0, 0]]], dtype=F64)
    episode = episode.write(at[None], torch.ones(1, 1, 100, dtype=F64), words, at)
    assert found_slots(episode, [1.0, 0], 3) == [[100, 101, 102]]


def test_what_the_episode_knows_spares_deeper_questions(monkeypatch):
    bank, asked = bank_of(torch.randn(500, 4, dtype=F64)), []
    search = bank.index.search
    monkeypatch.setattr(bank.index, "search", lambda q, k: asked.append(k) or search(q, k))
    episode = Episode.over(bank, 1)
    query = torch.randn(1, 1, 4, dtype=F64)
    episode.search(query, 40)
    episode.search(query, 40)
    assert asked == [40 + overlay.SPARE] * 2, "rows unchanged rank as they do in the bank"


def test_equal_rows_and_their_multiples_are_ranked_by_slot():
    """In float32, whose grid is coarser than the cosine's epsilon."""
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(3, generator=generator)
    bank = MemoryBank(60, 3)
    bank.write(torch.arange(60), row * (torch.rand(60, 1, generator=generator) + 0.5))
    episode = Episode.over(bank, 1)
    queries = row.view(1, 1, 3)
    assert episode.slots_of(episode.search(queries, 4)).tolist() == [[[0, 1, 2, 3]]]
    at = episode.positions(ids([1]))
    episode = episode.write(at.unsqueeze(1), torch.ones(1, 1, 1), -queries, at)
    assert episode.slots_of(episode.search(queries, 6)).tolist() == [[[0, 2, 3, 4, 5, 6]]]


def test_of_equal_rows_those_that_the_index_did_not_return_come_first_too():
    bank = bank_of(torch.ones(100, 2))
    _, episode = read_slots(Episode.over(bank, 1), 50, 60)
    for slot in range(2 + overlay.SPARE):  # all that the index returns at first
        episode = write_slot(episode, slot, [-1.0, 0])
    assert found_slots(episode, [1.0, 1], 2) == [[10, 11]]


def test_where_the_index_finds_too_little_other_slots_take_its_place(monkeypatch):
    bank = bank_of(torch.randn(9, 2, dtype=F64))
    episode = Episode.over(bank, 1)
    none = lambda q, k: Found(q.new_full((len(q), k), -torch.inf), torch.full((len(q), k), -1))  # noqa: E731
    monkeypatch.setattr(bank.index, "search", none)
    assert found_slots(episode, [1.0, 0], 4) == [[0, 1, 2, 3]]
    assert filled(ids([[4, 1, -1, -1], [0, 1, 2, 3]]), 9).tolist() == [[[4, 1, 0, 2], [0, 1, 2, 3]]]


@pytest.mark.parametrize("index", ["IVF8,Flat", "HNSW8"])
def test_any_index_of_the_bank_serves(index):
    pytest.importorskip("faiss")
    rows = torch.randn(400, 8)
    bank = MemoryBank(400, 8, index=index)
    bank.write(torch.arange(400), rows)
    episode = Episode.over(bank, 2)
    queries = rows[[3, 77]].unsqueeze(1)
    found = episode.slots_of(episode.search(queries, 4)).squeeze(1)
    assert all(len(set(row)) == 4 for row in found.tolist())
    assert found[:, 0].tolist() == [3, 77], "a row is its own nearest"
    at = episode.positions(ids([3], [3]))
    episode = episode.write(at.unsqueeze(2), torch.ones(2, 1, 1), -queries, at)
    assert episode.slots_of(episode.search(queries, 1)).flatten().tolist()[1] == 77
    assert int(episode.slots_of(episode.search(queries, 1))[0]) != 3
    bank.close()


def test_a_long_episode_with_an_index_of_its_own_finds_the_same(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(row_tree, "NODE_SIZE", 16)
    monkeypatch.setattr(row_tree, "PROBED_LISTS", 1_000)
    generator = torch.Generator().manual_seed(2)
    bank = MemoryBank(600, 4)
    bank.write(torch.arange(0, 600, 2), torch.randn(300, 4, generator=generator))
    pair = [Episode.over(bank, 2, index_after=limit) for limit in (40, None)]
    for step in range(120):
        query = torch.randn(2, 1, 4, generator=generator)
        query[1] = 1 if step % 3 else query[1]  # the second episode touches less
        found = [episode.search(query, 3) for episode in pair]
        assert torch.equal(*found)
        at = found[0].squeeze(1)[:, :2]
        for which, episode in enumerate(pair):
            pair[which] = episode.write(at.unsqueeze(1), torch.ones(2, 1, 2), query, at[:, :1])
    assert pair[0].touched[1] < pair[0].touched[0]
    assert pair[0]._store.trees.entered.max() >= 40
    queries = torch.randn(2, 20, 4, generator=generator)
    assert torch.equal(pair[0].search(queries, 7), pair[1].search(queries, 7))


class TestRefusals:
    def test_banks_that_cannot_lie_under_an_episode(self, plain_errors):
        with pytest.raises(ValueError, match="bank has value_width 3, expected None"):
            Episode.over(MemoryBank(4, 2, value_width=3), 1)
        with pytest.raises(ValueError, match="bank has metric 'l2', expected 'cosine'"):
            Episode.over(MemoryBank(4, 2, metric="l2"), 1)
        with pytest.raises(TypeError, match="bank is a Tensor, expected a MemoryBank"):
            Episode.over(torch.zeros(4, 2), 1)
        with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
            Episode.over(MemoryBank(4, 2), 0)

    def test_positions_that_were_not_given_out(self):
        episode = Episode.over(bank_of(torch.ones(9, 2, dtype=F64)), 2)
        episode.positions(ids([3], [4]))
        message = r"ids holds position 1 in episode 1, expected 0 \.\. 0: positions that search"
        with pytest.raises(ValueError, match=message):
            episode.read(ids([[0]], [[1]]))
        one = torch.ones(2, 1, 1, dtype=F64)
        with pytest.raises(ValueError, match=r"erase holds position -1 in episode 0"):
            episode.write(ids([[0]], [[0]]), one, one.expand(2, 1, 2), ids([-1], [0]))
        assert episode.rows().tolist() == [[[1, 1]]] * 2

    def test_slots_that_there_are_not(self):
        episode = Episode.over(bank_of(torch.ones(9, 2, dtype=F64)), 2)
        for bad in (-1, 9):
            with pytest.raises(ValueError, match=rf"slots holds slot {bad}, expected 0 \.\. 8"):
                episode.positions(ids([0], [bad]))
        with pytest.raises(ValueError, match="slots has batch size 1, the memory has 2 episodes"):
            episode.positions(ids([0]))
        with pytest.raises(ValueError, match="k is 10, expected at most num_slots = 9"):
            episode.search(torch.ones(2, 1, 2, dtype=F64), 10)
        assert episode.touched.tolist() == [0, 0]

    def test_moving_away_from_the_bank(self):
        episode = write_slot(Episode.over(bank_of(torch.ones(3, 2, dtype=F64)), 1), 1, [2.0, 2])
        message = r"over a bank of torch\.float64 on cpu cannot go to torch\.float32 on cpu"
        with pytest.raises(TypeError, match=message):
            episode.to(torch.float32)
        copy = episode.to("cpu")
        assert read_slots(copy, 0, 1)[0].tolist() == [[[1, 1], [2, 2]]]
        assert read_slots(episode, 0, 1)[0].tolist() == [[[1, 1], [2, 2]]]

    def test_an_advanced_handle(self):
        first = Episode.over(bank_of(torch.ones(3, 2, dtype=F64)), 1)
        write_slot(first, 0, [1.0, 1])
        with pytest.raises(RuntimeError, match=r"already advanced .*state\.clone\(\) forks it"):
            first.positions(ids([0]))


def test_a_constant_base_has_the_same_vocabulary():
    episode = Episode.start(2, 8, 2, dtype=F64)
    assert episode.positions(ids([5], [1])).tolist() == [[5], [1]]
    assert episode.touched.tolist() == [0, 0]
    _, episode = episode.read(ids([[2]], [[0]]))
    assert episode.slots.tolist() == [[0, 1, 2], [0, -1, -1]]
    assert episode.slots_of(ids([[7]], [[3]])).tolist() == [[[7]], [[3]]]
    assert (episode.bank, episode.slot_table) == (None, None)

"""Episodes over a bank: copy-on-write, one by one against loops and dictionaries."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.bank import MemoryBank
from sparsemem.indexes import sealed as sealed_module
from sparsemem.indexes.base import Found
from sparsemem.memory import overlay
from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from sparsemem.memory.overlay import filled

F64 = torch.float64


def ids(*values):
    return torch.tensor(values)


def bank_of(rows, live=None, **options):
    """A bank with rows [N, W] where live (everywhere)."""
    rows = torch.as_tensor(rows, dtype=F64)
    bank = MemoryBank(*rows.shape, dtype=F64, **options)
    taken = torch.arange(len(rows)) if live is None else torch.as_tensor(live).nonzero().flatten()
    bank.write(taken, rows[taken])
    return bank


def write_slot(episode, slot, word, keep=False):
    """Every episode sets (or adds to) row `slot`."""
    at = episode.positions(torch.full((episode.batch_size, 1), slot))
    words = torch.as_tensor(word, dtype=F64).expand(episode.batch_size, 1, -1)
    erase = at[:, :0] if keep else at
    return episode.write(at.unsqueeze(2), torch.ones_like(at[..., None], dtype=F64), words, erase)


def read_slots(episode, *slots):
    """Rows [B, S, W] of slots, and the next handle."""
    at = episode.positions(torch.tensor(slots).expand(episode.batch_size, -1))
    rows, episode = episode.read(at.unsqueeze(1))
    return rows.squeeze(1), episode


def found_slots(episode, query, k):
    query = torch.as_tensor(query, dtype=F64).expand(episode.batch_size, 1, -1)
    return episode.slots_of(episode.search(query, k)).squeeze(1).tolist()


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
    assert bank.stats()["clock"] == 1, "no access either"


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


def test_what_is_read_gives_gradients_to_the_bank_until_it_is_overwritten():
    bank = bank_of([[1.0, 2], [3, 4], [5, 6]], live=[1, 1, 0])
    word = torch.ones(2, dtype=F64, requires_grad=True)
    before, episode = read_slots(Episode.over(bank, 2), 0, 1, 2)
    episode = write_slot(episode, 1, word)  # in the place of row 1
    episode = write_slot(episode, 0, word, keep=True)
    after, episode = read_slots(episode, 0, 1, 2)
    (before.sum() + 10 * after.sum()).backward()
    assert bank.keys.grad.is_sparse
    # Twice, for two episodes; row 1 as it was before it was erased; a free slot is no row.
    assert bank.keys.grad.to_dense().tolist() == [[22, 22], [2, 2], [0, 0]]
    assert sorted(bank.keys.grad.coalesce().indices()[0].tolist()) == [0, 1]
    assert word.grad.tolist() == [40, 40]


def test_slots_that_are_written_without_being_read_are_no_rows_of_the_gradient():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    episode = Episode.over(bank, 1)
    at = episode.least_recent(2)
    words = torch.ones(1, 1, 2, dtype=F64, requires_grad=True)
    episode = episode.write(at.unsqueeze(1), torch.ones(1, 1, 2, dtype=F64), words, at)
    rows, _ = episode.read(at.unsqueeze(1))
    rows.sum().backward()
    assert words.grad.tolist() == [[[2, 2]]]
    assert bank.keys.grad.coalesce().indices().numel() == 0


def test_frozen_rows_and_rows_written_anew_take_no_gradient():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    rows, episode = read_slots(Episode.over(bank, 1), 0, 1, 2, 3)
    bank.freeze(ids(0))
    bank.write(ids(1), torch.ones(1, 2, dtype=F64))
    bank.remove(ids(2))
    rows.sum().backward()
    assert bank.keys.grad.to_dense().tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    bank.keys.grad = None
    rows, _ = read_slots(episode.detach(), 1)
    (rows.sum() + 0 * bank.keys.sum()).backward()
    assert not bank.keys.grad.any(), "what the episode holds is not the row of today"


def test_a_bank_that_is_not_trained_costs_no_gradient():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    bank.requires_grad_(False)
    rows, episode = read_slots(Episode.over(bank, 1), 0)
    assert not rows.requires_grad
    word = torch.ones(2, dtype=F64, requires_grad=True)
    rows, _ = read_slots(write_slot(episode, 1, word, keep=True), 0, 1)
    rows.sum().backward()
    assert word.grad.tolist() == [1, 1]
    assert bank.keys.grad is None


def test_detach_cuts_the_gradient_of_rows_touched_before():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    _, episode = read_slots(Episode.over(bank, 1), 0)
    rows, _ = read_slots(episode.detach(), 0, 1)
    rows.sum().backward()
    assert bank.keys.grad.to_dense().tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_steps_without_gradients_cut_it_as_detach_does():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    with torch.no_grad():
        rows, episode = read_slots(Episode.over(bank, 1), 0)
        assert not rows.requires_grad
    rows, _ = read_slots(episode, 0, 1)
    rows.sum().backward()
    assert bank.keys.grad.to_dense().tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


def test_rows_found_before_the_first_read_take_gradients():
    bank = bank_of([[1.0, 0], [0, 1]])
    episode = Episode.over(bank, 1)
    at = episode.search(torch.tensor([[[1.0, 0]]], dtype=F64), 1)
    rows, _ = episode.clone().read(at)
    rows.sum().backward()
    assert bank.keys.grad.to_dense().tolist() == [[1, 1], [0, 0]]


def test_both_sides_of_a_fork_give_gradients_to_the_bank():
    bank = bank_of(torch.ones(5, 2, dtype=F64))
    word = torch.ones(2, dtype=F64, requires_grad=True)
    _, trunk = read_slots(Episode.over(bank, 2), 0)
    trunk = write_slot(trunk, 0, word, keep=True)
    fork = trunk.clone()
    second = fork.clone()
    # The same position is slot 1 in the trunk, slot 2 in the fork and slot 3 in the fork's fork.
    losses = [
        read_slots(episode, slot, 0)[0].sum()
        for episode, slot in ((trunk, 1), (fork, 2), (second, 3))
    ]
    (losses[0] + 10 * losses[1] + 100 * losses[2]).backward()
    assert bank.keys.grad.to_dense()[:, 0].tolist() == [222, 2, 20, 200, 0]
    assert word.grad.tolist() == [222, 222]


def test_a_fork_made_without_gradients_is_cut():
    bank = bank_of(torch.ones(3, 2, dtype=F64))
    word = torch.ones(2, dtype=F64, requires_grad=True)
    trunk = write_slot(Episode.over(bank, 1), 0, word, keep=True)
    with torch.no_grad():
        fork = trunk.clone()
    rows, _ = read_slots(fork, 0, 1)
    rows.sum().backward()
    assert word.grad is None
    assert bank.keys.grad.to_dense().tolist() == [[0, 0], [1, 1], [0, 0]]


def test_forks_are_independent():
    bank = bank_of(torch.ones(4, 2, dtype=F64))
    trunk = write_slot(Episode.over(bank, 1), 3, [5.0, 5])
    fork = trunk.clone()
    fork = write_slot(fork, 0, [7.0, 7])
    trunk = write_slot(trunk, 1, [8.0, 8])
    assert read_slots(fork, 0, 1, 2, 3)[0].tolist() == [[[7, 7], [1, 1], [1, 1], [5, 5]]]
    assert read_slots(trunk, 0, 1, 2, 3)[0].tolist() == [[[1, 1], [8, 8], [1, 1], [5, 5]]]


def test_a_second_backward_pass_and_an_unfinished_one_leave_nothing_behind():
    bank = bank_of(torch.ones(3, 2, dtype=F64))
    word = torch.ones(2, dtype=F64, requires_grad=True)
    rows, _ = read_slots(write_slot(Episode.over(bank, 1), 1, word, keep=True), 0, 1)
    inputs = [word, bank.keys]
    for wanted in (inputs, inputs[:1], inputs[1:], inputs):
        gradients = torch.autograd.grad(rows.square().sum(), wanted, retain_graph=True)
        for of, gradient in zip(wanted, gradients, strict=True):
            expected = [4, 4] if of is word else [[2, 2], [4, 4], [0, 0]]
            assert (gradient.to_dense() if gradient.is_sparse else gradient).tolist() == expected


def test_nothing_keeps_a_finished_episode_alive():
    bank = bank_of(torch.ones(3, 2, dtype=F64))
    gc.disable()
    try:
        rows, episode = read_slots(Episode.over(bank, 1), 0)
        other, fork = read_slots(episode.clone(), 1)
        (rows + other).sum().backward()
        stores = [weakref.ref(handle._store) for handle in (episode, fork)]
        del episode, fork, rows, other
        assert [store() for store in stores] == [None, None]
    finally:
        gc.enable()


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
    pytest.importorskip("faiss")
    monkeypatch.setattr(sealed_module, "PROBED_LISTS", 10_000)
    monkeypatch.setattr(sealed_module, "TAIL", 16)
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
    assert pair[0]._store.sealed.sealed >= 40
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

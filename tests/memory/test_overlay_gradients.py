"""Gradients through episodes over a bank, to its rows."""

import gc
import weakref

import torch

from sparsemem.memory.episode import Episode
from tests.memory.over_bank import F64, bank_of, ids, read_slots, write_slot


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


def test_a_position_means_another_slot_in_a_fork_of_an_episode_that_has_touched_less():
    bank = bank_of(torch.ones(5, 2, dtype=F64))
    trunk = Episode.over(bank, 2)
    at = trunk.positions(ids([0, 1], [0, 0]))  # one slot more in the first episode
    _, trunk = trunk.read(at.unsqueeze(1))
    fork = trunk.clone()
    losses = [read_slots(episode, slot)[0][1].sum() for episode, slot in ((trunk, 2), (fork, 3))]
    (losses[0] + 10 * losses[1]).backward()
    assert bank.keys.grad.to_dense()[:, 0].tolist() == [0, 0, 1, 10, 0]


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

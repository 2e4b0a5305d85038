import math
from functools import partial
from unittest import mock

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.bank import selection
from sparsemem.bank.selection import PIECES, Tally, tf_idf
from tests.oracles.sharded import sharded, whole


def one_hot(*places):
    """Queries that find exactly these rows of a bank of unit rows."""
    return torch.eye(6)[list(places)]


@pytest.fixture(params=[0, 1, 3, 4], ids=["one", "1 shard", "3 shards", "4 shards"])
def bank(request):
    make = partial(sharded, request.param) if request.param else MemoryBank
    bank = make(8, 6, metric="ip")
    bank.append(torch.eye(6))
    return bank


def gradient_rows(bank, loss):
    bank.keys.grad = None
    loss.backward()
    return bank.keys.grad.coalesce().indices().flatten().tolist()


def test_tf_idf_is_the_papers():
    scores = tf_idf(torch.tensor([3, 1]), 8, 4, torch.tensor([0, 4]))
    expected = [3 / 8 * math.log(5 / 1), 1 / 8 * math.log(5 / 5)]
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("steps", [0, 1, 2, 40])
def test_tally_counts_as_a_dictionary_does(steps):
    with mock.patch.object(selection, "PENDING", 3):
        tally, counts = Tally(8), {}
        assert tally.counts() is None
        for step in range(steps):
            ids = [step % 7, (step * step) % 5, step % 7][: step % 4]
            tally.add(torch.tensor(ids, dtype=torch.int64))
            for row in ids:
                counts[row] = counts.get(row, 0) + 1
            assert sum(map(len, tally._pending)) <= 3
            seen = tally.counts()
            assert dict(zip(*(part.tolist() for part in seen), strict=True)) == counts


def test_rows_that_the_batch_uses_and_the_background_does_not(bank):
    for _ in range(9):
        with bank.background():
            bank.read(one_hot(0, 0, 1), 1)
    with bank.background():
        bank.read(one_hot(2), 1)
    assert whole(bank)[0].background.tolist() == [9, 9, 1, 0, 0, 0, 0, 0]
    # Ten times as many accesses of row 0 do not make up for its use in nine batches of ten.
    bank.read(one_hot(*[0] * 10, 2, 2, 3), 1)
    scores = {
        0: 10 / 13 * math.log(11 / 10),
        2: 2 / 13 * math.log(11 / 2),
        3: 1 / 13 * math.log(11 / 1),
    }
    order = sorted(scores, key=scores.get, reverse=True)
    assert bank.select(top=2).tolist() == sorted(order[:2]) == [2, 3]
    assert bank.is_trainable(torch.tensor([0, 1, 2, 3, -1])).tolist() == [False] * 2 + [
        True
    ] * 2 + [False]


def test_backward_passes_of_earlier_reads_respect_it(bank):
    loss = bank.read(one_hot(0, 1, 1, 2), 1).rows.sum()
    assert bank.select(top=1).tolist() == [1]
    assert gradient_rows(bank, loss) == [1]
    everything = bank.read(one_hot(0, 1, 2), 1).rows.sum()
    assert bank.select(None) is None
    assert gradient_rows(bank, everything) == [0, 1, 2]


def test_a_selection_ends_the_batch_and_replaces_the_one_before(bank):
    bank.read(one_hot(0, 0, 1), 1)
    assert bank.select(top=1).tolist() == [0]
    bank.read(one_hot(3, 4), 1)
    assert bank.select(top=5).tolist() == [3, 4]  # no more were read
    assert bank.is_trainable(torch.arange(6)).tolist() == [False] * 3 + [True] * 2 + [False]
    assert bank.select(top=5).tolist() == []
    assert not bank.is_trainable(torch.arange(6)).any()


def test_ties_go_to_lower_ids_and_only_to_rows_that_can_be_trained(bank):
    bank.read(one_hot(5, 4, 3, 2), 1)
    bank.freeze(torch.tensor([2]))
    bank.remove(torch.tensor([3]))
    assert bank.select(top=1).tolist() == [4]


def test_a_row_that_replaces_a_selected_one_is_not_selected(bank):
    bank.read(one_hot(0, 1), 1)
    bank.select(top=2)
    bank.remove(torch.tensor([0]))
    bank.write(torch.tensor([0]), torch.ones(1, 6))
    assert bank.is_trainable(torch.arange(2)).tolist() == [False, True]


def test_a_background_batch_that_fails_does_not_count(bank):
    def failing():
        with bank.background():
            bank.read(one_hot(0), 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not whole(bank)[0].background.any()
    assert whole(bank)[0].batches == 0
    bank.read(one_hot(1), 1)
    assert bank.select(top=3).tolist() == [1]
    with bank.background(), pytest.raises(RuntimeError, match="open already"), bank.background():
        pass


def test_background_counts_are_saved_with_the_bank():
    bank = MemoryBank(8, 6, metric="ip")
    bank.append(torch.eye(6))
    with bank.background():
        bank.read(one_hot(0), 1)
    other = MemoryBank(8, 6, metric="ip")
    other.load_state_dict(bank.state_dict())
    other.read(one_hot(0, 1), 1)
    assert other.select(top=1).tolist() == [1]


@pytest.mark.usefixtures("plain_errors")
def test_arguments(bank):
    with pytest.raises(ValueError, match="policy is 'tfidf', did you mean 'tf-idf'"):
        bank.select("tfidf", top=1)
    with pytest.raises(ValueError, match="top is None, expected the number of rows"):
        bank.select()
    with pytest.raises(ValueError, match="top is 0, expected at least 1"):
        bank.select(top=0)


def test_many_small_reads_are_kept_in_few_tensors():
    tally = Tally(10**6)
    for number in range(3 * PIECES):
        tally.add(torch.tensor([number % 7]))
    assert len(tally._pending) <= PIECES
    ids, counts = tally.counts()
    assert ids.tolist() == list(range(7))
    assert int(counts.sum()) == 3 * PIECES

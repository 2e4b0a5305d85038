"""Reads that go ahead of updates: by how much, what waits for all, and how errors come out."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparsemem.bank.errors import BankError
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.server import ShardServer
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowAdam, RowSGD, clip_grad_norm
from tests.oracles.failing_disk import ENOSPC, fail_at
from tests.oracles.shard_states import same_state, state_of
from tests.oracles.sharded import rows_of_tables

ROWS, WIDTH, SHARDS = 24, 4, 3

pytestmark = pytest.mark.usefixtures("plain_errors")  # in a quarter of the time


class Later:
    """Calls that arrive when they are waited for, and no sooner."""

    def __init__(self, shards, calls):
        self.shards, self.calls = shards, calls

    def is_done(self):
        return False

    def collect(self, outcomes):
        self.shards._exchange(self.calls, outcomes)


class Delayed(LocalShards):
    """Shards that are late by as much as they may be."""

    def _start(self, calls):
        return Later(self, calls)


def rows_of(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def new_bank(path, staleness, kind=Delayed):
    ShardedBank.create(path, ROWS, WIDTH, num_shards=SHARDS)
    bank = ShardedBank(path, kind(path), staleness=staleness)
    bank.append(rows_of(ROWS - 2))
    return bank


def loss_of(bank, step):
    hit = bank.read(rows_of(5, 100 + step), 4)
    return (hit.scores.softmax(-1).unsqueeze(-1) * hit.rows).sum(-2).sin().sum()


def train(bank, steps):
    """Losses of steps, each of the optimiser."""
    optimiser = RowAdam([bank.keys], lr=0.05)
    losses = []
    for step in steps:
        optimiser.zero_grad()
        loss = loss_of(bank, step)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("staleness", [1, 3])
def test_reads_miss_as_many_steps_as_they_may_and_no_more(tmp_path, staleness):
    bank = new_bank(tmp_path / "bank", staleness)
    oracle = new_bank(tmp_path / "oracle", 0)
    optimiser, late, expected = RowAdam([oracle.keys], lr=0.05), [], []

    def apply(gradient):
        oracle.keys.grad = gradient
        optimiser.step()

    for step in range(15):
        if len(late) > staleness:
            apply(late.pop(0))
        oracle.keys.grad = None
        loss = loss_of(oracle, step)
        loss.backward()
        late.append(oracle.keys.grad)
        expected.append(loss.item())
    assert train(bank, range(15)) == expected
    assert bank.shards.under_way == staleness + 1
    for gradient in late:
        apply(gradient)
    bank.stats()
    assert torch.equal(*(rows_of_tables(each)[0] for each in (bank, oracle)))


def test_shards_that_are_quick_are_seen_to_be(tmp_path):
    losses = [
        train(new_bank(tmp_path / str(staleness), staleness, LocalShards), range(8))
        for staleness in (0, 3)
    ]
    assert losses[0] == losses[1]


WAITING = {
    "save": lambda bank: bank.save(),
    "write": lambda bank: bank.write(torch.tensor([0]), rows_of(1)),
    "append": lambda bank: bank.append(rows_of(1)),
    "remove": lambda bank: bank.remove(torch.tensor([0])),
    "freeze": lambda bank: bank.freeze(torch.tensor([0])),
    "expire": lambda bank: bank.expire(),
    "select": lambda bank: bank.select(top=3),
    "tags_of": lambda bank: bank.tags_of(torch.tensor([0])),
    "stats": lambda bank: bank.stats(),
}


@pytest.mark.parametrize("what", WAITING)
def test_all_else_waits_for_every_update(tmp_path, what):
    bank = new_bank(tmp_path / "bank", 4)
    before = rows_of_tables(bank)[0].clone()
    train(bank, range(3))
    assert torch.equal(rows_of_tables(bank)[0], before)
    assert bank.shards.under_way == 3
    WAITING[what](bank)
    assert bank.shards.under_way == 0
    steps = [home.server.optimiser("RowAdam of keys").state for home in bank.shards.homes]
    assert all(steps)


def test_going_back_leaves_no_update_that_could_still_arrive(tmp_path):
    bank = new_bank(tmp_path / "bank", 4)
    train(bank, range(3))
    bank.save()
    saved = state_of(bank)
    train(bank, range(3, 6))
    assert bank.shards.under_way == 3
    bank.restore()
    assert bank.shards.under_way == 0
    bank.stats()
    same_state(state_of(bank), saved)


def test_a_refused_update_is_told_once_by_a_later_call(tmp_path, monkeypatch):
    bank = new_bank(tmp_path / "bank", 2, LocalShards)

    def refuse(*_):
        raise ValueError("no such step")

    with monkeypatch.context() as patch:
        patch.setattr(ShardServer, "_step_table", refuse)
        train(bank, [0])
    with pytest.raises(ValueError, match="no such step"):
        bank.read(rows_of(1), 2)
    bank.read(rows_of(1), 2)
    train(bank, range(3))
    bank.stats()


def test_an_update_that_is_cut_short_is_made_good(tmp_path, monkeypatch):
    states = []
    for name in ("plain", "unlucky"):
        bank = new_bank(tmp_path / name, 2, LocalShards)
        train(bank, range(2))
        with monkeypatch.context() as patch:
            if name == "unlucky":
                fail_at(patch, os, "write", 1, ENOSPC)
            train(bank, [2])
        if name == "unlucky":
            with pytest.raises(BankError, match="No space left"):
                bank.read(rows_of(5, 103), 4)
        train(bank, range(3, 6))
        bank.stats()
        # The read that was told of it has used a time of the clock.
        states.append({k: v for k, v in state_of(bank).items() if "last_access" not in k})
    same_state(*states)


def test_a_worker_goes_ahead_of_the_others_by_so_many_steps(tmp_path):
    bank = new_bank(tmp_path / "bank", 2, LocalShards)
    before = rows_of_tables(bank)[0].clone()
    workers = [bank.as_worker(number, of=2) for number in range(2)]
    assert [worker.staleness for worker in workers] == [2, 2]
    workers[0].shards.timeout = 0.05
    train(workers[0], range(3))
    assert torch.equal(rows_of_tables(bank)[0], before)
    with pytest.raises(ShardError, match="worker 0 has stepped, and the others of 2 have not"):
        workers[0].read(rows_of(1), 2)
    train(workers[1], [0])
    assert not torch.equal(rows_of_tables(bank)[0], before)
    workers[0].read(rows_of(1), 2)
    with pytest.raises(ShardError, match="worker 0 has stepped"):
        workers[0].stats()  # two steps have not happened
    train(workers[1], range(1, 3))
    workers[0].stats()


@pytest.mark.parametrize("kind", [LocalShards, Delayed])
def test_workers_that_clip_and_do_not_wait_step_as_often(tmp_path, kind):
    """What a row gets is its gradients' mean, step by step, whoever was ahead."""
    bank = new_bank(tmp_path / "bank", 2, kind)
    start, ids, steps = rows_of_tables(bank)[0].clone(), torch.tensor([1, 2, 5, 9]), 12

    def work(number):
        client = bank.as_worker(number, of=2)
        optimiser = RowSGD([client.keys], lr=0.5)
        norms = []
        for _ in range(steps):
            optimiser.zero_grad()
            (client.gather(ids).sum() * (1 + 2 * number)).backward()  # 2 in the mean
            norms.append(clip_grad_norm([client.keys], 4.0).item())
            optimiser.step()
        client.stats()
        return norms

    with ThreadPoolExecutor(2) as pool:
        norms = list(pool.map(work, range(2)))
    assert norms == [[8.0] * steps] * 2  # of 16 numbers
    keys = rows_of_tables(bank)[0]
    torch.testing.assert_close(keys[ids], start[ids] - 0.5 * steps, rtol=0, atol=1e-4)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(keys[others], start[others])


@pytest.mark.parametrize(("staleness", "message"), [(-1, "at least 0"), (16, "the most = 15")])
def test_options(tmp_path, staleness, message):
    with pytest.raises(ValueError, match=f"staleness is {staleness}, expected .*{message}"):
        new_bank(tmp_path / "bank", staleness)

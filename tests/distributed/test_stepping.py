"""The norm of several workers' gradients is that of their mean, and steps follow it once."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsemem import MemoryBank
from sparsemem.distributed.errors import ShardError
from sparsemem.optim import RowAdam, RowSGD, clip_grad_norm
from tests.oracles.shard_states import same_state, state_of
from tests.oracles.sharded import rows_of_tables, sharded

ROWS, WIDTH, VALUE_WIDTH, SHARDS, MAX_NORM = 40, 6, 3, 3, 0.02

pytestmark = pytest.mark.usefixtures("plain_errors")  # in a quarter of the time


def rows_of(count, width, seed=0, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def new_bank(make=None, dtype=torch.float64):
    make = make or partial(sharded, SHARDS)
    bank = make(ROWS, WIDTH, VALUE_WIDTH, dtype=dtype)
    bank.append(rows_of(37, WIDTH, dtype=dtype), rows_of(37, VALUE_WIDTH, seed=2, dtype=dtype))
    return bank


class Worker:
    """One of a team, in a thread; dense gradients are averaged as DistributedDataParallel does."""

    def __init__(self, team, number, bank):
        self.team, self.number, self.bank = team, number, bank
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=bank.keys.dtype)
        self.parameters = [*self.layer.parameters(), *bank.tables]
        self.optimiser = RowAdam(self.parameters, lr=0.02)

    def backward(self, step):
        self.optimiser.zero_grad()
        batch = rows_of(8, WIDTH + VALUE_WIDTH, seed=100 + step, dtype=self.bank.keys.dtype)
        query, target = batch.chunk(self.team.size)[self.number].split([WIDTH, VALUE_WIDTH], 1)
        hit = self.bank.read(self.layer(query), 5)
        read = (hit.scores.mul(4).softmax(-1).unsqueeze(-1) * hit.values).sum(-2)
        loss = F.mse_loss(read, target)
        loss.backward()
        self.team.average(self)
        return loss.item()

    def step(self, step, between):
        loss = self.backward(step)
        norm = clip_grad_norm(self.parameters, MAX_NORM)
        between(self, step)
        self.optimiser.step()
        return loss, norm.item()


class Team:
    """Workers over a bank, each in a thread of its own."""

    def __init__(self, bank, size):
        self.size, self.barrier, self.gradients = size, Barrier(size), [None] * size
        clients = [bank] if size == 1 else [bank.as_worker(n, of=size) for n in range(size)]
        self.workers = [Worker(self, number, client) for number, client in enumerate(clients)]

    def average(self, worker):
        own = list(worker.layer.parameters())
        self.gradients[worker.number] = [parameter.grad.clone() for parameter in own]
        self.barrier.wait(30)
        for parameter, *parts in zip(own, *self.gradients, strict=True):
            parameter.grad.copy_(sum(parts) / self.size)
        self.barrier.wait(30)

    def each(self, work):
        """What `work` returns for each worker, all at work at once."""

        def guarded(worker):
            try:
                return work(worker)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, self.workers))

    def train(self, steps, between=lambda worker, step: None):
        """Losses (means of the workers') and norms of steps."""
        found = self.each(lambda worker: [worker.step(step, between) for step in steps])
        losses, norms = torch.tensor(found, dtype=torch.float64).unbind(-1)
        assert (norms == norms[0]).all()  # to the last bit
        return losses.mean(0), norms[0]


@pytest.mark.parametrize(
    ("dtype", "near", "steps"), [(torch.float64, 1e-13, 26), (torch.float32, 1e-6, 16)]
)
def test_two_workers_clip_as_one_process_with_both_batches(dtype, near, steps):
    """Not bit for bit: a row's gradients, and the network's, are added up in two parts."""
    one, two = new_bank(MemoryBank, dtype), new_bank(dtype=dtype)
    start = rows_of_tables(two)[0].clone()
    results = [Team(one, 1).train(range(steps)), Team(two, 2).train(range(steps))]
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near)
    assert (results[0][1] > MAX_NORM).sum() > steps - 10  # it was clipped
    for ours, theirs in zip(rows_of_tables(two), rows_of_tables(one), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near)
    assert (rows_of_tables(two)[0] != start).any(1).sum() > 30


def reopened(bank, shard):
    """A shard's process dies; it comes back at its next call."""
    with bank.shards._lock:
        bank.shards.homes[shard]._let_go()


def test_nothing_changes_where_shards_die_or_are_saved_between_push_and_step():
    plain, unlucky = new_bank(), new_bank()
    expected = Team(plain, 2).train(range(8))

    def between(worker, step):
        if worker.number == step % 2:
            if step in (2, 5):
                unlucky.save()
            reopened(unlucky, step % SHARDS)

    found = Team(unlucky, 2).train(range(8), between)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    one, other = state_of(plain), state_of(unlucky)
    for name in [name for name in one if "access" in name]:  # threads read in any order
        del one[name], other[name]
    same_state(other, one)


def pushed_by_one(bank):
    """Only one of two workers pushes."""
    worker = bank.as_worker(1, of=2)
    worker.shards.timeout = 0.05
    worker.read(rows_of(2, WIDTH), 4).rows.sum().backward()
    with pytest.raises(
        ShardError, match=r"worker 1 has pushed .* others of 2 have not within 0.05"
    ):
        clip_grad_norm(worker.tables, MAX_NORM)


def test_going_back_clears_half_of_a_step():
    plain, bank = new_bank(), new_bank()
    for each in (plain, bank):
        Team(each, 2).train(range(3))
        each.save()
    pushed_by_one(bank)
    bank.save()  # what was pushed is no reason not to
    pushed_by_one(bank)
    bank.restore()
    plain.restore()
    for ours, theirs in zip(*(Team(x, 2).train(range(3, 6)) for x in (bank, plain)), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(rows_of_tables(bank), rows_of_tables(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_one_that_waited_in_vain_pushes_once():
    bank = new_bank()
    workers = Team(bank, 2).workers
    for worker in workers:
        worker.bank.read(rows_of(2, WIDTH, seed=worker.number), 4).rows.sum().backward()
    late = workers[1].bank
    late.shards.timeout = 0.05
    asked, ask = [], late.shards.ask
    late.shards.ask = lambda name, each: asked.append(name) or ask(name, each)
    for _ in range(2):
        with pytest.raises(ShardError, match="worker 1 has pushed"):
            clip_grad_norm(late.tables, MAX_NORM)
    first = clip_grad_norm(workers[0].bank.tables, MAX_NORM)
    assert clip_grad_norm(late.tables, MAX_NORM) == first > MAX_NORM
    assert asked.count("push") == 1
    # Again, of what is scaled by now: as with gradients that are here.
    again = [clip_grad_norm(worker.bank.tables, MAX_NORM / 2) for worker in workers]
    assert again[0] == again[1] == pytest.approx(MAX_NORM, rel=1e-4)
    assert asked.count("push") == 1


def test_the_step_after_a_norm_sends_no_gradient():
    bank = new_bank()
    team = Team(bank, 2)
    sent = {}

    def work(worker):
        traffic = worker.bank.shards.traffic
        for queries in (2, 60):
            worker.bank.read(rows_of(queries, WIDTH), 20).rows.square().sum().backward()
            clip_grad_norm(worker.bank.tables, MAX_NORM)
            before = traffic.sent
            worker.optimiser.step()
            sent[worker.number, queries] = traffic.sent - before
            worker.optimiser.zero_grad()

    team.each(work)
    for number in range(2):
        assert sent[number, 2] == pytest.approx(sent[number, 60], rel=0.1)
    assert max(sent.values()) < SHARDS * 2 * 350


@pytest.mark.parametrize("how", ["a read between", "no step before", "a worker without a gradient"])
def test_workers_that_do_something_else(how):
    """As with gradients that are all here."""
    bank = new_bank()
    before = [table.clone() for table in rows_of_tables(bank)]
    team = Team(bank, 2)
    gradients = torch.zeros(2, ROWS, WIDTH, dtype=torch.float64)

    def work(worker):
        client = worker.bank
        optimiser = RowSGD(client.tables, lr=1.0)
        if how == "no step before":
            client.read(rows_of(9, WIDTH), 9).rows.sum().backward()
            clip_grad_norm(client.tables, MAX_NORM)
            optimiser.zero_grad()
        if how != "a worker without a gradient" or worker.number == 0:
            client.read(rows_of(2, WIDTH, seed=worker.number), 4).rows.sum().backward()
            gradients[worker.number] = client.keys.grad.to_dense()
        norm = clip_grad_norm(client.tables, MAX_NORM)
        if how == "a read between":
            client.read(rows_of(2, WIDTH), 4)
        optimiser.step()
        return norm

    norms = team.each(work)
    mean = gradients.mean(0)
    assert norms[0] == norms[1] == pytest.approx(mean.norm().item(), rel=1e-12)
    keys, values = rows_of_tables(bank)
    assert torch.equal(values, before[1])
    expected = before[0] - mean * MAX_NORM / (norms[0] + 1e-6)
    torch.testing.assert_close(keys, expected, rtol=0, atol=1e-15)


def test_rows_written_since_the_push_are_left_alone():
    bank = new_bank()
    team = Team(bank, 2)
    barrier = Barrier(2)

    def work(worker):
        client = worker.bank
        client.read(rows_of(1, WIDTH), 4).rows.sum().backward()
        ids = client.keys.grad.coalesce().indices()[0]
        clip_grad_norm(client.tables, math.inf)
        if worker.number == 0:
            client.write(ids[:1], torch.full((1, WIDTH), 5.0, dtype=torch.float64))
            bank.write(ids[1:2], torch.full((1, WIDTH), 7.0, dtype=torch.float64))
        barrier.wait(30)
        RowSGD([client.keys], lr=1.0).step()
        return ids

    ids, _ = team.each(work)
    keys = rows_of_tables(bank)[0]
    assert keys[ids[0]].eq(5).all()
    assert keys[ids[1]].eq(7).all()
    assert torch.equal(keys[ids[2:]], rows_of(37, WIDTH)[ids[2:]] - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_steps_nothing_on_any_worker(bad):
    bank = new_bank()
    before = [table.clone() for table in rows_of_tables(bank)]

    def work(worker):
        factor = bad if worker.number else 1.0
        (worker.bank.read(rows_of(1, WIDTH), 4).rows * factor).sum().backward()
        norm = clip_grad_norm(worker.bank.tables, MAX_NORM)
        with pytest.raises(ValueError, match="finite"):
            RowSGD([worker.bank.keys], lr=1.0).step()
        return norm.item()

    assert not any(map(math.isfinite, Team(bank, 2).each(work)))
    for table, old in zip(rows_of_tables(bank), before, strict=True):
        assert torch.equal(table, old)


def test_other_norms_are_refused():
    client = new_bank().as_worker(0, of=2)
    with pytest.raises(ValueError, match=r"norm_type is 1\.0, expected 2 where several workers"):
        clip_grad_norm(client.tables, MAX_NORM, 1.0)
    client.keys.grad = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    with pytest.raises(TypeError, match="the gradient of keys is dense, expected sparse"):
        clip_grad_norm(client.tables, MAX_NORM)


def test_one_worker_asks_nobody():
    bank = new_bank()
    bank.read(rows_of(2, WIDTH), 4).rows.sum().backward()
    asked, ask = [], bank.shards.ask
    bank.shards.ask = lambda name, each: asked.append(name) or ask(name, each)
    assert clip_grad_norm(bank.tables, MAX_NORM, 1.0) > MAX_NORM
    RowSGD(bank.tables, lr=1.0).step()
    assert asked == ["step"]

"""A small sharded bank at home in a folder, and things to do with it."""

import torch

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowAdam
from tests.oracles.shard_states import state_of

ROWS, WIDTH, SHARDS = 12, 3, 2


def new_bank(path, **options):
    ShardedBank.create(path, ROWS, WIDTH, num_shards=SHARDS, **options)
    return opened(path)


def opened(path):
    return ShardedBank(path, LocalShards(path))


def step(bank, seed):
    """Read, and step the rows that were read."""
    optimiser = RowAdam([bank.keys], lr=0.1)
    queries = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
    hit = bank.read(queries, 3)
    hit.scores.square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()
    return hit.scores.sum().item()


def filled(bank):
    bank.append(torch.randn(ROWS - 2, WIDTH), tags=torch.arange(ROWS - 2))
    step(bank, 1)
    return bank


def change(bank):
    """Some of each: appended, removed, written, frozen, stepped."""
    bank.append(torch.randn(1, WIDTH), ttl=50)
    bank.remove(torch.tensor([3]))
    bank.write(torch.tensor([0, 5]), torch.randn(2, WIDTH))
    bank.freeze(torch.tensor([6]))
    step(bank, 2)


def then(bank):
    """What it does from here on: the same of all that are the same."""
    return [step(bank, seed) for seed in (7, 8)], state_of(bank)

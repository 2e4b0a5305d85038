"""A bank with product keys and a sharded one of the same rows, and steps of either."""

import torch

from sparsemem import MemoryBank
from sparsemem.optim import RowAdamW
from tests.oracles.sharded import sharded, snapshot

N, WIDTH, VALUE_WIDTH = 25, 6, 3


def pair(num_shards, **options):
    """One bank and a sharded one of the same rows."""
    options = {"index": "product-key", "metric": "ip", "initial": "normal", **options}
    sizes = (N, WIDTH, VALUE_WIDTH)
    return MemoryBank(*sizes, **options), sharded(num_shards, *sizes, **options)


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def read_both(banks, queries, top_k=4):
    """What both read, equal to the last bit."""
    hits = [bank.read(queries, top_k) for bank in banks]
    assert all(map(torch.equal, *hits))
    return hits


def check_same(one, many):
    """All that both hold is the same, to the last bit."""
    assert torch.equal(one.keys, many.keys)
    assert all(map(torch.equal, snapshot(one), snapshot(many)))


def step(bank, seed, optimiser=None):
    """Something is learned."""
    optimiser = optimiser or RowAdamW([bank.keys, bank.values], lr=0.1)
    optimiser.zero_grad()
    hit = bank.read(random(4, WIDTH, seed=seed), 3)
    (hit.scores.softmax(-1).unsqueeze(-1) * hit.values).sum(-2).square().sum().backward()
    optimiser.step()
    return [bank.keys.detach().clone(), *snapshot(bank)]


def is_same(one, other):
    return all(map(torch.equal, one, other))

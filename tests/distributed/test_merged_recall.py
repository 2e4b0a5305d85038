"""Shards look as hard as the merged result needs, and not as their own best rows would."""

import pytest
import torch

from sparsemem import MemoryBank
from sparsemem.indexes.fresh import FreshIndex
from tests.oracles.sharded import sharded

N, WIDTH, SHARDS, TOP_K, FLOOR = 8_000, 8, 4, 8, 0.9
READS, WARM = 25, 10
OPTIONS = {"background": False, "exact_below": 1, "min_recall": FLOOR}


def rows_of(placed):
    """Clustered rows; "apart": a shard's are like one another, and unlike those of others."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(400, WIDTH, generator=generator)
    which = torch.randint(400, (N,), generator=generator)
    if placed == "apart":
        order = (centres[:, 0].argsort().argsort()[which]).argsort(stable=True)
        which = which[order.view(SHARDS, -1).T.flatten()]
    return centres[which] + 0.3 * torch.randn(N, WIDTH, generator=generator)


def queries_near(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    near = rows[torch.randint(N, (64,), generator=generator)]
    return near + 0.2 * torch.randn(near.shape, generator=generator)


def recall_over(bank, rows):
    """The mean recall of reads, once the shards have seen some."""
    exact = MemoryBank(N, WIDTH)
    exact.write(torch.arange(N), rows)
    found = 0
    with torch.no_grad():
        for seed in range(READS):
            ids = bank.read(queries_near(rows, seed), TOP_K).ids
            if seed >= WARM:
                truth = exact.read(queries_near(rows, seed), TOP_K).ids
                found += int((ids.unsqueeze(2) == truth.unsqueeze(1)).sum())
    return found / ((READS - WARM) * 64 * TOP_K)


def efforts(bank):
    return [shard["effort"] for shard in bank.stats()["shards"]]


@pytest.mark.parametrize("placed", ["anyhow", "apart"])
def test_the_merged_result_holds_the_floor(placed):
    rows = rows_of(placed)
    bank = sharded(SHARDS, N, WIDTH, index="IVF64,Flat", **OPTIONS)
    bank.write(torch.arange(N), rows)
    assert recall_over(bank, rows) >= FLOOR
    assert not any(shard["exact"] for shard in bank.stats()["shards"])


def test_that_takes_less_than_each_shards_own_best(monkeypatch):
    rows, found = rows_of("anyhow"), []
    for told in (True, False):
        if not told:
            monkeypatch.setattr(FreshIndex, "tell", lambda *_: None)
        bank = sharded(SHARDS, N, WIDTH, index="IVF64,Flat", **OPTIONS)
        bank.write(torch.arange(N), rows)
        recall_over(bank, rows)
        found.append(efforts(bank))
    assert sum(found[0]) <= 0.8 * sum(found[1])

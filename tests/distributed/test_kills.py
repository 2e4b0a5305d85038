"""Training goes on as if nothing had happened, whatever is killed under it.

SPARSEMEM_SOAK_SECONDS=600 makes the mixed load ten minutes; thirty kills are in
benchmarks/shard_kills.py.
"""

import os
import random
import signal
import threading
import time
from importlib.util import find_spec

import pytest
import torch

from sparsemem.bank.errors import BankError
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowSGD
from tests.oracles.shard_kills import (
    SHARDS,
    Killer,
    comparable,
    lose_node,
    new_folder,
    processes,
    restock,
    schedule,
    train,
    undisturbed,
)
from tests.oracles.shard_states import same_state, state_of

NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow, NEEDS_RAY]

STEPS, KILLS, LEARNING_RATE = 500, 6, 1e-3
SOAK_SECONDS = float(os.environ.get("SPARSEMEM_SOAK_SECONDS", "60"))


def start(path, **options):
    from sparsemem.distributed.rayshards import RayShards

    return ShardedBank(path, RayShards.start(path, **options))


def held(path):
    """What a closed bank's folder holds, once its actors are gone."""
    deadline = time.monotonic() + 20
    while True:
        try:
            bank = ShardedBank(path, LocalShards(path))
        except BankError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            state = comparable(state_of(bank))
            bank.close()
            return state


@pytest.mark.parametrize("seed", [1])
def test_losses_and_rows_are_those_of_the_undisturbed_run(cluster, tmp_path, seed):
    expected, rows = undisturbed(new_folder(tmp_path / "one"), STEPS)
    bank = start(new_folder(tmp_path / "two"), timeout=120.0)
    killer = Killer(cluster, bank, schedule(seed, STEPS, KILLS, saves=2))
    losses, _ = train(bank, STEPS, killer)
    killer.join()
    bank.close()
    assert len(killer.done) == KILLS
    assert losses == expected
    same_state(held(tmp_path / "two"), rows)


class Load:
    """Reads, writes, steps and saves, drawn at random, and what the rows should be.

    Rows of even ids are written and removed, those of odd ids stepped.
    """

    def __init__(self, bank):
        self.bank, self.draw = bank, random.Random(3)
        self.optimiser = RowSGD([bank.keys], lr=LEARNING_RATE)
        self.even, self.odd = (range(first, bank.num_rows, 2) for first in (0, 1))
        self.written = {}
        self.stepped = bank.gather(torch.tensor(self.odd)).detach().clone()
        self.done = 0

    def turn(self):
        kinds = ["read", "write", "step", "remove", "save", "stats"]
        kind = self.draw.choices(kinds, [45, 20, 25, 5, 1, 4])[0]
        getattr(self, kind)()
        self.done += 1

    def read(self):
        self.bank.read(torch.randn(4, self.bank.width), 5)

    def write(self):
        ids = self.draw.sample(self.even, 8)
        value = float(self.done)
        self.bank.write(torch.tensor(ids), torch.full((8, self.bank.width), value))
        self.written.update(dict.fromkeys(ids, value))

    def step(self):
        places = self.draw.sample(range(len(self.odd)), 8)
        rows = self.bank.gather(torch.tensor([self.odd[place] for place in places]))
        self.optimiser.zero_grad()
        rows.square().sum().backward()
        self.optimiser.step()
        self.stepped[places] = self.stepped[places].add(
            2 * self.stepped[places], alpha=-LEARNING_RATE
        )

    def remove(self):
        gone = self.draw.sample(self.even, 4)
        self.bank.remove(torch.tensor(gone))
        for id in gone:
            self.written.pop(id, None)

    def save(self):
        self.bank.save()

    def stats(self):
        assert self.bank.stats()["num_rows"] == self.bank.num_rows

    def check(self):
        ids = sorted(self.written)
        rows = self.bank.gather(torch.tensor(ids))[:, 0].tolist()
        assert rows == [self.written[id] for id in ids]
        assert torch.equal(self.bank.gather(torch.tensor(self.odd)), self.stepped)


def resident(pid):
    """Megabytes of a process's own memory."""
    with open(f"/proc/{pid}/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.timeout(900)
def test_a_mixed_load_with_a_kill_every_ten_seconds(cluster, tmp_path):
    bank = start(new_folder(tmp_path / "bank"), timeout=120.0)
    load, draw = Load(bank), random.Random(4)
    end = time.monotonic() + SOAK_SECONDS
    seen, sizes, kills = set(), [], 0
    while time.monotonic() < end:
        pids = processes(bank)
        seen.update(pids)
        kills += 1
        if kills % 4:
            killing = threading.Timer(0.5, os.kill, (draw.choice(pids), signal.SIGKILL))
        else:
            killing = threading.Timer(0.5, lose_node, (cluster, draw.randrange(2)))
        killing.start()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            load.turn()
        killing.join()
        restock(cluster)
        load.check()
        sizes.append((resident(os.getpid()), max(map(resident, processes(bank)))))
    seen.update(processes(bank))
    bank.close()
    assert load.done > 100
    first, last = sizes[0], sizes[-1]
    assert all(late < early + 40 for early, late in zip(first, last, strict=True)), sizes
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in seen) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in seen if os.path.exists(f"/proc/{pid}")]
    assert len(seen) >= SHARDS + kills - 1

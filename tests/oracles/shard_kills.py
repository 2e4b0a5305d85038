"""Training over shards that are killed on a schedule, and the same undisturbed."""

import os
import random
import signal
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import nn

from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowAdam
from tests.oracles.shard_states import state_of

ROWS, WIDTH, SHARDS, SAVE_EVERY = 400, 16, 4, 100
SHARD, NODE = "shard", "node"
ACCESSES = ("last_access", "accesses")  # of reads just before a crash they are lost


class Kill(NamedTuple):
    """What is killed, and when."""

    step: int
    delay: float  # seconds into the step
    kind: str
    which: int


def schedule(seed, steps, kills, saves=0):
    """Kills of a seed, apart from one another; `saves` of them while a version is made."""
    draw = random.Random(seed)
    width = steps // kills
    planned = [turn * width + draw.randrange(width) for turn in range(kills)]
    for turn in draw.sample(range(kills), saves):
        planned[turn] = max(1, round(planned[turn] / SAVE_EVERY)) * SAVE_EVERY
    kinds = [NODE if turn % 3 == 2 else SHARD for turn in range(kills)]
    draw.shuffle(kinds)
    return [
        Kill(step, draw.random() * 0.02, kind, draw.randrange(SHARDS))
        for step, kind in zip(planned, kinds, strict=True)
    ]


def new_folder(path, rows=ROWS, width=WIDTH):
    """A bank's folder with rows in it."""
    ShardedBank.create(path, rows, width, num_shards=SHARDS)
    bank = ShardedBank(path, LocalShards(path))
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, rows, 100_000):
        bank.append(torch.randn(min(rows, 100_000), width, generator=generator))
    bank.save()
    bank.close()
    return path


def train(bank, steps, before=lambda step: None):
    """Losses of a run, and how long each step took; a version is made every 100 steps."""
    torch.manual_seed(1)
    layer = nn.Linear(bank.width, bank.width)
    optimiser = RowAdam([*layer.parameters(), bank.keys], lr=0.02)
    losses, times = [], []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        before(number)
        generator = torch.Generator().manual_seed(number)
        query, target = torch.randn(2, 8, bank.width, generator=generator)
        hit = bank.read(layer(query), 5)
        weights = hit.scores.mul(4).softmax(-1)
        loss = ((weights.unsqueeze(-1) * hit.values).sum(-2) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if number % SAVE_EVERY == 0:
            bank.save()
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
    return losses, times


def undisturbed(path, steps):
    """Losses and what the shards hold at the end, of a run in this process."""
    bank = ShardedBank(path, LocalShards(path))
    losses, _ = train(bank, steps)
    state = comparable(state_of(bank))
    bank.close()
    return losses, state


def comparable(state):
    """Without what a crash may lose."""
    return {name: value for name, value in state.items() if not name.endswith(ACCESSES)}


class Killer:
    """Carries out a schedule on a cluster: `Killer(...)` as `before` of `train`."""

    def __init__(self, cluster, bank, kills):
        self.cluster, self.bank = cluster, bank
        self.pids = processes(bank)
        self.left = {}
        for kill in kills:
            self.left.setdefault(kill.step, []).append(kill)
        self.threads, self.done = [], []

    def __call__(self, step):
        for kill in self.left.pop(step, ()):
            self.join()
            self.pids = processes(self.bank)
            thread = threading.Thread(target=self.kill, args=(kill,))
            thread.start()
            self.threads.append(thread)

    def join(self):
        """Wait for what is under way."""
        for thread in self.threads:
            thread.join()
        restock(self.cluster)

    def kill(self, kill):
        time.sleep(kill.delay)
        if kill.kind == SHARD:
            with suppress(ProcessLookupError):
                os.kill(self.pids[kill.which], signal.SIGKILL)
        else:
            lose_node(self.cluster, kill.which)
        self.done.append(kill)


def lose_node(cluster, which):
    """A node is gone, all its processes with it."""
    node = cluster.nodes.pop(which % len(cluster.nodes))
    cluster.cluster.remove_node(node, allow_graceful=False)


def restock(cluster):
    """Another node for each that is gone. In the main thread: Ray sets handlers of signals."""
    while len(cluster.nodes) < 2:
        cluster.nodes.append(cluster.cluster.add_node(num_cpus=8))


def processes(bank):
    """The shards' processes, in order."""
    return bank.shards.ask("process", [()] * bank.shards.num_shards)

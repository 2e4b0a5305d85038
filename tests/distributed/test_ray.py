"""Shards behind Ray actors: what each kind of failure does to a client's calls."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from sparsemem.bank.errors import BankError
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.transport import LocalShards
from sparsemem.optim import RowAdam, RowSGD
from tests.oracles.shard_states import same_state, state_of

# Looked for and not imported: this is read in every run of the tests.
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
pytestmark = [pytest.mark.ray, NEEDS_RAY]

ROWS, WIDTH, SHARDS = 20, 4, 2


def start(path, **options):
    """A new bank's shards, as actors."""
    from sparsemem.distributed.rayshards import RayShards

    if not path.exists():
        ShardedBank.create(path, ROWS, WIDTH, num_shards=SHARDS)
    return ShardedBank(path, RayShards.start(path, **options))


def local(path):
    """A bank as `start` makes one, but for its shards, which are in this process."""
    ShardedBank.create(path, ROWS, WIDTH, num_shards=SHARDS)
    return ShardedBank(path, LocalShards(path))


def held(path, patience=10.0):
    """What the folder of a closed bank holds, once its actors are gone."""
    deadline = time.monotonic() + patience
    while True:
        try:
            shards = LocalShards(path)
        except BankError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            bank = ShardedBank(path, shards)
            state = state_of(bank)
            bank.close()
            return state


def pids(bank):
    return bank.shards.ask("process", [()] * SHARDS)


def step(bank, optimiser, seed):
    queries = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
    hit = bank.read(queries, 5)
    loss = hit.scores.square().mean() + hit.values.sin().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def filled(bank):
    bank.append(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
    return bank


def test_a_killed_shard_comes_back_and_callers_wait(cluster, tmp_path):
    losses = []
    for name, killed in (("one", False), ("two", True)):
        bank = filled((start if killed else local)(tmp_path / name))
        optimiser = RowAdam([bank.keys], lr=0.05)
        losses.append([])
        for number in range(12):
            if killed and number in (4, 8):
                os.kill(pids(bank)[number // 4 - 1], signal.SIGKILL)
            losses[-1].append(step(bank, optimiser, number))
        bank.close()
    assert losses[0] == losses[1]
    one, two = held(tmp_path / "one"), held(tmp_path / "two")
    for state in (one, two):  # of the reads just before a crash, accesses are lost
        for name in [name for name in state if "access" in name]:
            del state[name]
    same_state(one, two)


def lines(bank):
    """Addresses of the lines to all shards, once there are."""
    deadline = time.monotonic() + 60
    while True:
        bank.capacity()
        there = [bank.shards._lines.to(shard) for shard in range(SHARDS)]
        if all(there):
            return [line._socket.getpeername() for line in there]
        assert time.monotonic() < deadline, "no lines"
        time.sleep(0.05)


def test_shards_on_this_machine_are_called_over_lines(cluster, tmp_path):
    bank = filled(start(tmp_path / "bank"))
    before, ids = lines(bank), torch.arange(ROWS)
    rows = bank.gather(ids)
    bank.remove(ids[:1])
    with pytest.raises(ValueError, match="which is not live"):  # of the shard, heard by Ray
        bank.shards.ask("write_at", [(ids[:1], {"tags": ids[:1], "ttl": 0}, 1), None])
    bank.write(ids[:1], rows[:1])
    os.kill(pids(bank)[0], signal.SIGKILL)
    assert torch.equal(bank.gather(ids), rows)
    after = lines(bank)
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)
    bank.close()


def test_a_slow_shard_is_named_and_its_change_is_done_once(cluster, tmp_path):
    bank, other = filled(start(tmp_path / "bank")), filled(local(tmp_path / "other"))
    optimisers = [RowAdam([b.keys], lr=0.1) for b in (bank, other)]
    slow = pids(bank)[1]
    for b, optimiser in zip((bank, other), optimisers, strict=True):
        step(b, optimiser, 0)  # a shard's first takes long: it loads what is compiled
        optimiser.zero_grad()
        b.read(torch.ones(2, WIDTH), 8).scores.sum().backward()
    bank.shards.timeout = 2.0
    os.kill(slow, signal.SIGSTOP)
    try:
        for _ in range(2):  # asking again does not hurry it, and does not ask for another step
            with pytest.raises(ShardError, match="shard 1 has not answered within 2 seconds"):
                optimisers[0].step()
        with pytest.raises(ShardError, match="shard 1 has not answered within 2 seconds"):
            bank.read(torch.ones(1, WIDTH), 1)
    finally:
        os.kill(slow, signal.SIGCONT)
        bank.shards.timeout = 60.0
    for optimiser in optimisers:
        optimiser.step()
    ids = torch.arange(ROWS)
    assert torch.equal(bank.gather(ids), other.gather(ids))
    for b, optimiser in zip((bank, other), optimisers, strict=True):
        step(b, optimiser, 1)
    assert torch.equal(bank.gather(ids), other.gather(ids))
    for b in (bank, other):
        b.close()


def test_a_change_that_timed_out_outlives_the_shard(cluster, tmp_path):
    bank = filled(start(tmp_path / "bank"))
    slow, ids = pids(bank)[0], torch.arange(6)
    bank.shards.timeout = 2.0
    os.kill(slow, signal.SIGSTOP)
    with pytest.raises(ShardError, match="shard 0 has not answered"):
        bank.write(ids, torch.ones(6, WIDTH))
    os.kill(slow, signal.SIGKILL)  # it never looked at it
    bank.shards.timeout = 60.0
    bank.write(ids[:1], torch.full((1, WIDTH), 2.0))  # numbers go on where they were
    assert bank.gather(ids)[:, 0].tolist() == [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    bank.close()


def test_a_shard_says_what_is_wrong_itself(cluster, tmp_path):
    bank = filled(start(tmp_path / "bank"))
    with pytest.raises(BankError) as found:
        bank.shards.ask("checkpoint", [(-1,)] * SHARDS)
    assert str(found.value) == "version is -1, expected more than 0, the last"
    bank.remove(torch.tensor([4]))
    with pytest.raises(ValueError, match="ids holds 4, which is not live"):
        bank.freeze(torch.tensor([4]))
    with pytest.raises(ValueError, match="ids holds 2, which is not live"):
        bank.shards.ask("freeze_at", [(torch.tensor([2]), True), None])
    bank.freeze(torch.tensor([6]))  # its number is the next one
    assert bank.stats()["num_frozen"] == 1
    bank.close()


def test_a_second_bank_on_the_folder_is_refused(cluster, tmp_path, monkeypatch):
    bank = filled(start(tmp_path / "bank"))
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"shard 0 is gone for good: .*is in use"):
        start(tmp_path / "bank", patience=1.0)
    assert time.monotonic() - began < 20
    assert bank.stats()["num_live"] == ROWS
    bank.close()


def test_a_bank_goes_back_over_actors(cluster, tmp_path):
    bank = filled(start(tmp_path / "bank"))
    optimiser = RowAdam([bank.keys], lr=0.05)
    step(bank, optimiser, 0)
    bank.save()
    rows = bank.gather(torch.arange(ROWS))
    losses = [step(bank, optimiser, seed) for seed in (1, 2)]
    os.kill(pids(bank)[0], signal.SIGKILL)
    bank.restore()
    assert torch.equal(bank.gather(torch.arange(ROWS)), rows)
    assert [step(bank, optimiser, seed) for seed in (1, 2)] == losses
    bank.close()


DRIVER = """
import sys, ray, torch
from pathlib import Path
env_vars = {"PYTHONPATH": sys.argv[3]}
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": env_vars})
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.rayshards import RayShards
path = Path(sys.argv[2])
bank = ShardedBank(path, RayShards.start(path))
bank.write(torch.arange(4), torch.full((4, 4), 3.0))
print(*bank.shards.ask("process", [()] * 2), flush=True)
import time; time.sleep(60)
"""


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_driver_that_is_gone_takes_its_actors_along(cluster, tmp_path, repository):
    bank = filled(start(tmp_path / "bank"))
    bank.close()
    command = [
        sys.executable,
        "-c",
        DRIVER,
        cluster.address,
        str(tmp_path / "bank"),
        str(repository),
    ]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as driver:
        actors = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(actors) == SHARDS
        driver.kill()
    again = start(tmp_path / "bank")  # waits until the folder is free
    assert again.gather(torch.arange(4)).eq(3).all()
    assert all(gone(pid) for pid in actors)
    again.close()


def test_steps_that_nobody_waits_for_happen_once_though_shards_are_killed(cluster, tmp_path):
    bank = filled(start(tmp_path / "bank"))
    stale = ShardedBank(bank.path, bank.shards.another(), staleness=4)
    optimiser, ids = RowSGD([stale.keys], lr=0.25), torch.tensor([0, 1, 2, 5, 7])
    before, processes = bank.gather(ids), pids(bank)
    for number in range(16):
        optimiser.zero_grad()
        stale.gather(ids).sum().backward()
        optimiser.step()
        if number in (5, 10):
            os.kill(processes[number % 2], signal.SIGKILL)
    assert stale.shards.under_way > 0
    stale.save()
    assert stale.shards.under_way == 0
    torch.testing.assert_close(bank.gather(ids), before - 4.0, rtol=0, atol=1e-5)
    bank.close()

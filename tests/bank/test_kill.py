"""kill -9 at random moments: what was acknowledged is there, and nothing half."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparsemem.bank import MemoryBank, folder, shards
from tests.oracles import killed_bank
from tests.oracles.killed_bank import ACK, OPTIONS, contents, foresee, operation

pytest.importorskip("faiss")


@pytest.fixture
def server(repository):
    """Runs operations in forks of a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.oracles.killed_bank"],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.stdout.close()
    assert process.wait(30) == 0


def run_and_kill(server, path, first, seed, seconds):
    """Run operations for some time, and kill; returns the number of the last one acknowledged."""
    print(path, first, seed, file=server.stdin, flush=True)
    child = int(server.stdout.readline())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert int(server.stdout.readline()) == -signal.SIGKILL
    acks = path.with_name(f"{path.name}.acks")
    data = acks.read_bytes() if acks.exists() else b""
    acks.unlink(missing_ok=True)
    numbers = [number for (number,) in ACK.iter_unpack(data)]
    assert numbers == list(range(first, first + len(numbers)))
    return first + len(numbers) - 1


def kill_and_check(server, path, kills, seed, longest, expected):
    """Kill a bank many times; returns how many operations it had done, by name.

    On a busy machine little may be done before a kill: there are more, until what is expected was.
    """
    draw, done = random.Random(seed), {}
    MemoryBank(
        killed_bank.NUM_ROWS, killed_bank.WIDTH, killed_bank.VALUE_WIDTH, path=path, **OPTIONS
    ).close()
    rows, used, number = {}, set(), 0
    for kill in range(4 * kills):
        if kill >= kills and done.keys() >= expected:
            break
        last = run_and_kill(server, path, number, seed, draw.uniform(0, longest))
        while number <= last:
            name = operation(seed, number, rows, used)[0]
            done[name] = done.get(name, 0) + 1
            rows, used = foresee(seed, number, rows, used)
            number += 1
        bank = MemoryBank.load(path)
        found, ahead = contents(bank), foresee(seed, number, rows, used)
        assert found in (rows, ahead[0]), f"kill {kill}, operation {number}"
        if found != rows:  # the one in flight
            rows, used = ahead
            number += 1
        some = bank.book.live.nonzero().squeeze(1)[:8]
        if len(some):
            best = bank.read(bank.keys.detach()[some], 1)
            assert torch.equal(best.rows[:, 0], bank.keys[some])
        bank.close()
    return done


@pytest.mark.filterwarnings("ignore:.*torn tail")
@pytest.mark.parametrize(
    ("kills", "longest", "expected"),
    [
        (8, 0.5, {"append", "write"}),
        pytest.param(
            200,
            0.3,
            {"append", "write", "remove", "freeze", "unfreeze", "save", "rebuild", "read"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_acknowledged_is_lost(server, tmp_path, monkeypatch, kills, longest, expected):
    for module in (shards, folder):
        monkeypatch.setattr(module, "SHARD_ROWS", killed_bank.SHARD_ROWS)
    done = kill_and_check(server, tmp_path / "bank", kills, kills, longest, expected)
    assert done.keys() >= expected, done

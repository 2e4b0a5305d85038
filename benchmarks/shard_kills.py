"""Kills of shards and nodes under training: how long each takes, and whether anything differs.

    python benchmarks/shard_kills.py [--kills 30] [--rows 1000000]

Two parts, written to shard_kills.json. Training runs of 500 steps over 4 shards on several Ray
nodes of this machine, with kills drawn at random, some of them while a version is made: losses and
rows are compared with those of an undisturbed run, bit for bit. And how long a bank of a million
rows waits for a killed shard, and for a lost node.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray  # noqa: E402
import torch  # noqa: E402
from common import machine  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from sparsemem.bank.errors import BankError  # noqa: E402
from sparsemem.distributed.bank import ShardedBank  # noqa: E402
from sparsemem.distributed.rayshards import RayShards  # noqa: E402
from sparsemem.distributed.reshard import reshard  # noqa: E402
from sparsemem.distributed.transport import LocalShards  # noqa: E402
from tests.distributed.conftest import ENVIRONMENT, QUICK  # noqa: E402
from tests.oracles.shard_kills import (  # noqa: E402
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
from tests.oracles.shard_states import state_of  # noqa: E402

STEPS, KILLS_A_RUN = 500, 6


def start(path: Path) -> ShardedBank:
    """A bank over actors."""
    return ShardedBank(path, RayShards.start(path, timeout=180.0))


def held(path: Path) -> dict[str, torch.Tensor]:
    """What a closed bank's folder holds."""
    while True:
        try:
            bank = ShardedBank(path, LocalShards(path))
        except BankError as error:
            if "is in use" not in str(error):
                raise
            time.sleep(0.1)
        else:
            state = comparable(state_of(bank))
            bank.close()
            return state


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def disturbed_run(cluster: Any, folder: Path, seed: int, expected: Any) -> dict[str, Any]:
    """A run with kills, compared with the undisturbed one."""
    losses, rows = expected
    bank = start(new_folder(folder))
    killer = Killer(cluster, bank, schedule(seed, STEPS, KILLS_A_RUN, saves=2))
    own, times = train(bank, STEPS, killer)
    killer.join()
    bank.close()
    slowest = sorted(times)[-len(killer.done) :]
    return {
        "seed": seed,
        "kills": [kill._asdict() for kill in killer.done],
        "same losses": own == losses,
        "same rows": equal(held(folder), rows),
        "seconds of a step, median": sorted(times)[STEPS // 2],
        "seconds of the slowest steps": [round(t, 2) for t in slowest],
    }


def recoveries(cluster: Any, folder: Path, rows: int) -> dict[str, Any]:
    """Seconds until a read is answered again, after a kill at `rows` rows and 20 steps' log."""
    bank = start(new_folder(folder, rows, 64))
    train(bank, 20)
    queries = torch.randn(8, 64)
    found: dict[str, Any] = {}
    for name in ("shard", "shard", "node"):
        if name == "shard":
            os.kill(processes(bank)[1], signal.SIGKILL)
        else:
            lose_node(cluster, 0)
        began = time.perf_counter()
        bank.read(queries, 8)
        found.setdefault(name, []).append(round(time.perf_counter() - began, 2))
        restock(cluster)
    began = time.perf_counter()
    bank.save()
    found["save"] = round(time.perf_counter() - began, 2)
    bank.close()
    return {"rows": rows, "width": 64, "seconds": found}


def killed_reshards(folder: Path, kills: int) -> dict[str, Any]:
    """Reshards that are killed after a random while: the new folder is whole, or not there."""
    before, whole = held(folder), 0
    for number in range(kills):
        new = folder.with_name(f"new-{number}")
        process = multiprocessing.Process(target=reshard, args=(folder, new, 4))
        process.start()
        process.join(0.12 * (number + 1) / kills)
        process.kill()
        process.join()
        if new.exists():
            whole += 1
            if held(new).keys() != before.keys():
                return {"kills": kills, "as it should be": False}
    return {
        "kills": kills,
        "came to their end": whole,
        "as it should be": equal(held(folder), before),
    }


@contextmanager
def nodes() -> Iterator[SimpleNamespace]:
    """Ray on this machine: a head, and two nodes for shards."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
    ours = Cluster(initialize_head=True, head_node_args=head)
    cluster = SimpleNamespace(cluster=ours, nodes=[])
    restock(cluster)
    ray.init(address=ours.address, runtime_env={"env_vars": ENVIRONMENT}, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        ours.shutdown()


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"machine": machine(), "steps": STEPS}
        expected = undisturbed(new_folder(folder / "undisturbed"), STEPS)
        # Before Ray starts: its threads do not go well with a fork.
        result["reshard"] = killed_reshards(folder / "undisturbed", given.kills)
        print(json.dumps(result["reshard"]), flush=True)
        with nodes() as cluster:
            result["recovery"] = recoveries(cluster, folder / "large", given.rows)
            print(json.dumps(result["recovery"]), flush=True)
            result["runs"] = []
            for seed in range(1, given.kills // KILLS_A_RUN + 1):
                run = disturbed_run(cluster, folder / f"run-{seed}", seed, expected)
                result["runs"].append(run)
                print(json.dumps(run), flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Kills of trainers, shards and nodes under `sparsemem train --shards`: whether anything differs.

    python benchmarks/training_kills.py [--kills 30]

Runs of 500 steps, 4 shards and 2 trainers on several Ray nodes of this machine, with six kills
each, drawn at random: two of a trainer, two of a shard, two of a node with all its processes. Their
metrics and rows are compared with those of an undisturbed run, bit for bit, and its metrics with
one process's, to rounding. Written to training_kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import machine  # noqa: E402
from shard_kills import nodes  # noqa: E402

from sparsemem.distributed.cluster import Wanted  # noqa: E402
from sparsemem.distributed.keeper import BANK, version_of  # noqa: E402
from sparsemem.distributed.launch import start  # noqa: E402
from sparsemem.distributed.versions import read_version  # noqa: E402
from sparsemem.training.run import RunFolder  # noqa: E402
from tests.oracles.shard_kills import lose_node, restock  # noqa: E402
from tests.oracles.sharded_runs import (  # noqa: E402
    SHARDS,
    WORKERS,
    actors,
    alone,
    config_of,
    largest_difference,
    last_step,
    metrics,
)

STEPS, KILLS_A_RUN, CHECKPOINT_EVERY = 500, 6, 50
TRIES = 5
KINDS = ("RayTrainWorker", "ShardActor", "node")
CONFIG = config_of(steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, evaluate_every=100)


class Running(threading.Thread):
    """A run, beside the main thread: only there may nodes be started."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path

    def run(self) -> None:
        """Train to the end."""
        start(CONFIG, self.path, Wanted(SHARDS, WORKERS), announce=lambda line: None)


def schedule(seed: int) -> list[tuple[int, str]]:
    """Steps and kinds of a run's kills, apart from one another."""
    draw = random.Random(seed)
    width = STEPS // KILLS_A_RUN
    kinds = list(KINDS) * (KILLS_A_RUN // len(KINDS))
    draw.shuffle(kinds)
    return [(turn * width + draw.randrange(1, width), kind) for turn, kind in enumerate(kinds)]


def kill(cluster: Any, kind: str, draw: random.Random) -> None:
    """Kill one, chosen at random."""
    if kind == "node":
        lose_node(cluster, draw.randrange(2))
        for _ in range(TRIES):  # on a busy machine a node may take too long to start
            with suppress(Exception):
                restock(cluster)
        return
    with suppress(ProcessLookupError):
        os.kill(draw.choice(actors(kind)), signal.SIGKILL)


def disturbed(cluster: Any, path: Path, seed: int) -> dict[str, Any]:
    """A run with kills, and how it compares."""
    running, draw = Running(path), random.Random(seed)
    running.start()
    began, done = time.perf_counter(), []
    for step, kind in schedule(seed):
        while last_step(path) < step and running.is_alive():
            time.sleep(0.05)
        if running.is_alive() and (kind == "node" or actors(kind)):
            kill(cluster, kind, draw)
            done.append({"step": step, "kind": kind})
    running.join()
    return {"seed": seed, "kills": done, "seconds": round(time.perf_counter() - began, 1)}


def rows(path: Path) -> torch.Tensor:
    """Of a run's last checkpoint."""
    bank = read_version(path / BANK, version_of(RunFolder(path).newest_checkpoint()))
    return bank.keys.detach()


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, nodes() as cluster:
        folder = Path(name)
        one = metrics(alone(folder / "one", CONFIG))
        result: dict[str, Any] = {"machine": machine(), "steps": STEPS}
        began = time.perf_counter()
        expected = Running(folder / "undisturbed")
        expected.run()
        result["undisturbed"] = {
            "seconds": round(time.perf_counter() - began, 1),
            "largest difference from one process": largest_difference(
                metrics(RunFolder(expected.path)), one
            ),
        }
        print(json.dumps(result["undisturbed"]), flush=True)
        result["runs"] = []
        for seed in range(1, given.kills // KILLS_A_RUN + 1):
            path = folder / f"run-{seed}"
            run = disturbed(cluster, path, seed)
            run["same metrics"] = metrics(RunFolder(path)) == metrics(RunFolder(expected.path))
            run["same rows"] = torch.equal(rows(path), rows(expected.path))
            result["runs"].append(run)
            print(json.dumps(run), flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Runs over shards: a small config, and what is compared of them."""

import json
import os
from pathlib import Path

from sparsemem.training.banks import keeper_of
from sparsemem.training.config import make_config
from sparsemem.training.launch import load_run
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer

SHARDS, WORKERS = 4, 2
CONFIG = {
    "model": {"name": "memory-lstm", "hidden_size": 16, "num_heads": 2, "top_k": 4},
    "task": {"name": "copy", "bits": 4},
    "bank": {"num_rows": 200, "width": 8, "optimizer": {"learning_rate": 0.05}},
    "training": {
        "steps": 15,
        "batch_size": 8,
        "dtype": "float64",
        "log_every": 1,
        "evaluate_every": 5,
        "checkpoint_every": 5,
        "gradient_clip": 0.1,
        "optimizer": {"learning_rate": 0.01},
    },
    "curriculum": {"minimum": 1, "maximum": 4},
    "evaluation": {"batches": 1, "batch_size": 8},
}


# What is changed of its bank, by how rows are found.
BANKS = {
    "exact": {},
    "product-key": {"num_rows": 196, "value_width": 6, "index": "product-key", "metric": "ip"},
}


def config_of(index="exact", **training):
    """The config, with an index, and some values of its section `training` changed."""
    changed = {"bank": CONFIG["bank"] | BANKS[index], "training": CONFIG["training"] | training}
    return make_config(CONFIG | changed)


def alone(path, config):
    """The run of one process over a bank in its memory; its folder."""
    trainer = Trainer(prepare(config))
    run = RunFolder.create(path, trainer.config)
    with run.lock():
        trainer.train(run)
    return run


def rows(run, which="last", keeper_for=keeper_of):
    """What the bank held at a checkpoint of a run: the tables, and sub-keys if it has any."""
    setup, _ = load_run(run, run.config(), which, keeper_for)
    return [parameter.detach() for parameter in setup.bank.parameters()]


def metrics(run):
    """What a run has recorded, without times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.metrics()]


def largest_difference(one, other):
    """Of the numbers of two runs' metrics, which have to be of the same steps."""
    assert [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in other]
    return max(abs(a[k] - b[k]) for a, b in zip(one, other, strict=True) for k in a if k != "kind")


def children(pid):
    """A process's, and theirs."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def actors(kind, pid=None):
    """Processes of Ray's actors of a class, among a process's children; oldest first."""
    found = []
    for child in children(os.getpid() if pid is None else pid):
        try:
            line = Path(f"/proc/{child}/cmdline").read_bytes().decode()
        except OSError:
            continue
        if line.startswith(f"ray::{kind}"):
            found.append(child)
    return sorted(found)


def last_step(path):
    """Of the metrics that a run has recorded so far, 0 if none."""
    file = path / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0

"""What tests of training and resuming share."""

import json

import torch

from sparsemem.training.checkpoint import load_checkpoint

TIMES = {"seconds"}


def train(trainer, run, progress=None):
    with run.lock():
        return trainer.train(run, progress)


def contents(run):
    """Everything that a run has led to, apart from times: checkpoint and metrics."""
    checkpoint = load_checkpoint(run.newest_checkpoint())
    manifest = {k: v for k, v in checkpoint.manifest.items() if k not in TIMES | {"files"}}
    metrics = [{k: v for k, v in r.items() if k not in TIMES} for r in run.metrics()]
    return checkpoint.tensors, json.dumps(manifest, sort_keys=True), metrics


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
    assert one[1] == other[1]
    assert one[2] == other[2]

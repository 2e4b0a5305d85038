"""Small configs, so that a whole run takes about a second."""

import copy

import pytest

from sparsemem.training.config import make_config
from sparsemem.training.progress import Progress
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer

TREE = {
    "model": {
        "name": "sam",
        "hidden_size": 12,
        "num_slots": 2**20,
        "slot_dim": 6,
        "num_heads": 2,
        "top_k": 2,
    },
    "task": {"name": "copy", "bits": 3, "max_level": 4},
    "training": {
        "steps": 20,
        "batch_size": 3,
        "log_every": 4,
        "evaluate_every": 5,
        "checkpoint_every": 10,
        "optimizer": {"name": "adam", "learning_rate": 0.01},
    },
    "evaluation": {"batches": 2, "batch_size": 4},
}


@pytest.fixture
def tree():
    return copy.deepcopy(TREE)


@pytest.fixture
def new_run(tmp_path):
    """A function from (name, config tree) to a trainer and its run folder."""

    def make(name, tree):
        trainer = Trainer(prepare(make_config(tree)))
        return trainer, RunFolder.create(tmp_path / name, trainer.config)

    return make


@pytest.fixture
def babi(tmp_path):
    """A folder of bAbI files, tasks 1 to 3: each of four words of its own in what it says."""
    folder = tmp_path / "babi" / "en"
    folder.mkdir(parents=True)
    for task, (who, what) in enumerate((("mary", "milk"), ("john", "wine"), ("ann", "ale")), 1):
        story = f"1 {who} has {what}.\n2 what has {who}?\t{what}\t1\n3 what has?\t{what}\t1\n"
        for part in ("train", "test"):
            (folder / f"qa{task}_x_{part}.txt").write_text(story * 4 * task)
    return str(folder.parent)


@pytest.fixture
def babi_tree(tree, babi):
    """A config of an LSTM on tasks 1 and 2 of the bAbI files."""
    tree["model"] = {"name": "lstm", "hidden_size": 5}
    tree["task"] = {"name": "babi", "path": babi, "variant": "en", "tasks": [1, 2]}
    tree["task"]["validation_fraction"] = 0.25
    tree["evaluation"] = {"batch_size": 3}
    return tree


class StopAt(Progress):
    """Sends a signal after a number of steps of this process."""

    def __init__(self, steps, send):
        super().__init__(0, 0, "wrong bits")
        self.left, self.send = steps, send

    def step(self, values):
        self.left -= 1
        if self.left == 0:
            self.send()


@pytest.fixture
def stop_at():
    return StopAt

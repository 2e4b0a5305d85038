"""Slow: the models do learn."""

import pytest

from sparsemem.training.config import make_config
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Outcome, Trainer

SPARSE = {"num_slots": 2**20, "slot_dim": 16, "num_heads": 1, "top_k": 4}
DENSE = {"num_slots": 16, "slot_dim": 16, "num_heads": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("plain_errors")  # shapes are checked elsewhere, at several times the time
@pytest.mark.parametrize(
    ("model", "options"), [("sam", SPARSE), ("sdnc", SPARSE), ("dnc", DENSE), ("ntm", DENSE)]
)
def test_copies_three_words(model, options, tmp_path):
    """Under 0.2 wrong bits of 12 in at most 3,000 updates."""
    config = make_config(
        {
            "model": {"name": model, "hidden_size": 64, **options},
            "task": {"name": "copy", "bits": 4, "max_level": 3},
            "training": {
                "steps": 3000,
                "optimizer": {"name": "adam", "learning_rate": 1e-2},
                "evaluate_every": 100,
                "checkpoint_every": 2000,
                "stop_below": 0.2,
            },
            "evaluation": {"batches": 5},
        }
    )
    trainer = Trainer(prepare(config))
    run = RunFolder.create(tmp_path / "run", trainer.config)
    with run.lock():
        assert trainer.train(run) is Outcome.REACHED

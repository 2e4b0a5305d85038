"""Every ready config is valid, says what it reaches, and trains a step."""

from pathlib import Path

import pytest

from sparsemem.tasks import TASKS
from sparsemem.training.config import load_config
from sparsemem.training.launch import start

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.yaml"))


def small(path, data_dir_of):
    """The config, cut to one training step of a small batch on short sequences."""
    overrides = [
        "training.steps=1",
        "training.batch_size=2",
        "training.evaluate_every=1",
        "training.stop_below=null",
        "evaluation.batches=1",
        "evaluation.batch_size=2",
    ]
    if load_config(path, []).task.name == "babi":
        overrides.append(f"task.path={data_dir_of() / 'babi'}")
    return load_config(path, overrides)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(path, tmp_path, request):
    config = small(path, lambda: request.getfixturevalue("data_dir"))
    start(config, tmp_path / "run", lambda line: None)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_reaches(path):
    head = path.read_text().split("model:")[0]
    assert head.startswith("# ")
    assert "# Reaches" in head
    assert any(character.isdigit() for character in head.split("# Reaches")[1])
    assert any(word in head for word in ("wrong bits", "error rate", "accuracy"))


def test_every_task_has_an_example():
    assert {load_config(path, []).task.name for path in EXAMPLES} == set(TASKS)

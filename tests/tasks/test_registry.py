import inspect

import pytest
import torch

from sparsemem.tasks import TASKS, CopyTask, NGramsTask, find_task, make_task, task_options


def test_names():
    assert sorted(TASKS) == [
        "associative-recall", "babi", "copy", "facts", "ngrams", "priority-sort", "repeat-copy",
    ]  # fmt: skip


def test_options_with_defaults():
    assert task_options("copy") == {
        "seed": 0, "batch_size": 16, "split": "train", "dtype": torch.float32,
        "min_level": None, "max_level": 10, "input_values": "±1", "bits": 8,
    }  # fmt: skip
    assert task_options("ngrams")["max_level"] == 200  # a subclass's own default
    assert task_options("babi")["path"] is inspect.Parameter.empty
    assert "max_level" not in task_options("babi")


def test_make_task():
    task = make_task("copy", seed=3, bits=5, max_level=7)
    assert isinstance(task, CopyTask)
    assert (task.seed, task.input_size, task.output_size, task.level) == (3, 6, 5, 7)
    assert find_task("ngrams") is NGramsTask


def test_unknown_names():
    with pytest.raises(
        ValueError, match="unknown task 'copyy': did you mean 'copy'\\? known: assoc"
    ):
        make_task("copyy")
    message = "unknown option 'max_levle' of task 'copy': did you mean 'max_level'\\? known: batch"
    with pytest.raises(ValueError, match=message):
        make_task("copy", max_levle=3)
    with pytest.raises(ValueError, match="unknown option 'max_level' of task 'babi'"):
        make_task("babi", path="x", max_level=3)
    with pytest.raises(ValueError, match="task 'babi' needs the option 'path'"):
        make_task("babi")

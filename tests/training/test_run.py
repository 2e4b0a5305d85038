import io
import json
import sys

import pytest

from sparsemem.training.config import make_config
from sparsemem.training.errors import RunError
from sparsemem.training.progress import Progress
from sparsemem.training.run import MetricsLog, RunFolder, new_run_path

pytestmark = pytest.mark.usefixtures("plain_errors")


@pytest.fixture
def run(tree, tmp_path):
    return RunFolder.create(tmp_path / "run", make_config(tree))


def test_a_new_folder_holds_its_config(run, tree):
    assert RunFolder.open(run.path).config() == make_config(tree)


def test_a_folder_in_use_is_refused_and_left(run, tree, tmp_path):
    with pytest.raises(RunError, match=r"run is not empty: go on with --resume .*run, or choose"):
        RunFolder.create(run.path, make_config(tree))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"other is not empty: choose another --run$"):
        RunFolder.create(tmp_path / "other", make_config(tree))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"file is not empty"):
        RunFolder.create(tmp_path / "file", make_config(tree))
    with pytest.raises(RunError, match=r"cannot write .*file/run/checkpoints: Not a dir"):
        RunFolder.create(tmp_path / "file" / "run", make_config(tree))


def test_a_missing_folder_names_those_that_are_there(run, tmp_path):
    with pytest.raises(RunError, match=rf"ran does not exist; there are: {run.path}$"):
        RunFolder.open(tmp_path / "ran")
    with pytest.raises(RunError, match=r"is not a run folder: it has no config.yaml"):
        RunFolder.open(tmp_path)


def test_metrics_are_appended_and_cut(run):
    log = MetricsLog(run, 0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": step / 10})
    log.sync()
    log.close()
    run.cut_metrics(2)
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == [
        {"kind": "train", "step": 1, "loss": 0.1},
        {"kind": "train", "step": 2, "loss": 0.2},
    ]


def test_a_torn_last_line_is_left_out_and_another_is_named(run):
    run.metrics_file.write_text('{"step": 1}\n{"ste')
    assert run.metrics() == [{"step": 1}]
    run.metrics_file.write_text('{"ste\n{"step": 1}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 1: not a JSON object"):
        run.metrics()


def test_without_a_checkpoint(run):
    with pytest.raises(RunError, match=r"run has no checkpoint yet: expected one in .*checkpoints"):
        run.best_checkpoint()


def test_without_tensorboard(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = MetricsLog(run, 0)
    log.write("train", 1, {"loss": 0.5})
    log.close()
    assert run.metrics() == [{"kind": "train", "step": 1, "loss": 0.5}]
    assert not run.events.exists()


def test_new_run_paths_are_counted(tmp_path):
    config = tmp_path / "copy-sam.yaml"
    names = []
    for _ in range(3):
        path = new_run_path(config, tmp_path / "runs")
        path.mkdir(parents=True)
        names.append(path.name)
    assert names == ["copy-sam", "copy-sam-2", "copy-sam-3"]


VALUES = {"loss": 0.25, "metric": 1.5, "touched": 12.4, "level": 3.5, "seconds": 2.0}


def test_a_log_gets_plain_lines():
    stream = io.StringIO()
    progress = Progress(10, 0, "wrong bits", stream)
    progress.step(VALUES)
    progress.log(5, VALUES)
    progress.close()
    assert stream.getvalue() == (
        "step 5/10: loss 0.2500, wrong bits 1.5, touched 12, level 3.5, 2 s\n"
    )


def test_a_terminal_gets_a_bar():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(10, 4, "error rate", stream)
    progress.step(VALUES)
    progress.log(5, VALUES)
    progress.say("a line that stays")
    progress.close()
    text = stream.getvalue()
    assert "5/10" in text
    assert "loss 0.2500, error rate 1.5, touched 12, level 3.5" in text
    assert "a line that stays\n" in text
    assert "step 5/10" not in text

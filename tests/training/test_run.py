import contextlib
import errno
import io
import json
import os
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparsemem.training.config import make_config
from sparsemem.training.errors import ConfigError, RunError
from sparsemem.training.progress import Progress
from sparsemem.training.run import MetricsLog, RunFolder, claim_folder

pytestmark = pytest.mark.usefixtures("plain_errors")


@pytest.fixture
def run(tree, tmp_path):
    return RunFolder.create(tmp_path / "run", make_config(tree))


def test_a_new_folder_holds_its_config(run, tree):
    assert RunFolder.open(run.path).config() == make_config(tree)


def test_a_folder_in_use_is_refused_and_left(run, tree, tmp_path):
    with pytest.raises(RunError, match=r"run is not empty: choose another --run$"):
        RunFolder.create(run.path, make_config(tree))
    (run.checkpoints / "step-00000001").mkdir()
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
    record = '{"kind": "train", "step": 1}'
    run.metrics_file.write_text(record + '\n{"ste')
    assert run.metrics() == [{"kind": "train", "step": 1}]
    for line in (b'{"ste', b"[1]", b"3", b"{}", b'{"kind": 1, "step": 1}', b"\xff", b"[" * 10**5):
        run.metrics_file.write_bytes(line + b"\n" + record.encode() + b"\n")
        with pytest.raises(RunError, match=r"metrics.jsonl, line 1: expected a JSON object with"):
            run.metrics()


def test_what_cannot_be_read_or_written_is_named(run, tree, tmp_path, monkeypatch):
    run.metrics_file.mkdir()
    with pytest.raises(RunError, match=r"^cannot read .*metrics.jsonl: Is a directory$"):
        run.metrics()
    run.config_file.unlink()
    run.config_file.mkdir()
    with pytest.raises(RunError, match=r"^cannot write .*config.yaml.*: Is a directory$"):
        run.write_config(make_config(tree))
    with pytest.raises(RunError, match=r"^cannot read .*xxx: File name too long$"):
        RunFolder.open(tmp_path / ("x" * 5000))
    with pytest.raises(RunError, match=r"^cannot write .*xxx: File name too long$"):
        RunFolder.create(tmp_path / ("x" * 5000), make_config(tree))

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(RunError, match=r"^cannot lock .*run/.lock: No locks available$"),
        run.lock(),
    ):
        pass


def test_errors_in_a_run_s_own_config_name_the_file(run):
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("steps: 20", "steps: none"))
    message = rf"^{run.config_file}: training.steps is 'none', expected"
    with pytest.raises(ConfigError, match=message):
        run.config()
    run.config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"^training.steps is 0, expected"):
        run.config(["training.steps=0"])
    assert run.config(["training.steps=7"]).training.steps == 7


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


def test_folders_are_counted(tmp_path):
    path = tmp_path / "runs" / "copy-sam"
    names = [claim_folder(path).name for _ in range(3)]
    assert names == ["copy-sam", "copy-sam-2", "copy-sam-3"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file: File exists"):
        claim_folder(tmp_path / "file" / "copy-sam")


def test_who_asks_at_the_same_time_gets_a_folder_of_his_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim_folder, [tmp_path / "run"] * 40))
    assert len(set(claimed)) == 40
    assert all(path.is_dir() for path in claimed)


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


def read_all(terminal):
    """What was written to a terminal whose other end is closed; Linux ends it with an error."""
    parts = []
    with open(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while part := file.read(10_000):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_without_a_width_gets_lines(columns):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    with open(writer, "w") as stream:
        progress = Progress(10, 0, "wrong bits", stream)
        progress.log(5, VALUES)
        progress.close()
    shown = read_all(reader)
    assert ("step 5/10: loss 0.2500" in shown) == (columns == 0)
    assert ("0/10 [" in shown) == (columns == 80)


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    stream.fileno = lambda: 99
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((120, 24)))
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

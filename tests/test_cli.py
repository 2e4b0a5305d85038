import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsemem.cli import INTERRUPTED, app
from sparsemem.console import USER_ERROR
from sparsemem.models.registry import MODELS
from sparsemem.tasks import TASKS

pytestmark = pytest.mark.usefixtures("plain_errors")
ROOT = Path(__file__).parent.parent
CONFIG = """
model: {name: sam, hidden_size: 12, num_slots: 1048576, slot_dim: 6, num_heads: 1, top_k: 2}
task: {name: copy, bits: 3, max_level: 4}
training: {steps: 12, batch_size: 2, log_every: 4, evaluate_every: 6, checkpoint_every: 6}
evaluation: {batches: 2, batch_size: 4}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return str(path)


def sparsemem(*arguments, code=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result


def test_train_eval_plot_resume(config):
    result = sparsemem("train", config)
    assert "model SAM" in result.stderr
    assert re.search(r"step 12/12: loss \d\.\d+, wrong bits \d", result.stderr)
    assert "next: sparsemem eval runs/tiny, sparsemem plot runs/tiny" in result.stderr
    run = Path("runs/tiny")
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "validation", "train", "train", "validation"]

    result = sparsemem("eval", "runs/tiny", "--set", "evaluation.level=7")
    line = result.stdout.splitlines()[-1]
    written = json.loads((run / "eval.json").read_text())
    assert line == f"wrong bits a sequence: {written['metric']:.4g} (level 7, 8 sequences)"
    assert 15 <= written["touched"] <= 17  # a fresh slot a step, and rows read before one is full

    result = sparsemem("plot", "runs/tiny")
    files = [Path(line) for line in result.stdout.splitlines()]
    assert [file.name for file in files] == ["memory.png", "learning.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)

    result = sparsemem("train", "--resume", "runs/tiny", "--set", "training.steps=14")
    assert "going on from step 12" in result.stderr
    result = sparsemem("train", config, "--resume", "runs/tiny", "--set", "training.steps=15")
    assert "going on from step 14" in result.stderr
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "step-00000015"

    sparsemem("train", config, "--run", "mine")
    assert (Path("mine") / "config.yaml").exists()


def test_models_and_tasks_are_listed_with_their_options():
    listed = sparsemem("models").stdout
    assert all(re.search(rf"^{name} +\w", listed, re.M) for name in MODELS)
    assert re.search(r"^    num_slots +1048576$", listed, re.M)
    assert re.search(r"^    hidden_size +required$", listed, re.M)
    listed = sparsemem("tasks").stdout
    assert all(re.search(rf"^{name} +\w", listed, re.M) for name in TASKS)
    assert re.search(r"^    path +required$", listed, re.M)
    assert not re.search(r"^    seed ", listed, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "expected CONFIG.yaml to train, or --resume RUN to go on with a run"),
        (["train", "nope.yaml"], "cannot read config nope.yaml: No such file or directory"),
        (["train", "tiny.yaml", "--resume", "x", "--run", "y"], "--run and --resume: expected one"),
        (
            ["train", "tiny.yaml", "--set", "training.stepz=3"],
            "unknown key training.stepz: did you",
        ),
        (["train", "tiny.yaml", "--set", "foo"], "--set foo: expected key=value"),
        (["train", "tiny.yaml", "--run", "full"], "run folder full is not empty: choose another"),
        (["train", "--resume", "nope"], "run folder nope does not exist"),
        (["eval", "full"], "full is not a run folder: it has no config.yaml"),
        (["plot", "nope"], "run folder nope does not exist"),
    ],
)
def test_errors_are_one_line_without_a_traceback(config, arguments, message):
    Path("full").mkdir()
    Path("full/file").write_text("")
    result = sparsemem(*arguments, code=USER_ERROR)
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not Path("runs").exists(), "nothing was made"


@pytest.mark.parametrize(
    "settings",
    [
        ["model={name: dnc, hidden_size: 4, num_slots: 10000000000, slot_dim: 1000}"],
        ["model={name: lstm, hidden_size: 10000000000}"],
        ["model.hidden_size=100000000000000000000000"],
        ["task.bits=100000000000000000000000"],
        ["evaluation.level=99999999999999999999"],
        ["task.max_level=100000000000000", "curriculum.minimum=100000000000000"],
    ],
)
def test_what_does_not_fit_in_memory_is_one_line(config, settings):
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = sparsemem("train", config, "--run", "run", *arguments, code=USER_ERROR)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "the config does not fit in memory" in line


def test_plan_says_what_a_config_takes_and_makes_nothing(config):
    shown = sparsemem("plan", config).stdout
    assert re.search(r"^memory +[\d.]+ [MG]iB of [\d.]+ \w+$", shown, re.M)
    assert re.search(r"^  training step +[\d.]+ \w+ = .*parameters ", shown, re.M)
    assert re.search(r"^time +[\d.]+ ms a training step", shown, re.M)
    found = json.loads(sparsemem("plan", config, "--json").stdout)
    assert found["network"] == {"workers": 1, "bytes_a_step": 0}
    assert found["seconds"]["total"] == pytest.approx(12 * found["seconds"]["step"])
    large = sparsemem("plan", config, "--set", "task.max_level=100000000").stdout
    assert "DOES NOT FIT" in large.splitlines()[0]
    assert not Path("runs").exists()


def test_train_refuses_what_cannot_fit_with_the_sum_before_it_makes_anything(config):
    result = sparsemem("train", config, "--set", "task.max_level=100000000", code=USER_ERROR)
    assert re.match(
        r"error: the config does not fit in memory: a training step needs [\d.]+ \w+ = activations"
        r" .*, the machine has [\d.]+ \w+\n$",
        result.stderr,
    )
    assert not Path("runs").exists()


def test_a_relative_data_path_holds_in_another_folder(config, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "en"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        text = "1 Mary has milk.\n2 What has Mary?\tmilk\t1\n" * 4
        (folder / f"qa1_x_{part}.txt").write_text(text)
    task = "task={name: babi, path: data, variant: en, tasks: [1], validation_fraction: 0.25}"
    model = "model={name: lstm, hidden_size: 4}"
    sparsemem("train", config, "--run", "run", "--set", task, "--set", model)
    monkeypatch.chdir(folder)
    result = sparsemem("eval", str(tmp_path / "run"), "--set", "evaluation.batches=null")
    assert re.search(r"^  task 1 +error rate \d", result.stdout, re.M)


def test_errors_in_a_run_s_config_name_it(config):
    sparsemem("train", config, "--run", "run")
    file = Path("run/config.yaml")
    file.write_text(file.read_text().replace("steps: 12", "stepz: 12"))
    for arguments in (["eval", "run"], ["train", "--resume", "run"], ["plot", "run"]):
        result = sparsemem(*arguments, code=USER_ERROR)
        assert result.stderr.startswith("error: run/config.yaml: unknown key training.stepz: ")


def test_a_damaged_checkpoint_is_refused_by_resume_and_eval(config):
    sparsemem("train", config, "--run", "run")
    file = Path("run/checkpoints/step-00000012/tensors.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    metrics = Path("run/metrics.jsonl").read_bytes()
    for arguments in (["train", "--resume", "run"], ["eval", "run", "--checkpoint", "last"]):
        result = sparsemem(*arguments, code=USER_ERROR)
        assert result.stderr.startswith(f"error: {file} is torn: ")
    assert Path("run/metrics.jsonl").read_bytes() == metrics


def test_plot_without_matplotlib_says_what_to_install(config, monkeypatch):
    sparsemem("train", config, "--run", "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "sparsemem.training.plots", raising=False)
    monkeypatch.delattr(sys.modules["sparsemem.training"], "plots", raising=False)
    result = sparsemem("plot", "run", code=USER_ERROR)
    assert "matplotlib, which is not installed: pip install 'sparsemem[viz]'" in result.stderr


def test_eval_takes_the_best_checkpoint_unless_told(config):
    sparsemem("train", config, "--run", "run", "--set", "training.steps=14")  # none validates 14
    best = json.loads(Path("run/checkpoints/step-00000014/manifest.json").read_text())["best"]
    for arguments, step in (([], best["step"]), (["--checkpoint", "last"], 14)):
        result = sparsemem("eval", "run", *arguments)
        assert result.stdout.startswith(f"checkpoint of step {step}, test split\n")
        assert json.loads(Path("run/eval.json").read_text())["step"] == step
    assert best["step"] in (6, 12)


@pytest.mark.slow
def test_runs_started_at_the_same_time_get_a_folder_each(config):
    command = [sys.executable, "-m", "sparsemem.cli", "train", config]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) for _ in range(2)]
    for process in runs:
        _, shown = process.communicate()
        assert process.returncode == 0, shown.decode()
    for name in ("tiny", "tiny-2"):
        assert steps_of(f"runs/{name}") == [4, 6, 8, 12, 12]


def test_eval_shows_its_result_before_it_fails_to_write_it(config):
    sparsemem("train", config, "--run", "run")
    Path("run/eval.json").mkdir()
    result = sparsemem("eval", "run", code=USER_ERROR)
    assert result.stdout.splitlines()[-1].startswith("wrong bits a sequence: ")
    assert re.match(r"error: cannot write run/.*eval.json.*: Is a directory\n$", result.stderr)


def test_ctrl_c_saves_says_how_to_go_on_and_going_on_works(config):
    """And a run that is started meanwhile gets a folder of its own."""
    settings = ["--set", "training.steps=100000", "--set", "training.evaluate_every=null"]
    command = [sys.executable, "-m", "sparsemem.cli", "train", config, *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if line.startswith("step 8/"):
                sparsemem("train", config)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == INTERRUPTED
    assert "go on with: sparsemem train --resume runs/tiny\n" in rest
    assert "Traceback" not in rest
    assert steps_of("runs/tiny-2") == [4, 6, 8, 12, 12]
    step = int(re.search(r"saved runs/tiny/checkpoints/step-(\d+)", rest).group(1))
    result = sparsemem("train", "--resume", "runs/tiny", "--set", f"training.steps={step + 1}")
    assert f"going on from step {step}" in result.stderr
    steps = steps_of("runs/tiny")
    assert steps == sorted(set(steps)), "no line twice"


def steps_of(run):
    return [
        json.loads(line)["step"] for line in Path(run, "metrics.jsonl").read_text().splitlines()
    ]

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from sparsemem.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from sparsemem.training.config import make_config, override
from sparsemem.training.errors import CheckpointError, ConfigError, RunError
from sparsemem.training.evaluate import Result
from sparsemem.training.launch import evaluate_run, resume
from sparsemem.training.progress import Progress
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Outcome, Trainer

pytestmark = pytest.mark.usefixtures("plain_errors")
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


CHANGES = {
    "adam": {},
    "schedule": {"schedule": {"name": "cosine", "warmup": 3}},
    "truncated": {"truncate": 3},
    "rmsprop": {"optimizer": {"name": "rmsprop", "learning_rate": 0.01, "momentum": 0.9}},
    "double": {"dtype": "float64"},
    "dropout": {},  # which draws from torch's random state
}


@pytest.mark.parametrize(
    ("model", "change"),
    [*(("sam", change) for change in CHANGES), *(("dnc", c) for c in CHANGES if c != "dropout")],
)
def test_resume_is_bit_for_bit(tree, new_run, stop_at, model, change):
    if model == "dnc":
        tree["model"] = {"name": "dnc", "hidden_size": 10, "num_slots": 8, "slot_dim": 4}
    elif change == "dropout":
        tree["model"]["bypass_dropout"] = 0.4
    tree["training"] |= CHANGES[change]
    tree["curriculum"] = {"name": "exponential", "threshold": 5.0, "window": 6}
    trainer, whole = new_run("whole", tree)
    assert train(trainer, whole) is Outcome.FINISHED
    expected = contents(whole)
    assert [r["step"] for r in expected[2] if r["kind"] == "train"] == [4, 8, 12, 16, 20]
    assert json.loads(expected[1])["curriculum"]["hardest"] == 4

    # Ctrl-C in the middle of a logging window, twice; the process forgets everything.
    trainer, parts = new_run("parts", tree)
    for steps in (7, 6):
        stop = stop_at(steps, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train(trainer, parts, stop) is Outcome.INTERRUPTED
        torch.manual_seed(123)
        trainer = Trainer(prepare(parts.config()))
        trainer.restore(parts.newest_checkpoint())
    assert trainer.step == 13
    parts.cut_metrics(13)
    assert train(trainer, parts) is Outcome.FINISHED
    assert_same(contents(parts), expected)


def test_resume_after_a_crash_cuts_what_the_checkpoint_does_not_know(tree, new_run, stop_at):
    trainer, whole = new_run("whole", tree)
    train(trainer, whole)
    trainer, crashed = new_run("crashed", tree)

    class Crash(BaseException):
        pass

    def crash():
        raise Crash

    with pytest.raises(Crash):
        train(trainer, crashed, stop_at(18, crash))
    assert [step for step, _ in list_checkpoints(crashed.checkpoints)][-1] < 16
    assert crashed.metrics()[-1]["step"] == 16
    with open(crashed.metrics_file, "a") as file:
        file.write('{"kind": "train", "st')  # torn by the crash
    assert resume(crashed, crashed.config(), lambda line: None) is Outcome.FINISHED
    assert_same(contents(crashed), contents(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave_and_handlers_come_back(tree, new_run, stop_at, number):
    before = signal.getsignal(number)
    trainer, run = new_run("run", tree)
    outcome = train(trainer, run, stop_at(3, lambda: os.kill(os.getpid(), number)))
    assert outcome is Outcome.INTERRUPTED
    assert list_checkpoints(run.checkpoints)[-1][0] == 3
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once(tree, new_run, stop_at):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer, run = new_run("run", tree)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, run, stop_at(3, twice))
    assert list_checkpoints(run.checkpoints) == []


class SignalInSay(Progress):
    """Is sent a signal in the middle of a line, and refuses a line within a line as files do."""

    def __init__(self):
        super().__init__(20, 0, "wrong bits")
        self.lines, self.saying = [], False

    def say(self, line):
        if self.saying:
            raise RuntimeError("reentrant call")
        self.saying = True
        if line.startswith("step 4/"):
            os.kill(os.getpid(), signal.SIGINT)
        self.lines.append(line)
        self.saying = False


def test_a_signal_in_the_middle_of_a_line_saves(tree, new_run):
    trainer, run = new_run("run", tree)
    progress = SignalInSay()
    assert train(trainer, run, progress) is Outcome.INTERRUPTED
    assert list_checkpoints(run.checkpoints)[-1][0] == 4
    assert progress.lines[-1].startswith("asked to stop: saving; once more leaves at once")


def test_training_in_another_thread_needs_no_signals(tree, new_run):
    trainer, run = new_run("run", tree)
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(train(trainer, run)))
    thread.start()
    thread.join()
    assert outcomes == [Outcome.FINISHED]


def test_a_diverged_run_names_step_and_checkpoint_and_keeps_them(tree, new_run, stop_at):
    trainer, run = new_run("run", tree)
    good = run.checkpoints / "step-00000005"

    def poison():
        with torch.no_grad():
            trainer.model.output.bias.fill_(float("nan"))

    message = (
        rf"the loss is nan at step 8 \(level \d\); the last checkpoint is {good}; a new run with"
    )
    with pytest.raises(RunError, match=message):
        train(trainer, run, stop_at(7, poison))
    assert list_checkpoints(run.checkpoints) == [(5, good)]
    assert all(t.isfinite().all() for t in load_checkpoint(good).part("model").values())


@pytest.mark.parametrize("due", ["evaluate_every", "checkpoint_every"])
def test_broken_parameters_are_neither_validated_nor_saved(tree, new_run, stop_at, due):
    tree["training"] |= {"evaluate_every": None, "checkpoint_every": 3} | {due: 3}
    trainer, run = new_run("run", tree)

    def poison():
        with torch.no_grad():
            trainer.model.output.bias.fill_(float("inf"))

    message = {
        "evaluate_every": r"^the validation loss is (nan|inf) at step 6; the last checkpoint is ",
        "checkpoint_every": r"^parameter output.bias is not finite after step 6; the last check",
    }[due]
    with pytest.raises(RunError, match=message):
        train(trainer, run, stop_at(6, poison))
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [3]


def test_stop_below_ends_the_run_and_stays_ended(tree, new_run):
    tree["training"] |= {"stop_below": 1000.0}
    trainer, run = new_run("run", tree)
    assert train(trainer, run) is Outcome.REACHED
    assert trainer.step == 5
    assert resume(run, run.config(), lambda line: None) is Outcome.REACHED
    assert run.newest_checkpoint().name == "step-00000005"


def test_stop_below_is_not_reached_by_a_metric_at_it(tree, new_run, monkeypatch):
    metrics = iter([3.0, 2.0, 1.99])

    def measured(*args, split, level, batches):
        return Result(split, level, 8, "wrong bits", next(metrics), 0.5, 9.0, None)

    monkeypatch.setattr("sparsemem.training.trainer.evaluate", measured)
    tree["training"] |= {"stop_below": 2.0}
    trainer, run = new_run("run", tree)
    assert train(trainer, run) is Outcome.REACHED
    assert trainer.step == 15


def test_the_best_checkpoint_is_that_of_the_lowest_validation(tree, new_run):
    tree["training"] |= {"steps": 60, "evaluate_every": 3, "keep_checkpoints": 1}
    trainer, run = new_run("run", tree)
    train(trainer, run)
    validations = [r for r in run.metrics() if r["kind"] == "validation"]
    best = min(validations, key=lambda record: (record["metric"], record["step"]))
    assert run.best_checkpoint().name == f"step-{best['step']:08d}"
    kept = {step for step, _ in list_checkpoints(run.checkpoints)}
    assert kept == {best["step"], 60}


def test_the_last_k_checkpoints_are_kept(tree, new_run):
    tree["training"] |= {"evaluate_every": None, "checkpoint_every": 4, "keep_checkpoints": 2}
    trainer, run = new_run("run", tree)
    train(trainer, run)
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [16, 20]
    assert run.best_checkpoint() == run.newest_checkpoint()


def test_metrics_are_means_since_the_last_record(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    tree["training"]["log_every"] = 1
    trainer, fine = new_run("fine", tree)
    train(trainer, fine)
    losses = [r["loss"] for r in fine.metrics() if r["kind"] == "train"]
    coarse = [r["loss"] for r in run.metrics() if r["kind"] == "train"]
    assert coarse == pytest.approx([sum(losses[i : i + 4]) / 4 for i in range(0, 20, 4)])
    record = run.metrics()[0]
    names = "kind step loss metric touched gradient_norm level learning_rate seconds"
    assert set(record) == set(names.split())


def test_tensorboard_gets_the_same_numbers(tree, new_run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, run = new_run("run", tree)
    train(trainer, run)
    events = reader.EventAccumulator(str(run.events))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(r["step"], r["loss"]) for r in run.metrics() if r["kind"] == "train"]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected])


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(tree, new_run, monkeypatch):
    trainer, run = new_run("run", tree)
    replace = os.replace

    def full(source, target):
        if str(target).endswith("step-00000010"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="step-00000010: No space left on device"):
        train(trainer, run)
    monkeypatch.undo()
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [5]
    load_checkpoint(run.newest_checkpoint())


def test_a_resumed_run_keeps_its_config(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    before = run.metrics_file.read_bytes(), run.config_file.read_bytes()
    tree["training"]["optimizer"]["learning_rate"] = 0.5
    message = r"^training.optimizer.learning_rate is 0.5, expected 0.01 as in .*config.yaml: a resu"
    with pytest.raises(ConfigError, match=message):
        resume(run, make_config(tree))
    assert (run.metrics_file.read_bytes(), run.config_file.read_bytes()) == before


def test_more_steps_are_the_same_as_asked_for_at_once(tree, new_run):
    trainer, whole = new_run("whole", tree)
    train(trainer, whole)
    tree["training"]["steps"] = 10
    trainer, parts = new_run("parts", tree)
    train(trainer, parts)
    tree["training"]["steps"] = 20
    resume(parts, make_config(tree), lambda line: None)
    assert_same(contents(parts), contents(whole))
    assert parts.config().training.steps == 20


def test_a_checkpoint_of_another_model_changes_nothing(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    tree["model"]["hidden_size"] = 13
    trainer, _ = new_run("other", tree)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    message = r"step-00000020 is of another model: parameter .* expected torch.float32 \[52, 16\]"
    with pytest.raises(CheckpointError, match=message):
        trainer.restore(run.newest_checkpoint())
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    tree["model"] = {"name": "lstm", "hidden_size": 12}
    trainer, _ = new_run("third", tree)
    with pytest.raises(CheckpointError, match=r"is of model 'sam', expected 'lstm'"):
        trainer.restore(run.newest_checkpoint())


def test_a_model_is_refused_by_a_task_whose_words_have_other_ids(babi_tree, new_run):
    babi_tree["task"]["tasks"] = [1]
    trainer, run = new_run("run", babi_tree)
    train(trainer, run)
    assert evaluate_run(run, run.config(), "last")[1] == 20
    before = run.metrics_file.read_bytes()
    other = make_config(override(run.config().model_dump(), ["task.tasks=[2]"]))
    message = r"step-000000\d\d was trained on inputs of another meaning: identity of its task"
    with pytest.raises(CheckpointError, match=message):
        evaluate_run(run, other)
    for file in (Path(babi_tree["task"]["path"]) / "en").glob("qa1*"):
        file.write_text(file.read_text().replace("milk", "beer"))
    with pytest.raises(CheckpointError, match=message):
        resume(run, run.config(), lambda line: None)
    assert run.metrics_file.read_bytes() == before


def test_a_damaged_newest_checkpoint_names_the_one_before(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    newest = run.newest_checkpoint()
    file = newest / "tensors.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    steps = [step for step, _ in list_checkpoints(run.checkpoints)]
    message = rf"is torn: .*; remove {newest} to go on from step-{steps[-2]:08d}$"
    for go_on in (resume, lambda run, config: evaluate_run(run, config, "last")):
        with pytest.raises(CheckpointError, match=message):
            go_on(run, run.config())
    file.write_bytes(whole)
    (newest / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json is torn: .*; remove .*20 to go on"):
        evaluate_run(run, run.config(), "best")
    shutil.rmtree(newest)
    assert resume(run, run.config(), lambda line: None) is Outcome.FINISHED
    assert (newest / "tensors.safetensors").read_bytes() == whole


def test_the_only_checkpoint_is_not_said_to_be_removed(tree, new_run):
    tree["training"] |= {"evaluate_every": None, "keep_checkpoints": 1}
    trainer, run = new_run("run", tree)
    train(trainer, run)
    (run.newest_checkpoint() / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is torn: 0 bytes, expected \d+$"):
        resume(run, run.config())


def test_a_missing_best_checkpoint_is_named(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    trainer.best = {"step": 3, "metric": 0.0}
    trainer.step, trainer._saved = 21, None
    tensors, state = trainer.state()
    save_checkpoint(run.checkpoints, 21, tensors, state)
    with pytest.raises(RunError, match=r"^the best checkpoint .*step-00000003 is gone; take the"):
        evaluate_run(run, run.config())


def test_evaluation_takes_the_best_checkpoint_unless_told(tree, new_run):
    tree["training"] |= {"steps": 60, "evaluate_every": 3, "keep_checkpoints": 1, "seed": 1}
    tree["training"]["optimizer"]["learning_rate"] = 0.1
    trainer, run = new_run("run", tree)
    train(trainer, run)
    assert trainer.best["step"] < 60, "the last checkpoint is not the best one"
    result, step = evaluate_run(run, run.config(), split="validation")
    assert (step, result.metric) == (trainer.best["step"], trainer.best["metric"])
    assert evaluate_run(run, run.config(), "last")[1] == 60


def test_fewer_steps_than_are_done_are_refused(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    before = run.config_file.read_bytes()
    tree["training"]["steps"] = 19
    with pytest.raises(
        ConfigError, match=r"^training.steps is 19, expected at least 20, the steps"
    ):
        resume(run, make_config(tree))
    assert run.config_file.read_bytes() == before


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_steps_that_the_schedule_depends_on_stay(tree, new_run, name):
    tree["training"]["schedule"] = {"name": name}
    trainer, run = new_run("run", tree)
    train(trainer, run)
    tree["training"]["steps"] = 30
    message = rf"^training.steps is 30, expected 20 as in .*: the {name} schedule depends on it$"
    with pytest.raises(ConfigError, match=message):
        resume(run, make_config(tree))


def test_the_learning_rate_follows_its_schedule_and_is_recorded(tree, new_run):
    tree["training"] |= {"log_every": 1, "schedule": {"name": "linear", "warmup": 4}}
    trainer, run = new_run("run", tree)
    rates = []
    hook = trainer.optimiser.register_step_pre_hook(
        lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"])
    )
    train(trainer, run)
    hook.remove()
    expected = [0.0025, 0.005, 0.0075, 0.01, *(0.01 * (1 - i / 15) for i in range(16))]
    assert rates == pytest.approx(expected)
    recorded = [r["learning_rate"] for r in run.metrics() if r["kind"] == "train"]
    assert recorded == pytest.approx(expected)


def test_two_trainers_on_one_run_are_refused(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    with run.lock(), pytest.raises(RunError, match=r"is being trained by another process"):
        resume(RunFolder.open(run.path), run.config())


def test_evaluation_of_a_run_is_repeatable(tree, new_run):
    trainer, run = new_run("run", tree)
    train(trainer, run)
    result, step = evaluate_run(run, run.config(), "last")
    assert step == 20
    assert (result.split, result.level, result.sequences) == ("test", 4, 8)
    assert result == evaluate_run(run, run.config(), "last")[0]
    validation = evaluate_run(run, run.config(), "last", "validation")[0]
    recorded = [r for r in run.metrics() if r["kind"] == "validation"][-1]
    assert (validation.metric, validation.loss) == (recorded["metric"], recorded["loss"])


def test_the_thread_count_is_set(tree, new_run):
    tree["training"]["threads"] = 2
    try:
        new_run("run", tree)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)

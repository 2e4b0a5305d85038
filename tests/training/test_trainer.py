import json
import os
import signal
import threading

import pytest
import torch

from sparsemem.training.checkpoint import list_checkpoints, load_checkpoint
from sparsemem.training.errors import CheckpointError, RunError
from sparsemem.training.evaluate import Result
from sparsemem.training.launch import resume
from sparsemem.training.progress import Progress
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Outcome, Trainer
from tests.training.runs import assert_same, contents, train

pytestmark = pytest.mark.usefixtures("plain_errors")


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


@pytest.fixture
def usual_ctrl_c():
    """As in a terminal: what a shell starts in the background does not hear it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_a_second_ctrl_c_leaves_at_once(tree, new_run, stop_at):
    def twice():
        for _ in range(2):  # one after the other: two that wait to be heard are one
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

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


def test_the_learning_rate_follows_its_schedule_and_is_recorded(tree, new_run):
    tree["training"] |= {"log_every": 1, "schedule": {"name": "linear", "warmup": 4}}
    trainer, run = new_run("run", tree)
    rates = []
    hook = trainer.optimisers.each[0].register_step_pre_hook(
        lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"])
    )
    train(trainer, run)
    hook.remove()
    expected = [0.0025, 0.005, 0.0075, 0.01, *(0.01 * (1 - i / 15) for i in range(16))]
    assert rates == pytest.approx(expected)
    recorded = [r["learning_rate"] for r in run.metrics() if r["kind"] == "train"]
    assert recorded == pytest.approx(expected)


def test_the_thread_count_is_set(tree, new_run):
    tree["training"]["threads"] = 2
    new_run("run", tree | {"model": {"name": "lstm", "hidden_size": 12}})
    assert torch.get_num_threads() == 2

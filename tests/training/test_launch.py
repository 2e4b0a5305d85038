import shutil
from pathlib import Path

import pytest
import torch

from sparsemem.training.checkpoint import list_checkpoints, save_checkpoint
from sparsemem.training.config import make_config, override
from sparsemem.training.errors import CheckpointError, ConfigError, RunError
from sparsemem.training.launch import evaluate_run, resume
from sparsemem.training.run import RunFolder
from sparsemem.training.trainer import Outcome
from tests.training.runs import assert_same, contents, train

pytestmark = pytest.mark.usefixtures("plain_errors")


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
    tree["model"] = {"name": "lstm", "hidden_size": 12}  # the same to the last bit everywhere
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

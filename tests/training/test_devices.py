"""Training on a GPU: what is captured, and that a run goes through there."""

import pytest
import torch

from sparsemem.models.captured import Captured
from sparsemem.training import setup
from sparsemem.training.calibration import plan_seconds
from sparsemem.training.config import dump_config, make_config, override, parse_yaml
from sparsemem.training.errors import ConfigError
from sparsemem.training.evaluate import evaluate
from sparsemem.training.launch import start
from sparsemem.training.plan import plan_memory
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import as_trained, prepare
from sparsemem.training.trainer import Outcome


@pytest.mark.parametrize(("said", "meant"), [("off", "off"), ("auto", "auto"), ("'off'", "off")])
def test_capture_is_said_as_yaml_says_it(tree, said, meant):
    config = make_config(override(tree, [f"training.capture={said}"]))
    assert config.training.capture == meant
    written = parse_yaml(dump_config(config), "here")
    assert make_config(written).training.capture == meant


def test_capture_has_two_values(tree):
    with pytest.raises(ConfigError, match=r"training\.capture is 'on', expected 'auto' or 'off'"):
        make_config(override(tree, ["training.capture='on'"]))


@pytest.mark.parametrize(
    ("device", "capture", "expected"),
    [("cpu", "auto", False), ("cuda", "auto", True), ("cuda", "off", False)],
)
def test_sequences_are_captured_on_a_gpu_unless_that_is_off(
    tree, monkeypatch, device, capture, expected
):
    tree["training"]["capture"] = capture
    made = prepare(make_config(tree))
    monkeypatch.setattr(setup, "device_of", lambda config: torch.device(device))
    trained = as_trained(made.config, made.model)
    assert isinstance(trained, Captured) == expected
    assert (trained.model if expected else trained) is made.model


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["sam", "lstm"])
def test_a_run_on_a_gpu_learns(tree, tmp_path, model):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tree["training"] |= {"device": "cuda", "steps": 30, "batch_size": 16, "log_every": 5}
    tree["task"]["max_level"] = 2
    if model == "lstm":
        tree["model"] = {"name": "lstm", "hidden_size": 32}
    run, outcome = start(make_config(tree), tmp_path / "run", announce=lambda line: None)
    assert outcome == Outcome.FINISHED
    losses = [record["loss"] for record in run.metrics() if record["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(run, RunFolder)


@pytest.mark.gpu
def test_a_plan_for_a_gpu(tree):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tree["training"]["device"] = "cuda"
    planned = plan_memory(make_config(tree))
    total = torch.cuda.get_device_properties(0).total_memory
    assert planned.plan.machine_bytes == total
    assert 0 < planned.plan.memory.step < planned.plan.memory.process < total
    assert planned.plan.memory.graphs > 0
    assert 0 < plan_seconds(planned).step < 5


@pytest.mark.gpu
def test_training_on_a_gpu_gives_what_the_cpu_gives(tree):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    results = []
    for device in ("cpu", "cuda"):
        made = prepare(make_config(override(tree, [f"training.device={device}"])))
        results.append(evaluate(made.model, made.evaluation_task, split="test", level=3, batches=2))
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4)
    assert results[1].touched == results[0].touched

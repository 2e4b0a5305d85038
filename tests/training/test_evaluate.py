import pytest
import torch

from sparsemem.models.registry import make_model
from sparsemem.tasks import make_task
from sparsemem.training.evaluate import Result, evaluate


def test_figures_are_those_of_all_sequences_together():
    task = make_task("copy", bits=3, batch_size=2)
    model = make_model("sam", input_size=4, output_size=3, hidden_size=5, slot_dim=4)
    result = evaluate(model, task, split="validation", level=3, batches=4)
    batches = list(task.evaluation_batches("validation", 4, 3))
    with torch.no_grad():
        runs = [model(batch.input) for batch in batches]
    metrics = [task.metric(run[0], batch) for run, batch in zip(runs, batches, strict=True)]
    losses = [task.loss(run[0], batch) for run, batch in zip(runs, batches, strict=True)]
    assert result.sequences == 8
    assert result.metric == pytest.approx(torch.stack(metrics).mean().item())
    assert result.loss == pytest.approx(torch.stack(losses).mean().item())
    touched = torch.cat([run[1].touched for run in runs]).double().mean().item()
    assert result.touched == pytest.approx(touched)


def test_dropout_is_off_and_the_mode_comes_back():
    task = make_task("copy", bits=3, batch_size=2)
    model = make_model("lstm", input_size=4, output_size=3, hidden_size=5)
    model.output = torch.nn.Sequential(model.output, torch.nn.Dropout(0.5))
    model.output.weight = model.output[0].weight  # the input check looks at it
    model.train()
    results = [evaluate(model, task, split="test", level=2, batches=1) for _ in range(2)]
    assert results[0] == results[1]
    assert model.training


def test_the_line_says_what_was_measured():
    result = Result("test", 20, 640, "wrong bits", 0.125, 0.1, 41.0, None)
    assert result.line() == "wrong bits a sequence: 0.125 (level 20, 640 sequences)"
    result = result._replace(metric_name="error rate")
    assert result.line() == "error rate: 0.125 (level 20, 640 sequences)"

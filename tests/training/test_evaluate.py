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


def test_parts_of_a_task_are_measured_in_one_pass_and_at_the_level(babi, monkeypatch):
    task = make_task("babi", path=babi, variant="en", tasks=[1, 2], batch_size=3)
    model = make_model(
        "lstm", input_size=task.input_size, output_size=task.output_size, hidden_size=5
    )
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()[task.word_ids["milk"]] = 1.0  # the answer of task 1
    shown = []
    model.register_forward_hook(lambda model, inputs, result: shown.append(len(inputs[0])))
    whole = evaluate(model, task, split="test", level=2)
    assert whole.per_task == {"task 1": 0.0, "task 2": 1.0}
    assert whole.metric == pytest.approx(8 / 12)
    assert (whole.sequences, sum(shown)) == (12, 12)
    questions = []
    score = type(task).score

    def count(self, output, batch):
        wrong, total = score(self, output, batch)
        questions.append(int(total))
        return wrong, total

    monkeypatch.setattr(type(task), "score", count)
    assert evaluate(model, task, split="test", level=1).per_task == whole.per_task
    assert sum(questions) == 12, "one question a story"
    assert evaluate(model, task, split="test", level=2, batches=1).per_task is None


def test_the_whole_is_that_of_all_sequences_however_it_is_cut_into_parts(babi):
    task = make_task("babi", path=babi, variant="en", tasks=[1, 2], batch_size=5)
    model = make_model(
        "lstm", input_size=task.input_size, output_size=task.output_size, hidden_size=5
    )
    parted = evaluate(model, task, split="test", level=2)
    mixed = evaluate(model, task, split="test", level=2, batches=10**6)
    assert parted.sequences == mixed.sequences == 12
    assert parted.metric == mixed.metric
    assert parted.loss == pytest.approx(mixed.loss, rel=1e-5)


def test_a_part_without_anything_in_the_split_is_left_out(babi):
    task = make_task("babi", path=babi, variant="en", tasks=[1, 2], validation_fraction=0.2)
    task.stories["validation"] = [s for s in task.stories["validation"] if s.task == 2]
    model = make_model(
        "lstm", input_size=task.input_size, output_size=task.output_size, hidden_size=5
    )
    assert list(evaluate(model, task, split="validation", level=2).per_task) == ["task 2"]


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

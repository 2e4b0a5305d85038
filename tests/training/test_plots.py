import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from sparsemem.models.base import Access
from sparsemem.models.registry import make_model
from sparsemem.tasks import make_task
from sparsemem.training.plots import (
    MOST_SLOTS,
    learning_figure,
    memory_figure,
    record,
    weights_over_time,
)


def access(read_ids, read_weights, write_ids, write_weights):
    ids = [torch.tensor([[ids]]) for ids in (read_ids, write_ids)]
    weights = [torch.tensor([[weights]]) for weights in (read_weights, write_weights)]
    return Access(ids[0], weights[0], ids[1], weights[1])


def test_weights_are_placed_by_first_use():
    steps = [
        access([9, 7], [0.75, 0.001], [9, 3], [0.5, 0.0]),
        access([3, 9], [0.25, 0.5], [3, 3], [0.25, 0.5]),
    ]
    writes, reads = weights_over_time(steps)
    # Slot 9 is used first, then 3; 7 never has a weight that counts.
    assert writes.tolist() == [[0.5, 0.0], [0.0, 0.75]]
    assert reads.tolist() == [[0.75, 0.5], [0.0, 0.25]]


def test_of_many_slots_the_most_used_are_shown():
    count = MOST_SLOTS + 5
    weights = [0.1 + 0.01 * slot for slot in range(count)]
    ids = list(range(count))
    _, reads = weights_over_time([access(ids, weights, [0], [0.0])])
    assert reads[:, 0] == pytest.approx(weights[5:], abs=1e-6)


def test_nothing_accessed_gives_empty_pictures():
    writes, reads = weights_over_time([None, None])
    assert writes.shape == reads.shape == (0, 2)


@pytest.mark.parametrize("name", ["sam", "sdnc", "dnc", "ntm", "lstm"])
def test_a_trace_is_what_the_model_does(name):
    task = make_task("copy", bits=3, batch_size=2)
    options = {} if name == "lstm" else {"num_slots": 16, "slot_dim": 4, "num_heads": 1}
    model = make_model(name, input_size=4, output_size=3, hidden_size=5, **options)
    batch = task.batch(0, 3)
    trace = record(model, task, batch)
    with torch.no_grad():
        output, state = model(batch.input[:1])
    assert np.array_equal(trace.input, batch.input[0].T.numpy())
    assert np.isnan(trace.target[:, :4]).all()
    assert np.array_equal(trace.target[:, 4:], batch.target[0, 4:].T.numpy())
    expected = output[0, 4:].sigmoid().T.numpy()
    np.testing.assert_allclose(trace.output[:, 4:], expected, rtol=1e-5)
    assert trace.touched == state.touched[0]
    assert trace.writes.shape[1] == 7
    figure = memory_figure(trace, name)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    wrong = int(((output[0, 4:] > 0) != (batch.target[0, 4:] > 0.5)).sum())
    assert f"Error: {wrong} wrong bits" in titles
    assert ("Write weights" in titles) == (name != "lstm")


def test_learning_figure_draws_both_kinds():
    kinds = [("train", 1), ("train", 2), ("validation", 2)]
    records = [
        {"kind": kind, "step": step, "loss": 0.5 / step, "metric": 2.0 / step, "level": 3.0}
        for kind, step in kinds
    ]
    loss, metric, level = learning_figure(records, "wrong bits", "SAM").axes
    assert [line.get_label() for line in loss.lines] == ["train", "validation"]
    assert loss.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]]
    assert metric.lines[1].get_xydata().tolist() == [[2, 1.0]]
    assert len(level.lines) == 1

"""How many graphs a captured model has, of what, and which gives way."""

import re
import warnings

import pytest
import torch

import sparsemem
from sparsemem.models import captured as captured_module
from tests.oracles.fake_graphs import FakeGraphs


@pytest.fixture
def graphs(monkeypatch):
    return FakeGraphs.stand_in(monkeypatch)


@pytest.fixture
def model():
    return sparsemem.SAM(3, 8, 2, num_slots=64, slot_dim=8, num_heads=2, top_k=3)


def inputs(count: int, steps: int = 5):
    return torch.randn(count, 2, steps, 3).unbind(0)


def twice(fast, steps):
    """Two sequences of a length, forward only."""
    with torch.no_grad():
        for input in inputs(2, steps=steps):
            fast(input)


def test_a_shape_that_does_not_come_any_more_gives_way(graphs, model, monkeypatch):
    monkeypatch.setattr(captured_module, "IDLE", 10)
    fast = sparsemem.captured(model, max_graphs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for steps in (1, 2, *[3, 2] * 2):  # 3 waits until 1 has not come for ten sequences
            twice(fast, steps)
        assert graphs.captured == [(2, 1, 3), (2, 2, 3)]
        twice(fast, 3)
    assert graphs.captured == [(2, 1, 3), (2, 2, 3), (2, 3, 3)]
    assert fast.num_graphs == 2
    replays = graphs.replays
    twice(fast, 2)
    twice(fast, 3)
    assert graphs.replays == replays + 4
    input = inputs(1, steps=3)[0]
    torch.testing.assert_close(fast(input)[0], model(input)[0], rtol=1e-5, atol=1e-5)


def test_shapes_that_take_turns_do_not_drive_each_other_out(graphs, model, monkeypatch):
    monkeypatch.setattr(captured_module, "IDLE", 10)
    fast = sparsemem.captured(model, max_graphs=2)
    told = r"more shapes than max_graphs = 2: those of shape \(2, 3, 3\), and others, run step by"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            for steps in (1, 2, 3, 4):
                twice(fast, steps)
    assert len(caught) == 1
    assert re.search(told, str(caught[0].message))
    assert graphs.captured == [(2, 1, 3), (2, 2, 3)]


def test_every_way_of_running_has_a_graph_of_its_own(graphs, model):
    fast = sparsemem.captured(model, max_graphs=8)
    input = inputs(1)[0]

    def twice():
        before = len(graphs.captured)
        for _ in range(2):
            fast(input)
        return len(graphs.captured) - before

    assert twice() == 1
    assert twice() == 0
    fast.eval()
    assert twice() == 1
    with torch.no_grad():
        assert twice() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert twice() == 1
    fast.train()
    assert twice() == 0
    input = input.clone().requires_grad_()
    assert twice() == 1
    model.output.weight.requires_grad_(False)
    assert twice() == 1
    model.cell.bypass.eval()
    assert twice() == 1
    input = inputs(1, steps=6)[0]
    assert twice() == 1
    assert fast.num_graphs == fast.max_graphs == 8
    input = inputs(1, steps=7)[0]
    with pytest.warns(RuntimeWarning, match="more shapes than max_graphs = 8"):
        assert twice() == 0  # as many as there may be

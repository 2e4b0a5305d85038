"""How a capture is rehearsed, recorded and given up, with a stand-in for `torch.cuda`."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import sparsemem
from sparsemem import devices
from sparsemem.models import captured as captured_module
from sparsemem.models import graphs as graphs_module
from sparsemem.models.graphs import Graphs, Room, room_on


@pytest.fixture
def model():
    return sparsemem.SAM(3, 8, 2, num_slots=64, slot_dim=8, num_heads=2, top_k=3)


class Torch:
    """Stands in for `torch.cuda`, and lists what it is asked to do."""

    def __init__(self):
        self.calls = []
        self.recorded = []  # where each graph was
        self.wait_mode = 0

    def __getattr__(self, name):
        @contextmanager
        def entered():
            self.calls.append(name)
            yield
            self.calls.append(f"end {name}")

        return lambda *_, **__: entered()

    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.recorded.append({"pool": pool, "stream": stream})
        return self.__getattr__("graph")()

    def graph_pool_handle(self):
        return "pool"

    def Stream(self, device=None):
        return f"stream of {device}"

    def synchronize(self):
        self.calls.append("synchronize")

    def current_stream(self):
        return "before"

    def set_stream(self, stream):
        self.calls.append(f"stream {stream}")

    def get_sync_debug_mode(self):
        return self.wait_mode

    def set_sync_debug_mode(self, mode):
        self.wait_mode = mode
        self.calls.append(f"waits {mode}")

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))


def test_a_capture_is_rehearsed_and_then_recorded(monkeypatch, model):
    fake = Torch()
    monkeypatch.setattr(graphs_module, "torch", SimpleNamespace(**vars(torch) | {"cuda": fake}))
    seen = []
    forward = type(model).forward

    def watched(self, input, state=None):
        seen.append((devices._rehearsed, fake.wait_mode))
        return forward(self, input, state)

    monkeypatch.setattr(type(model), "forward", watched)
    input, other = torch.randn(2, 2, 5, 3)
    graphs = Graphs(model, input, Room("pool", "stream"))
    assert seen == [(True, 0), (True, "error"), (False, 0)]
    rehearsed = ["synchronize", "stream", "waits error", "waits 0", "end stream", "synchronize"]
    recorded = ["graph", "end graph", "graph", "end graph", "stream before", "end device"]
    assert fake.calls == ["device", *rehearsed, *recorded]
    assert fake.recorded == [{"pool": "pool", "stream": "stream"}] * 2
    expected, _ = model(input)
    output, touched = graphs.forward(other)
    # What was recorded: nothing is run by this replay.
    assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not output.requires_grad
    assert len(touched) == 2
    assert torch.equal(graphs._input, other)
    found = graphs.backward(torch.ones_like(output))
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    assert_close(list(found), list(wanted), rtol=1e-5, atol=1e-5)
    assert fake.calls[-2:] == ["replay", "replay"]


def test_a_capture_that_fails_leaves_everything_as_it_was(monkeypatch, model):
    fake = Torch()
    monkeypatch.setattr(graphs_module, "torch", SimpleNamespace(**vars(torch) | {"cuda": fake}))
    monkeypatch.setattr(captured_module, "on_gpu", lambda input: True)

    def fails(self, input, state=None):
        if devices._rehearsed:
            raise ValueError("no")
        return self.original(input, state)

    model.original = model.forward
    monkeypatch.setattr(type(model), "forward", fails)
    fast = sparsemem.captured(model)
    fast(torch.randn(2, 5, 3))
    with pytest.warns(RuntimeWarning, match="step by step: ValueError: no"):
        fast(torch.randn(2, 5, 3))
    assert not devices._rehearsed
    assert fake.wait_mode == 0
    assert fake.calls[-1] == "stream before"


def test_graphs_of_a_model_share_memory_and_a_stream_of_its_device(monkeypatch):
    fake = SimpleNamespace(**vars(torch) | {"cuda": Torch()})
    monkeypatch.setattr(graphs_module, "torch", fake)
    assert room_on(torch.device("cuda:1")) == Room("pool", "stream of cuda:1")

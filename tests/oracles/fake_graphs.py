"""What stands in for CUDA graphs where there is no GPU.

With their worst habits: inputs, outputs and gradients stay where they are, and what a replay
computed is gone with the next.
"""

import torch

from sparsemem.models import captured
from sparsemem.models.graphs import Graphs


class FakeGraphs(Graphs):
    """Runs the model, and lists what was captured."""

    captured: list[tuple[int, ...]]
    replays: int
    error: Exception | None

    @classmethod
    def stand_in(cls, monkeypatch):
        """Let captured models take these for graphs, and any input for one on a GPU."""
        cls.captured, cls.replays, cls.error = [], 0, None
        monkeypatch.setattr(captured, "on_gpu", lambda input: True)
        monkeypatch.setattr(captured, "room_on", lambda device: "room")
        monkeypatch.setattr(captured, "Graphs", cls)
        return cls

    def __init__(self, model, input, room):
        if FakeGraphs.error is not None:
            raise FakeGraphs.error
        self.captured.append(tuple(input.shape))
        self._take(model, input)
        live, self._touched = self._run()
        self._output, self._gradient = live.detach().clone(), torch.zeros_like(live)
        self._gradients = tuple(torch.zeros_like(tensor) for tensor in self._trained)

    def forward(self, input):
        FakeGraphs.replays += 1
        with torch.no_grad():
            self._input.copy_(input)
        with torch.set_grad_enabled(bool(self._trained)):
            self._live, touched = self._run()
        self._output.copy_(self._live.detach())
        self._touched.copy_(touched)
        return self._output, self._touched

    def backward(self, gradient):
        self._gradient.copy_(gradient)
        for place, found in zip(self._gradients, self._gradients_of(self._live), strict=True):
            place.copy_(found)
        return self._gradients

"""The contracts of cells and models, and the loop over time."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem import devices
from sparsemem.checks import check_finite, check_like, check_size
from sparsemem.models.precision import is_autocast


class Access(NamedTuple):
    """What one step read and wrote: slot ids and weights, S entries a head."""

    read_ids: Int[Tensor, "B H S"]
    read_weights: Float[Tensor, "B H S"]
    write_ids: Int[Tensor, "B G U"]
    write_weights: Float[Tensor, "B G U"]


class State(Protocol):
    """What a cell carries from step to step: a NamedTuple with these members."""

    @property
    def batch_size(self) -> int:
        """Number of sequences."""

    @property
    def touched(self) -> Int[Tensor, " B"]:
        """Slots touched so far."""

    @property
    def access(self) -> Access | None:
        """What the last step read and wrote."""

    def detach(self) -> State:
        """The same state, cut from what came before: truncated BPTT."""

    def clone(self) -> State:
        """A copy that can be advanced on its own."""

    def to(self, *args: Any, **kwargs: Any) -> State:
        """A detached copy on another device or of another floating dtype."""


class Cell(nn.Module):
    """One step of a memory network: controller, interface, write, read.

    Subclasses set the four and implement `initial_state` and `forward`.
    """

    state_type: type[Any]
    input_size: int
    hidden_size: int
    feature_size: int

    def initial_state(self, batch_size: int) -> Any:
        """State before the first step, on the device and dtype of the parameters."""
        raise NotImplementedError

    def check_state(self, state: Any, batch_size: int) -> None:
        """Refuse a state of another model or batch size before anything changes."""
        expected = self.state_type
        if type(state) is not expected:
            raise TypeError(
                f"state is a {type(state).__name__}, {type(self).__name__} expects"
                f" {expected.__name__}"
            )
        if state.batch_size != batch_size:
            raise ValueError(
                f"state has batch size {state.batch_size}, input has batch size {batch_size}"
            )

    def forward(self, input: Float[Tensor, "B X"], state: Any) -> tuple[Float[Tensor, "B F"], Any]:
        """One step: (features, next state)."""
        raise NotImplementedError

    def sequence(
        self, input: Float[Tensor, "B T X"], state: Any
    ) -> tuple[Float[Tensor, "B n F"], Any] | None:
        """Several steps at once, as many as can be: (features, next state), as step by step.

        None, with nothing done, where the next step has to be taken by itself.
        """
        return None


class MemoryModel(nn.Module):
    """A cell looped over time, and one output layer over its features."""

    def __init__(self, cell: Cell, output_size: int) -> None:
        super().__init__()
        self.cell = cell
        self.output_size = check_size("output_size", output_size)
        self.output = nn.Linear(cell.feature_size, output_size)

    @property
    def input_size(self) -> int:
        """Width of one input step."""
        return self.cell.input_size

    def initial_state(self, batch_size: int) -> Any:
        """State before the first step of `batch_size` sequences."""
        return self.cell.initial_state(check_size("batch_size", batch_size))

    def forward(
        self, input: Float[Tensor, "B T X"], state: Any = None
    ) -> tuple[Float[Tensor, "B T Y"], Any]:
        """Run T steps: (output, state after the last step). The batch comes first."""
        self._check_input(input)
        if state is None:
            state = self.initial_state(input.shape[0])
        else:
            self.cell.check_state(state, input.shape[0])
        features, at, steps = [], 0, input.unbind(1)
        while at < len(steps):
            taken = self.cell.sequence(input[:, at:], state) if at + 1 < len(steps) else None
            if taken is None:
                feature, state = self.cell(steps[at], state)
                taken = feature.unsqueeze(1), state
            part, state = taken
            features.append(part)
            at += part.shape[1]
        return self.output(torch.cat(features, 1)), state

    def _check_input(self, input: Tensor) -> None:
        if input.ndim != 3 or input.shape[2] != self.input_size or 0 in input.shape:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected [batch, steps, {self.input_size}]"
                " with at least one sequence and one step"
            )
        # What a layer before this one gives under autocast is as good as the parameters' dtype.
        mixed = is_autocast(input) and input.dtype == torch.get_autocast_dtype(input.device.type)
        if not mixed:
            check_like("input", input, self.output.weight)
        if not devices.is_capturing(input):
            check_finite("input", input)  # on a device: the one wait of a call

"""The baseline: an LSTM without a memory, behind the same interface."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.checks import check_like, check_size
from sparsemem.models.base import Cell, MemoryModel
from sparsemem.models.controller import lstm_cell, map_tensors, mover
from sparsemem.models.precision import outside_autocast


class LSTMState(NamedTuple):
    """Hidden and cell state; zero before the first step."""

    hidden: Float[Tensor, "B hidden"]
    memory: Float[Tensor, "B hidden"]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return int(self.hidden.shape[0])

    @property
    def touched(self) -> Int[Tensor, " B"]:
        """Slots touched so far: none, there are no slots."""
        return self.hidden.new_zeros(self.batch_size, dtype=torch.int64)

    @property
    def access(self) -> None:
        """Nothing is read or written."""
        return None

    def detach(self) -> LSTMState:
        """The same values, cut from the graph."""
        return LSTMState(*(tensor.detach() for tensor in self))

    def clone(self) -> LSTMState:
        """A copy that shares no storage; gradients flow through it."""
        return LSTMState(*(tensor.clone() for tensor in self))

    def to(self, *args: Any, **kwargs: Any) -> LSTMState:
        """A detached copy on another device or of another floating dtype (as `Module.to`)."""
        return LSTMState(*map_tensors(mover(self.hidden, *args, **kwargs), tuple(self)))


def check_lstm_state(state: LSTMState, hidden_size: int, weight: Tensor) -> None:
    """Refuse a state of another width, dtype or device."""
    if state.hidden.shape[1] != hidden_size:
        raise ValueError(
            f"state has hidden_size = {state.hidden.shape[1]}, the model has {hidden_size}"
        )
    check_like("state", state.hidden, weight)


class LSTMCell(Cell):
    """One LSTM step; the features are h_t."""

    state_type = LSTMState

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.feature_size = hidden_size
        self.lstm = lstm_cell(input_size, hidden_size)

    def initial_state(self, batch_size: int) -> LSTMState:
        """Zeros."""
        zeros = self.lstm.weight_hh.new_zeros(batch_size, self.hidden_size)
        return LSTMState(zeros, zeros)

    def check_state(self, state: Any, batch_size: int) -> None:
        """Refuse a state of another model, batch size, dtype or device."""
        super().check_state(state, batch_size)
        check_lstm_state(state, self.hidden_size, self.lstm.weight_hh)

    def forward(
        self, input: Float[Tensor, "B X"], state: LSTMState
    ) -> tuple[Float[Tensor, "B F"], LSTMState]:
        """Advance one step."""
        parts = self.lstm(input, tuple(state))
        state = outside_autocast(LSTMState, self.lstm.weight_hh, *parts)
        return state.hidden, state


class LSTM(MemoryModel):
    """An LSTM and an output layer: the baseline of the memory models (Hochreiter 1997).

    `output [B, T, output_size], state = model(input [B, T, input_size], state=None)`.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__(LSTMCell(input_size, hidden_size), output_size)

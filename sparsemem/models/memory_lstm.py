"""MemoryLSTM: an LSTM whose hidden states read a bank, all steps of a call in one read."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsemem.bank.contract import Bank
from sparsemem.checks import check_size
from sparsemem.layers.memory_layer import MemoryLayer
from sparsemem.models.base import Cell, MemoryModel
from sparsemem.models.lstm import LSTMState, check_lstm_state
from sparsemem.models.precision import outside_autocast

NUM_HEADS, TOP_K = 4, 8
TEMPERATURE = 0.1  # suits cosines, which a bank scores by unless told otherwise


class MemoryLSTMCell(Cell):
    """An LSTM, and what its hidden state reads from a bank: the features are [h_t, r_t].

    What is read does not reach the LSTM, so that a whole sequence is one read, of which a sharded
    bank makes one call a shard.

    Args:
        input_size, hidden_size: widths of the input, and of h_t and r_t.
        bank: what is read; see `MemoryLayer` for it and for the other arguments.
    """

    state_type = LSTMState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bank: Bank,
        num_heads: int = NUM_HEADS,
        top_k: int = TOP_K,
        gated: bool = False,
        query_norm: str = "layer",
        temperature: float = TEMPERATURE,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__()
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.feature_size = 2 * hidden_size
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        with torch.no_grad():  # remember at first, as `lstm_cell`
            self.lstm.get_parameter("bias_ih_l0")[hidden_size : 2 * hidden_size] += 1
        self.memory = MemoryLayer(
            hidden_size,
            bank,
            num_heads,
            top_k,
            gated,
            query_norm=query_norm,
            temperature=temperature,
            learn_temperature=learn_temperature,
        )

    def initial_state(self, batch_size: int) -> LSTMState:
        """Zeros."""
        zeros = self.memory.query.weight.new_zeros(batch_size, self.hidden_size)
        return LSTMState(zeros, zeros)

    def check_state(self, state: Any, batch_size: int) -> None:
        """Refuse a state of another model, batch size, dtype or device."""
        super().check_state(state, batch_size)
        check_lstm_state(state, self.hidden_size, self.memory.query.weight)

    def forward(
        self, input: Float[Tensor, "B X"], state: LSTMState
    ) -> tuple[Float[Tensor, "B F"], LSTMState]:
        """Advance one step."""
        features, state = self.sequence(input.unsqueeze(1), state)
        return features.squeeze(1), state

    def sequence(
        self, input: Float[Tensor, "B T X"], state: LSTMState
    ) -> tuple[Float[Tensor, "B T F"], LSTMState]:
        """Advance all steps, then read for all of them."""
        carried = tuple(part.unsqueeze(0) for part in state)
        hidden, last = self.lstm(input, carried)
        parts = (part.squeeze(0) for part in last)
        state = outside_autocast(LSTMState, self.memory.query.weight, *parts)
        return torch.cat([hidden, self.memory(hidden)], 2), state


class MemoryLSTM(MemoryModel):
    """An LSTM that reads a bank: y_t = Linear([h_t, r_t]), r_t = MemoryLayer(h_t).

    `output [B, T, output_size], state = model(input [B, T, input_size], state=None)`. Arguments as
    in `MemoryLSTMCell`, and output_size, the width of the output. The bank's rows are parameters of
    the model, with row-sparse gradients: see `sparsemem.optim`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, bank: Bank, **options: Any
    ) -> None:
        super().__init__(MemoryLSTMCell(input_size, hidden_size, bank, **options), output_size)

"""Neural Turing Machine (Graves et al. 2014, arXiv 1410.5401).

Shape letters: B batch, N slots, W slot width, H heads, S shifts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem.checks import check_size
from sparsemem.memory import addressing
from sparsemem.memory.dense import DenseMemory
from sparsemem.models.base import Access, MemoryModel
from sparsemem.models.controller import (
    ControllerFactory,
    ControllerState,
    LSTMController,
    map_tensors,
    mover,
)
from sparsemem.models.dense import DenseCell, dense_access, features
from sparsemem.models.precision import outside_autocast

INITIAL_ROW = 1e-6
CLIP = 20.0


class NTMState(NamedTuple):
    """What an `NTMCell` carries from step to step."""

    controller: Any
    memory: DenseMemory
    write_weights: Float[Tensor, "B H N"]
    read_weights: Float[Tensor, "B H N"]
    reads: Float[Tensor, "B H W"] | None  # None before the first step

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return int(self.memory.rows.shape[0])

    @property
    def touched(self) -> Int[Tensor, " B"]:
        """Slots touched so far: all of them."""
        batch_size, num_slots, _ = self.memory.rows.shape
        return torch.full((batch_size,), num_slots, device=self.memory.rows.device)

    @property
    def access(self) -> Access | None:
        """What the last step read and wrote; None before the first."""
        return None if self.reads is None else dense_access(self.read_weights, self.write_weights)

    def detach(self) -> NTMState:
        """The same values, cut from the graph."""
        return NTMState(*map_tensors(Tensor.detach, tuple(self)))

    def clone(self) -> NTMState:
        """A copy that shares no storage; gradients flow through it."""
        return NTMState(*map_tensors(Tensor.clone, tuple(self)))

    def to(self, *args: Any, **kwargs: Any) -> NTMState:
        """A detached copy on another device or of another floating dtype (as `Module.to`)."""
        return NTMState(*map_tensors(mover(self.memory.rows, *args, **kwargs), tuple(self)))


class Addressing(NamedTuple):
    """Where H heads look: content, then location."""

    keys: Float[Tensor, "B H W"]
    strengths: Float[Tensor, "B H"]
    gates: Float[Tensor, "B H"]
    shifts: Float[Tensor, "B H S"]
    exponents: Float[Tensor, "B H"]

    @classmethod
    def from_interface(cls, part: Float[Tensor, "B H A"], slot_dim: int) -> Addressing:
        """Bring the interface's entries (W + 3 + S a head) into their ranges."""
        shifts = part.shape[-1] - slot_dim - 3
        keys, strengths, gates, exponents, offsets = torch.split(
            part, [slot_dim, 1, 1, 1, shifts], -1
        )
        return cls(
            keys,
            F.softplus(strengths).squeeze(-1),
            torch.sigmoid(gates).squeeze(-1),
            torch.softmax(offsets, -1),
            addressing.oneplus(exponents).squeeze(-1),
        )

    def weights(
        self, memory: DenseMemory, previous: Float[Tensor, "B H N"]
    ) -> Float[Tensor, "B H N"]:
        """NTM Eqs. 5 to 9: content, interpolation, circular shift, sharpening."""
        content = addressing.content_weights(memory.similarity(self.keys), self.strengths)
        gated = addressing.interpolate(content, previous, self.gates)
        return addressing.sharpen(addressing.circular_shift(gated, self.shifts), self.exponents)


class NTMCell(DenseCell):
    """One step of an NTM with `num_heads` write heads and as many read heads.

    As Collier & Beel 2018 (arXiv 1807.08518) found to train best: the memory starts at the
    constant 1e-6, the interface is clipped to +-20, words are squashed by tanh, and the weights
    and read vectors before the first step are learned. The learned weights start as a softmax
    of noise, near uniform; their number of slots makes `num_slots` part of the parameters.

    Raises `ValueError` or `TypeError` for a size that is not an int of at least 1
    (`shift_range`: of at least 0).
    """

    state_type = NTMState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int = 128,
        slot_dim: int = 20,
        num_heads: int = 1,
        controller: ControllerFactory = LSTMController,
        shift_range: int = 1,
    ) -> None:
        super().__init__(input_size, hidden_size, num_slots, slot_dim, num_heads, controller)
        shifts = 2 * check_size("shift_range", shift_range, 0) + 1
        self.head_sizes = [slot_dim + 3 + shifts] * 2 + [slot_dim] * 2
        self.make_interface(num_heads * sum(self.head_sizes))
        self.initial_reads = nn.Parameter(torch.randn(num_heads, slot_dim) * 0.1)
        self.initial_weights = nn.Parameter(torch.randn(2, num_heads, num_slots) * 0.1)

    def initial_state(self, batch_size: int) -> NTMState:
        """Constant memory, learned weights."""
        weights = torch.softmax(self.initial_weights, -1).expand(batch_size, -1, -1, -1)
        rows = weights.new_full((batch_size, self.num_slots, self.slot_dim), INITIAL_ROW)
        return NTMState(None, DenseMemory(rows), weights[:, 0], weights[:, 1], None)

    def forward(
        self, input: Float[Tensor, "B X"], state: NTMState
    ) -> tuple[Float[Tensor, "B F"], NTMState]:
        """Controller, interface, write, read."""
        reads = state.reads
        if reads is None:
            reads = torch.tanh(self.initial_reads).expand(len(input), -1, -1)
        hidden, controller = self.controller(features(input, reads), state.controller)
        step, vector = partial(self._step, state), self.interface(hidden)
        return outside_autocast(step, state.memory.rows, hidden, vector, controller)  # type: ignore[no-any-return]

    def _step(
        self, state: NTMState, hidden: Tensor, vector: Tensor, controller: ControllerState
    ) -> tuple[Tensor, NTMState]:
        """Write, then read, as the interface vector says."""
        heads = vector.clamp(-CLIP, CLIP).view(len(vector), self.num_heads, -1)
        writing, reading, erases, words = torch.split(heads, self.head_sizes, -1)
        write_weights = Addressing.from_interface(writing, self.slot_dim).weights(
            state.memory, state.write_weights
        )
        memory = state.memory.write(write_weights, torch.sigmoid(erases), torch.tanh(words))
        read_weights = Addressing.from_interface(reading, self.slot_dim).weights(
            memory, state.read_weights
        )
        reads = memory.read(read_weights)
        next_state = NTMState(controller, memory, write_weights, read_weights, reads)
        return features(hidden, reads), next_state


class NTM(MemoryModel):
    """Neural Turing Machine: an `NTMCell` over time and an output layer.

    `output [B, T, output_size], state = model(input [B, T, input_size], state=None)`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_slots: int = 128,
        slot_dim: int = 20,
        num_heads: int = 1,
        controller: ControllerFactory = LSTMController,
        shift_range: int = 1,
    ) -> None:
        cell = NTMCell(
            input_size, hidden_size, num_slots, slot_dim, num_heads, controller, shift_range
        )
        super().__init__(cell, output_size)

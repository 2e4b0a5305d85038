"""Differentiable Neural Computer (Graves et al. 2016, doi:10.1038/nature20101).

Shape letters: B batch, N slots, W slot width, R read heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

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


class DNCState(NamedTuple):
    """What a `DNCCell` carries from step to step."""

    controller: Any
    memory: DenseMemory
    usage: Float[Tensor, "B N"]
    precedence: Float[Tensor, "B N"]
    links: Float[Tensor, "B N N"]
    write_weights: Float[Tensor, "B N"]
    read_weights: Float[Tensor, "B R N"]
    reads: Float[Tensor, "B R W"] | None  # None before the first step

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
        if self.reads is None:
            return None
        return dense_access(self.read_weights, self.write_weights.unsqueeze(1))

    def detach(self) -> DNCState:
        """The same values, cut from the graph."""
        return DNCState(*map_tensors(Tensor.detach, tuple(self)))

    def clone(self) -> DNCState:
        """A copy that shares no storage; gradients flow through it."""
        return DNCState(*map_tensors(Tensor.clone, tuple(self)))

    def to(self, *args: Any, **kwargs: Any) -> DNCState:
        """A detached copy on another device or of another floating dtype (as `Module.to`)."""
        return DNCState(*map_tensors(mover(self.memory.rows, *args, **kwargs), tuple(self)))


class Interface(NamedTuple):
    """The interface vector, each part in its range; the last four are options."""

    read_keys: Float[Tensor, "B R W"]
    read_strengths: Float[Tensor, "B R"]
    write_key: Float[Tensor, "B 1 W"]
    write_strength: Float[Tensor, "B 1"]
    erase: Float[Tensor, "B 1 W"]
    word: Float[Tensor, "B 1 W"]
    free_gates: Float[Tensor, "B R"]
    allocation_gate: Float[Tensor, "B 1"]
    write_gate: Float[Tensor, "B 1"]
    read_modes: Float[Tensor, "B R 3"]
    read_masks: Float[Tensor, "B R W"] | None = None
    write_mask: Float[Tensor, "B 1 W"] | None = None
    forward_exponents: Float[Tensor, "B R"] | None = None
    backward_exponents: Float[Tensor, "B R"] | None = None


Squash = Callable[[Tensor], Tensor]


def _as_is(part: Tensor) -> Tensor:
    return part


def _interface_parts(
    num_heads: int, slot_dim: int, masked: bool, link_sharpening: bool
) -> dict[str, tuple[tuple[int, ...], Squash]]:
    """Shape and range of every part of the interface, in the paper's order, options last."""
    parts: dict[str, tuple[tuple[int, ...], Squash]] = {
        "read_keys": ((num_heads, slot_dim), _as_is),
        "read_strengths": ((num_heads,), addressing.oneplus),
        "write_key": ((1, slot_dim), _as_is),
        "write_strength": ((1,), addressing.oneplus),
        "erase": ((1, slot_dim), torch.sigmoid),
        "word": ((1, slot_dim), _as_is),
        "free_gates": ((num_heads,), torch.sigmoid),
        "allocation_gate": ((1,), torch.sigmoid),
        "write_gate": ((1,), torch.sigmoid),
        "read_modes": ((num_heads, 3), partial(torch.softmax, dim=-1)),
    }
    if masked:
        parts["read_masks"] = ((num_heads, slot_dim), torch.sigmoid)
        parts["write_mask"] = ((1, slot_dim), torch.sigmoid)
    if link_sharpening:
        parts["forward_exponents"] = ((num_heads,), addressing.oneplus)
        parts["backward_exponents"] = ((num_heads,), addressing.oneplus)
    return parts


class DNCCell(DenseCell):
    """One step of a DNC with one write head and `num_heads` read heads.

    The interface has RW + 3W + 5R + 3 entries, in the paper's order. Options, all from
    Csordas & Schmidhuber 2019 (arXiv 1904.10278), each adding entries at its end:
    `masked`: content lookups compare only under a mask per head (RW + W entries);
    `dealloc_erase`: freeing a slot erases its row, too;
    `link_sharpening`: forward and backward weights are sharpened (2R entries).

    Raises `ValueError` or `TypeError` for a size that is not an int of at least 1.
    """

    state_type = DNCState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int = 64,
        slot_dim: int = 16,
        num_heads: int = 4,
        controller: ControllerFactory = LSTMController,
        masked: bool = False,
        dealloc_erase: bool = False,
        link_sharpening: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, num_slots, slot_dim, num_heads, controller)
        self.dealloc_erase = dealloc_erase
        self.parts = _interface_parts(num_heads, slot_dim, masked, link_sharpening)
        self.part_sizes = [math.prod(shape) for shape, _ in self.parts.values()]
        self.make_interface(sum(self.part_sizes))

    def initial_state(self, batch_size: int) -> DNCState:
        """Zeros."""
        zeros, slots = self.interface.weight.new_zeros, self.num_slots
        empty = zeros(batch_size, slots)
        return DNCState(
            controller=None,
            memory=DenseMemory(zeros(batch_size, slots, self.slot_dim)),
            usage=empty,
            precedence=empty,
            links=zeros(batch_size, slots, slots),
            write_weights=empty,
            read_weights=zeros(batch_size, self.num_heads, slots),
            reads=None,
        )

    def forward(
        self, input: Float[Tensor, "B X"], state: DNCState
    ) -> tuple[Float[Tensor, "B F"], DNCState]:
        """Controller, interface, write, read."""
        reads = state.reads
        if reads is None:
            reads = input.new_zeros(len(input), self.num_heads, self.slot_dim)
        hidden, controller = self.controller(features(input, reads), state.controller)
        step, vector = partial(self._step, state), self.interface(hidden)
        return outside_autocast(step, state.memory.rows, hidden, vector, controller)  # type: ignore[no-any-return]

    def _step(
        self, state: DNCState, hidden: Tensor, vector: Tensor, controller: ControllerState
    ) -> tuple[Tensor, DNCState]:
        """Write, then read, as the interface vector says."""
        interface = self._split(vector)
        state = self._read(interface, self._write(interface, state))
        assert state.reads is not None
        return features(hidden, state.reads), state._replace(controller=controller)

    def _split(self, vector: Float[Tensor, "B I"]) -> Interface:
        vectors = torch.split(vector, self.part_sizes, 1)
        return Interface(
            **{
                name: squash(part.reshape(-1, *shape))
                for (name, (shape, squash)), part in zip(self.parts.items(), vectors, strict=True)
            }
        )

    def _write(self, interface: Interface, state: DNCState) -> DNCState:
        """Where to write, the write, and what is remembered of where it went."""
        retained = addressing.retention(interface.free_gates, state.read_weights)
        usage = addressing.usage(state.usage, state.write_weights, retained)
        similarity = state.memory.similarity(interface.write_key, interface.write_mask)
        weights = addressing.gated_write_weights(
            addressing.allocation(usage),
            addressing.content_weights(similarity, interface.write_strength).squeeze(1),
            interface.allocation_gate,
            interface.write_gate,
        )
        kept = retained if self.dealloc_erase else None
        return state._replace(
            memory=state.memory.write(weights.unsqueeze(1), interface.erase, interface.word, kept),
            usage=usage,
            precedence=addressing.precedence(state.precedence, weights),
            links=addressing.links(state.links, state.precedence, weights),
            write_weights=weights,
        )

    def _read(self, interface: Interface, state: DNCState) -> DNCState:
        """Where to read (after, before, or alike), and the read."""
        forward = addressing.forward_weights(state.links, state.read_weights)
        backward = addressing.backward_weights(state.links, state.read_weights)
        if interface.forward_exponents is not None and interface.backward_exponents is not None:
            forward = addressing.sharpen_links(forward, interface.forward_exponents)
            backward = addressing.sharpen_links(backward, interface.backward_exponents)
        similarity = state.memory.similarity(interface.read_keys, interface.read_masks)
        content = addressing.content_weights(similarity, interface.read_strengths)
        weights = addressing.mixed_read_weights(backward, content, forward, interface.read_modes)
        return state._replace(read_weights=weights, reads=state.memory.read(weights))


class DNC(MemoryModel):
    """Differentiable Neural Computer: a `DNCCell` over time and an output layer.

    `output [B, T, output_size], state = model(input [B, T, input_size], state=None)`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_slots: int = 64,
        slot_dim: int = 16,
        num_heads: int = 4,
        controller: ControllerFactory = LSTMController,
        masked: bool = False,
        dealloc_erase: bool = False,
        link_sharpening: bool = False,
    ) -> None:
        cell = DNCCell(
            input_size,
            hidden_size,
            num_slots,
            slot_dim,
            num_heads,
            controller,
            masked,
            dealloc_erase,
            link_sharpening,
        )
        super().__init__(cell, output_size)

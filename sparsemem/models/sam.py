"""SAM: sparse access memory (Rae et al. 2016, arXiv 1610.09027)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsemem.bank import MemoryBank
from sparsemem.checks import check_at_most, check_fraction, check_like, check_size
from sparsemem.indexes.metrics import cosine
from sparsemem.kernels.sequence import Layers
from sparsemem.memory.addressing import oneplus
from sparsemem.memory.entries import Entries, joined
from sparsemem.memory.episode import Episode, MemoryStep, check_bank
from sparsemem.models.base import Access, Cell, MemoryModel
from sparsemem.models.controller import (
    ControllerFactory,
    ControllerState,
    LSTMController,
    has_global_hooks,
    is_plain,
    map_tensors,
    mover,
    plain_lstm,
)
from sparsemem.models.precision import is_autocast, outside_autocast

NUM_SLOTS, SLOT_DIM = 1_048_576, 32  # unless given, or those of a bank
NUM_HEADS, TOP_K = 4, 4
INDEX_AFTER = 8_192  # touched rows; below, an exact scan is about as fast

# Where the gates start (docs/architecture.md): write to fresh slots, read sharply.
STRENGTH_BIAS = 8.0
INTERPOLATION_BIAS = -4.0


class SAMState(NamedTuple):
    """State of a SAM cell: controller, last reads, last writes and the memory."""

    controller: ControllerState
    reads: Float[Tensor, "B HW"]
    read: Entries  # [B, H, S], at positions of the episode
    write: Entries  # [B, H, U]
    episode: Episode

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.episode.batch_size

    @property
    def touched(self) -> Int[Tensor, " B"]:
        """Slots touched so far."""
        return self.episode.touched

    @property
    def access(self) -> Access:
        """What the last step read and wrote."""
        return access_of(self)

    def detach(self) -> SAMState:
        """The same state, cut from what came before: truncated BPTT."""
        return self._replace(**mapped(Tensor.detach, self), episode=self.episode.detach())

    def clone(self) -> SAMState:
        """A fork: both can be advanced, and both give gradients to what came before."""
        return self._replace(**mapped(Tensor.clone, self), episode=self.episode.clone())

    def to(self, *args: Any, **kwargs: Any) -> SAMState:
        """A detached copy on another device or of another floating dtype (as `Module.to`)."""
        return self._replace(
            **mapped(mover(self.reads, *args, **kwargs), self),
            episode=self.episode.to(*args, **kwargs),
        )


def mapped(function: Callable[[Tensor], Tensor], state: Any) -> dict[str, Any]:
    """The fields of a sparse state that hold tensors, each put through `function`."""
    names = ("controller", "reads", "read", "write")
    return {name: map_tensors(function, getattr(state, name)) for name in names}


def access_of(state: Any) -> Access:
    """The `Access` record of a sparse state, by slots."""
    read, write, slots_of = state.read.detach(), state.write.detach(), state.episode.slots_of
    return Access(slots_of(read.ids), read.weights, slots_of(write.ids), write.weights)


class HeadInterface(NamedTuple):
    """What the controller asks of the memory at one step."""

    query: Float[Tensor, "B H W"]
    word: Float[Tensor, "B H W"]
    strength: Float[Tensor, "B H"]
    write_gate: Float[Tensor, "B H"]
    interpolation: Float[Tensor, "B H"]
    modes: Float[Tensor, "B H P"]  # pi of SDNC; empty for SAM


def write_entries(interface: HeadInterface, read: Entries, fresh: Int[Tensor, "B H"]) -> Entries:
    """alpha (gamma wR_{t-1} + (1 - gamma) I): last step's reads, then a fresh slot (eq. 5)."""
    gamma = interface.interpolation.unsqueeze(-1)
    weights = torch.cat([gamma * read.weights, 1 - gamma], -1)
    ids = torch.cat([read.ids, fresh.unsqueeze(-1)], -1)
    return Entries(ids, interface.write_gate.unsqueeze(-1) * weights)


def content_weights(
    query: Float[Tensor, "B H W"], strength: Float[Tensor, "B H"], rows: Float[Tensor, "B H K W"]
) -> Float[Tensor, "B H K"]:
    """softmax over the K rows of beta cos(q, row) (eq. 4)."""
    return (strength.unsqueeze(-1) * cosine(query, rows)).softmax(-1)


class SAMCell(Cell):
    """One step of SAM: H heads, each writes one word and reads K rows.

    Args:
        input_size, hidden_size: widths of the input and of the controller's output.
        num_slots: N, any size: nothing of size N is allocated.
        slot_dim: W, width of a row.
        num_heads: H.
        top_k: K, rows that a head reads.
        controller: factory of the controller, called with (input width, hidden_size).
        index_after: touched rows from which on they are found by a tree, approximately; None, and
            on a device: never.
        strength_bias, interpolation_bias: where beta and gamma start, before oneplus and sigmoid.
        bypass_dropout: chance in training that a controller output does not reach the output
            layer, which then has to rely on what was read (Franke et al. 2018, arXiv 1807.02658).
        memory: bank that every sequence starts from and leaves as it is (`Episode.over`), with
            num_slots rows of width slot_dim; None: rows of zeros.
    """

    num_modes = 0  # ways of reading to mix, beyond the one by content

    state_type: type[Any] = SAMState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int = NUM_SLOTS,
        slot_dim: int = SLOT_DIM,
        num_heads: int = NUM_HEADS,
        top_k: int = TOP_K,
        controller: ControllerFactory = LSTMController,
        index_after: int | None = INDEX_AFTER,
        strength_bias: float = STRENGTH_BIAS,
        interpolation_bias: float = INTERPOLATION_BIAS,
        bypass_dropout: float = 0.0,
        memory: MemoryBank | None = None,
    ) -> None:
        super().__init__()
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.num_slots = check_size("num_slots", num_slots)
        self.slot_dim = check_size("slot_dim", slot_dim)
        self.num_heads = check_size("num_heads", num_heads)
        self.top_k = check_size("top_k", top_k)
        check_at_most("top_k", top_k, "num_slots", num_slots)
        check_at_most("num_heads", num_heads, "num_slots", num_slots)
        if memory is not None:
            check_memory_sizes(memory, num_slots, slot_dim)
        self.memory = memory
        self.index_after = (
            index_after if index_after is None else check_size("index_after", index_after)
        )
        read_size = num_heads * slot_dim
        self.feature_size = hidden_size + read_size
        self.controller = controller(input_size + read_size, hidden_size)
        self.bypass = nn.Dropout(check_fraction("bypass_dropout", bypass_dropout))
        self.interface = nn.Linear(hidden_size, num_heads * (2 * slot_dim + 3 + self.num_modes))
        with torch.no_grad():
            gates = self.interface.bias.view(num_heads, -1)[:, 2 * slot_dim :]
            gates[:, 0], gates[:, 2] = strength_bias, interpolation_bias

    def initial_state(self, batch_size: int) -> Any:
        """The memory as it is before any write, nothing read or written yet."""
        weight = self.interface.weight
        ids = torch.empty(batch_size, self.num_heads, 0, dtype=torch.int64, device=weight.device)
        nothing = Entries(ids, weight.new_empty(ids.shape))
        reads = weight.new_zeros(batch_size, self.num_heads * self.slot_dim)
        episode = self._initial_episode(batch_size)
        return SAMState(None, reads, nothing, nothing, episode)

    def _initial_episode(self, batch_size: int) -> Episode:
        like, memory = self.interface.weight, self.memory
        if memory is None:
            return Episode.start(
                batch_size,
                self.num_slots,
                self.slot_dim,
                index_after=self.index_after,
                device=like.device,
                dtype=like.dtype,
            )
        if (memory.computing_dtype, memory.keys.device) != (like.dtype, like.device):
            raise TypeError(
                f"memory is computed in {memory.computing_dtype} on {memory.keys.device}, the"
                f" model's parameters are {like.dtype} on {like.device}"
            )
        return Episode.over(memory, batch_size, index_after=self.index_after)

    def check_state(self, state: Any, batch_size: int) -> None:
        """Refuse a state of another model, size, batch, dtype or device."""
        super().check_state(state, batch_size)
        check_like("state", state.reads, self.interface.weight)
        check_memory(state, self.num_slots, self.num_heads, self.num_heads * self.slot_dim)
        if state.episode.bank is not self.memory:
            raise ValueError("state was made over another memory than this model's")

    def forward(self, input: Float[Tensor, "B X"], state: Any) -> tuple[Float[Tensor, "B F"], Any]:
        """One step: (features [h_t, r_t], next state)."""
        hidden, controller = self.controller(torch.cat([input, state.reads], 1), state.controller)
        step, values = partial(self._step, state), self.interface(hidden)
        return outside_autocast(step, state.reads, hidden, values, controller)  # type: ignore[no-any-return]

    def sequence(
        self, input: Float[Tensor, "B T X"], state: Any
    ) -> tuple[Float[Tensor, "B n F"], Any] | None:
        """Several steps by kernels that hold the controller too, where that is this LSTM's."""
        lstm = plain_lstm(self.controller)
        if lstm is None or not self._is_plain(input, state):
            return None
        steps = state.episode.steps_at_once(state.read, self.top_k)
        if not steps:
            return None
        of_input, of_reads = lstm.weight_ih.tensor_split([self.input_size], 1)
        biases, input = lstm.bias_ih + lstm.bias_hh, input[:, :steps].transpose(0, 1)
        gates = linear(input, of_input, biases).contiguous()
        recurrent = torch.cat([lstm.weight_hh, of_reads], 1)
        layers = Layers(recurrent, self.interface.weight, self.interface.bias)
        nothing = state.reads.new_zeros(state.batch_size, self.hidden_size)
        hidden, cell = state.controller or (nothing, nothing)
        carried = torch.cat([hidden, state.reads], 1)
        taken = state.episode.fused_sequence(gates, carried, cell, state.read, self.top_k, layers)
        if taken is None:
            return None
        last = taken.features[-1]
        hidden, reads = last[:, : self.hidden_size].clone(), last[:, self.hidden_size :].clone()
        features = taken.features.transpose(0, 1)
        if self.bypass.p:
            features = self._bypassed(features)
        episode = (reads, taken.read, taken.write, taken.episode)
        return features, SAMState((hidden, taken.cell), *episode)

    def _is_plain(self, input: Tensor, state: Any) -> bool:
        """Whether a step is what this class and its layers do, and nothing else."""
        if has_global_hooks() or is_autocast(input):
            return False
        controller = state.controller or ()  # before the first step there is none
        layers = (*self.controller.parameters(), *self.interface.parameters())
        tensors, shape = (input, *controller, *layers), (len(input), self.hidden_size)
        return (
            is_plain(self, SAMCell)
            and is_plain(self.interface, nn.Linear)
            and self.interface.bias is not None
            and all(part.shape == shape for part in controller)
            and all(type(part) in (Tensor, nn.Parameter) for part in tensors)
            and {(part.dtype, part.device) for part in tensors}
            == {(state.reads.dtype, state.reads.device)}
        )

    def _bypassed(self, features: Float[Tensor, "B n F"]) -> Tensor:
        # A draw for each step, as step by step; on a GPU draws depend on how a tensor lies.
        hidden, reads = features.tensor_split([self.hidden_size], 2)
        shown = [self.bypass(h.contiguous()) for h in hidden.unbind(1)]
        return torch.cat([torch.stack(shown, 1), reads], 2)

    def _step(
        self, state: Any, hidden: Tensor, values: Tensor, controller: ControllerState
    ) -> tuple[Tensor, Any]:
        """Write, then read, as the interface's values say: fused where that can be done."""
        links = getattr(state, "links", None)
        step = state.episode.fused_step(values, state.read, self.top_k, links)
        if step is None:
            step = self._reference_step(state, values)
        shown = self.bypass(hidden) if self.bypass.p else hidden
        features = torch.cat([shown, step.reads], 1)
        return features, state._replace(controller=controller, **step._asdict())

    def _reference_step(self, state: Any, values: Tensor) -> MemoryStep:
        interface = self._split(values)
        fresh = state.episode.least_recent(self.num_heads)
        write = write_entries(interface, state.read, fresh)
        episode = state.episode.write(*write, interface.word, fresh, new=self.num_heads)
        read, rows, episode = self._read(interface, state, write, episode)
        reads = (read.weights.unsqueeze(-1) * rows).sum(2).flatten(1)
        episode.mark_accessed(joined(write.detach(), read.detach()))
        return MemoryStep(reads, read, write, episode)

    def _read(
        self, interface: HeadInterface, state: Any, write: Entries, episode: Episode
    ) -> tuple[Entries, Tensor, Episode]:
        """Read weights, the rows they weigh, and the episode to go on with."""
        ids = episode.search(interface.query, self.top_k)
        rows, episode = episode.read(ids, new=self.top_k)
        weights = content_weights(interface.query, interface.strength, rows)
        return Entries(ids, weights), rows, episode

    def _split(self, values: Float[Tensor, "B HI"]) -> HeadInterface:
        width = self.slot_dim
        heads = values.view(len(values), self.num_heads, -1)
        query, word, gates, modes = torch.split(heads, [width, width, 3, self.num_modes], -1)
        opened = gates[..., 1:].sigmoid()
        return HeadInterface(
            query, word, oneplus(gates[..., 0]), opened[..., 0], opened[..., 1], modes.softmax(-1)
        )


def check_memory(state: Any, num_slots: int, num_heads: int, read_size: int) -> None:
    """Refuse a sparse state made by a cell of other sizes."""
    made_for = (state.episode.num_slots, state.read.ids.shape[1], state.reads.shape[1])
    if made_for != (num_slots, num_heads, read_size):
        raise ValueError(
            "state was made by a model with (num_slots, num_heads, num_heads * slot_dim) ="
            f" {made_for}, expected {(num_slots, num_heads, read_size)}"
        )


def check_memory_sizes(memory: MemoryBank, num_slots: int, slot_dim: int) -> None:
    """Refuse a bank that an episode cannot lie over, or of other sizes."""
    check_bank("memory", memory)
    for name, value, of, expected in (
        ("num_slots", num_slots, "num_rows", memory.num_rows),
        ("slot_dim", slot_dim, "width", memory.width),
    ):
        if value != expected:
            raise ValueError(f"{name} is {value}, expected memory's {of} = {expected}")


def sizes_over(
    memory: MemoryBank | None, num_slots: int | None, slot_dim: int | None
) -> tuple[int, int]:
    """Slots and their width; where they are not given, a bank's or the defaults."""
    default_slots, default_dim = NUM_SLOTS, SLOT_DIM
    if isinstance(memory, MemoryBank):  # else the cell refuses it
        default_slots, default_dim = memory.num_rows, memory.width
    return (
        default_slots if num_slots is None else num_slots,
        default_dim if slot_dim is None else slot_dim,
    )


class SAM(MemoryModel):
    """Sparse access memory: `output, state = SAM(8, 100, 8)(input [B, T, 8])`, batch first.

    Arguments as in `SAMCell`, and output_size, the width of the output. num_slots and slot_dim
    that are None are those of the bank that is given as `memory`, else the cell's defaults.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_slots: int | None = None,
        slot_dim: int | None = None,
        num_heads: int = NUM_HEADS,
        top_k: int = TOP_K,
        memory: MemoryBank | None = None,
        **options: Any,
    ) -> None:
        sizes = (*sizes_over(memory, num_slots, slot_dim), num_heads, top_k)
        cell = SAMCell(input_size, hidden_size, *sizes, memory=memory, **options)
        super().__init__(cell, output_size)

"""Episode: the rows that one sequence has touched, over a constant base or a bank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.bank import MemoryBank
from sparsemem.checks import check_at_most, check_size
from sparsemem.indexes.metrics import Metric
from sparsemem.kernels.fused import FusedStep, take_step
from sparsemem.kernels.sequence import Layers, UnrolledSteps, steps_at_once, take_sequence
from sparsemem.memory.candidates import max_slots
from sparsemem.memory.entries import Entries
from sparsemem.memory.links import TemporalLinks
from sparsemem.memory.overlay import BankStore
from sparsemem.memory.slots import NONE, PrefixSlots
from sparsemem.memory.store import FIRST_CAPACITY, EpisodeStore, check_slots
from sparsemem.memory.tape import Fork, ReadRows, Tape, WriteRows


class MemoryStep(NamedTuple):
    """What a step of the memory gives."""

    reads: Float[Tensor, "B HW"]
    read: Entries  # [B, H, S]
    write: Entries  # [B, H, U]
    episode: Episode


class MemorySequence(NamedTuple):
    """What several steps of a network with this memory give."""

    features: Float[Tensor, "n B F"]  # hidden state and reads
    cell: Float[Tensor, "B D"]
    read: Entries  # [B, H, K], of the last step
    write: Entries  # [B, H, U], of the last step
    episode: Episode


class Episode:
    """A handle on an `EpisodeStore` at one version of it. Immutable; `write` returns the next.

    The rows are changed in place, so a handle serves for one write only: using it again is
    refused. `clone()` forks the memory (gradients flow back from both), `detach()` cuts the
    gradient.

    Reads and writes take *positions*: places in the table of touched rows, as `search`,
    `least_recent` and `positions` give them out; `slots_of` tells their slots. Over a constant
    base (`start`) a position is its slot, and memory is held for all slots up to the highest one
    used. Over a bank (`over`) memory is held for the slots given out.

    On a device (CUDA) the host sees no positions unless it waits for them. It does for those that
    a caller has made up, to check them; not for what a cell passes on as it was given out, which
    it says with `new`: how many of them, at most, lie beyond an episode's touched ones.
    """

    __slots__ = ("_operation", "_store", "_tape", "_token", "_version")

    def __init__(self, store: EpisodeStore, tape: Tape, token: Tensor, operation: int) -> None:
        self._store, self._tape, self._token = store, tape, token
        self._operation, self._version = operation, store.version

    @staticmethod
    def start(
        batch_size: int,
        num_slots: int,
        slot_dim: int,
        *,
        base: float = 0.0,
        index_after: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Episode:
        """B episodes whose N slots all hold `base`; nothing of size N is allocated.

        From `index_after` touched slots on an episode finds them by a tree, approximately (None,
        and on a device: always exactly).
        """
        check_size("batch_size", batch_size)
        check_size("num_slots", num_slots)
        check_size("slot_dim", slot_dim)
        shape = (batch_size, min(FIRST_CAPACITY, num_slots), slot_dim)
        rows = torch.full(shape, base, device=device, dtype=dtype)
        store = EpisodeStore(rows, PrefixSlots(num_slots), base, index_after)
        # The token holds no number: a device has nothing to do to hand it on.
        return Episode(store, Tape(store), rows.new_zeros(0), -1)

    @staticmethod
    def over(bank: MemoryBank, batch_size: int, *, index_after: int | None = None) -> Episode:
        """B episodes over the rows of a bank, which they do not change: copy-on-write.

        A slot is a row of the bank; free slots, which hold no live row, hold zeros. What is held
        is a copy of each row touched, made when `search`, `least_recent` or `positions` first
        gave it out; what has happened to the bank's row since is not seen. Gradients of what
        was read reach the bank's rows, from rows first touched since the last `detach`. The
        bank's index finds its rows; what it misses is not found.

        The copy of a row counts as an access of it, one in each episode however often it is then
        read, and the copies of one operation as one call of the bank's usage clock: so rows that
        episodes use do not give way to new ones first, and `select` sees them.

        Args:
            bank: rows that are their own values, compared by cosine.
            batch_size: B.
            index_after: touched rows of an episode from which on those are found by a tree
                (None: never).
        """
        check_bank("bank", bank)
        store = BankStore.start(bank, check_size("batch_size", batch_size), index_after)
        return Episode(store, Tape(store), store.rows.new_zeros(0), -1)

    @property
    def bank(self) -> MemoryBank | None:
        """The bank that lies under the episodes."""
        return self._store.bank if isinstance(self._store, BankStore) else None

    @property
    def batch_size(self) -> int:
        """Number of episodes."""
        return len(self._store.rows)

    @property
    def num_slots(self) -> int:
        """Number of slots, touched or not."""
        return self._store.num_slots

    @property
    def touched(self) -> Int[Tensor, " B"]:
        """Slots that have been read or written so far, of each episode."""
        return self._store.touched.clone()

    @property
    def capacity(self) -> int:
        """Slots that there is memory for at the moment."""
        return self._store.rows.shape[1]

    @property
    def extent(self) -> int:
        """Slots touched by the episode that has touched most; all others hold the base."""
        return self._store.exact_extent()

    @property
    def bound(self) -> int:
        """The extent or, on a device, more: what is known without waiting."""
        return self._store.extent

    @property
    def slots(self) -> Int[Tensor, "B M"]:
        """Slots of positions 0 .. M-1 (M = extent); -1 for those beyond an episode's own."""
        positions = torch.arange(self.extent, device=self._store.rows.device)
        positions = positions.expand(self.batch_size, -1)
        untouched = positions >= self._store.touched.unsqueeze(1)
        return self.slots_of(positions).masked_fill(untouched, NONE)

    @property
    def slot_table(self) -> Int[Tensor, "B M"] | None:
        """Slots of all positions that there is memory for; None where a position is its slot."""
        return self._store.slot_table

    def slots_of(self, positions: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """Slots of positions that were given out."""
        table = self.slot_table
        if table is None:
            return positions
        return table.gather(1, positions.flatten(1)).view_as(positions)

    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Positions of slots, for reading and writing them; they are touched by that."""
        self._check_current()
        self._check_batch("slots", slots)
        check_slots("slots", slots, self.num_slots)
        return self._store.positions(slots)

    def rows(self) -> Float[Tensor, "B M W"]:
        """A copy of the rows at positions 0 .. M-1, where M is the extent."""
        self._check_current()
        self._store.load()
        return self._store.rows[:, : self.extent].clone()

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """Positions of the `count` least recently accessed slots, ties by slot.

        Those never accessed come first, and before all the free slots of a bank.
        """
        self._check_current()
        check_at_most("count", check_size("count", count), "num_slots", self.num_slots)
        return self._store.least_recent(count)

    def write(
        self,
        ids: Int[Tensor, "B H S"],
        weights: Float[Tensor, "B H S"],
        words: Float[Tensor, "B H W"],
        erase: Int[Tensor, "B E"],
        new: int | None = None,
    ) -> Episode:
        """Set rows `erase` to zero, then add weights_h words_h^T at ids_h, for every head h."""
        self._check_current()
        self._check_ids("ids", ids, new)
        self._check_ids("erase", erase, new)
        self._check_like("weights", weights, tuple(ids.shape))
        self._check_like("words", words, (*ids.shape[:2], self._store.rows.shape[2]))
        token = self._opened()
        self._store.touch(torch.cat([ids.flatten(1), erase], 1).unsqueeze(1), new)
        self._store.version += 1
        arguments = (token, weights, words, ids, erase, self._tape)
        return self._next(WriteRows.apply(*arguments))  # type: ignore[no-untyped-call]

    def search(self, queries: Float[Tensor, "B H W"], k: int) -> Int[Tensor, "B H K"]:
        """Positions of the k rows of largest cosine similarity, best first, ties by slot."""
        self._check_current()
        check_at_most("k", check_size("k", k), "num_slots", self.num_slots)
        heads = queries.shape[1] if queries.ndim == 3 else 1
        self._check_like("queries", queries, (self.batch_size, heads, self._store.rows.shape[2]))
        with torch.no_grad():
            return self._store.search(queries.detach(), k)

    def read(
        self, ids: Int[Tensor, "B H S"], new: int | None = None
    ) -> tuple[Float[Tensor, "B H S W"], Episode]:
        """Rows at ids, differentiable, and the handle to go on with."""
        self._check_current()
        self._check_ids("ids", ids, new)
        self._store.load()
        self._store.touch(ids, new)
        rows, token = ReadRows.apply(self._opened(), ids, self._tape)  # type: ignore[no-untyped-call]
        return rows, self._next(token)

    def fused_step(
        self,
        values: Float[Tensor, "B HI"],
        last: Entries,
        k: int,
        links: TemporalLinks | None = None,
    ) -> MemoryStep | None:
        """A whole step of SAM (with links: of SDNC), by compiled kernels.

        None, with nothing done, where there is no kernel for it: banks, other devices and dtypes,
        Numba missing or switched off.

        Args:
            values: interface values of H heads, in the order of `SAMCell`.
            last: reads [B, H, S] of the step before.
            k: rows that a head reads by content.
            links: temporal links, changed in place.
        """
        self._check_current()
        values = values.contiguous()
        step = take_step(self._store, values, last, k, links)
        if step is None:
            return None
        arguments = (self._opened(), values, last.weights, step, self._tape)
        reads, weights, token = FusedStep.apply(*arguments)  # type: ignore[no-untyped-call]
        return MemoryStep(reads, Entries(step.read.ids, weights), step.write, self._next(token))

    def steps_at_once(self, last: Entries, k: int) -> int:
        """How many steps `fused_sequence` can be asked for now; 0: none."""
        return steps_at_once(self._store, last, k)

    def fused_sequence(
        self,
        gates: Float[Tensor, "T B G"],
        carried: Float[Tensor, "B F"],
        cell: Float[Tensor, "B D"],
        last: Entries,
        k: int,
        layers: Layers,
    ) -> MemorySequence | None:
        """As many of T steps of SAM and its LSTM as can be, at least one, by compiled kernels.

        None, with nothing done, where `fused_step` has to tell why. To be called if
        `steps_at_once` allows it.

        Args:
            gates: what the LSTM's gates get from the input, biases among it; is overwritten.
            carried: hidden state and reads of the step before.
            cell: the LSTM's cell state.
            last: reads [B, H, K] of the step before; on a device there may be none.
            k: rows that a head reads.
            layers: weights of the LSTM and of the interface.
        """
        self._check_current()
        sequence = take_sequence(self._store, gates, carried, cell, last, k, layers)
        if sequence is None:
            return None
        state = (gates[: sequence.sizes.steps], carried, cell, last.weights, *layers)
        arguments = (self._opened(), *state, sequence, self._tape)
        carried, cell, weights, token = UnrolledSteps.apply(*arguments)  # type: ignore[no-untyped-call]
        read = Entries(sequence.ids[-1].clone(), weights)
        write = Entries(sequence.write_ids[-1].clone(), sequence.write_weights)
        return MemorySequence(carried[1:], cell, read, write, self._next(token))

    def mark_accessed(self, accesses: Entries) -> None:
        """End a step: positions whose weights [B, H, S] exceed delta for a head are accessed."""
        self._check_current()
        self._store.order.mark(accesses.detach())

    def _opened(self) -> Tensor:
        """The token for the next operation."""
        if self._operation >= 0:
            return self._token
        return self._store.open(self._token, self._tape)

    def _next(self, token: Tensor) -> Episode:
        if token.requires_grad:
            return Episode(self._store, self._tape, token, self._tape.length - 1)
        return Episode(self._store, Tape(self._store), token, -1)  # no gradient gets past here

    def detach(self) -> Episode:
        """The same memory, from which no gradient flows back.

        Both handles can be read; the first write through one of them uses up the other.
        """
        self._check_current()
        return Episode(self._store, Tape(self._store), self._token.detach(), -1)

    def clone(self) -> Episode:
        """An independent copy; the gradients of both flow back into what came before.

        Takes time and space of all touched rows.
        """
        self._check_current()
        store = self._store.to(self._store.rows.device, self._store.rows.dtype)
        if not self._token.requires_grad:
            return Episode(store, Tape(store, self._tape.start), self._token, -1)
        tape = Tape(store)
        if not torch.is_grad_enabled():
            return Episode(store, tape, self._token.detach(), -1)
        arguments = (self._token, tape, self._tape, self._operation)
        token = store.open(Fork.apply(*arguments), tape)  # type: ignore[no-untyped-call]
        return Episode(store, tape, token, tape.length - 1)

    def to(self, *args: Any, **kwargs: Any) -> Episode:
        """A detached copy on another device or of another dtype (as in `Tensor.to`)."""
        self._check_current()
        token = self._token.detach().to(*args, **kwargs)
        store = self._store.to(token.device, token.dtype)
        return Episode(store, Tape(store), token, -1)

    def _check_current(self) -> None:
        if (self._version, self._operation) != (self._store.version, self._tape.length - 1):
            raise RuntimeError(
                f"this state was already advanced (it is at write {self._version}, operation"
                f" {self._operation + 1}; its memory at {self._store.version} and"
                f" {self._tape.length}): the memory is changed in place, so a state serves once;"
                " state.clone() forks it"
            )

    def _check_like(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        rows = self._store.rows
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != rows.dtype or tensor.device != rows.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, the rows are {rows.dtype} on"
                f" {rows.device}"
            )

    def _check_ids(self, name: str, ids: Tensor, new: int | None) -> None:
        self._check_batch(name, ids)
        if new is None or not self._store.is_bounded:
            self._store.check_ids(name, ids)

    def _check_batch(self, name: str, ids: Tensor) -> None:
        if ids.shape[0] != self.batch_size:
            raise ValueError(
                f"{name} has batch size {ids.shape[0]}, the memory has {self.batch_size} episodes"
            )


def check_bank(name: str, bank: MemoryBank) -> None:
    """Refuse a bank whose rows an episode cannot read and write."""
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"{name} is a {type(bank).__name__}, expected a MemoryBank")
    if bank.values is not None:
        raise ValueError(
            f"{name} has value_width {bank.value_width}, expected None: the keys are the values"
        )
    if bank.metric != Metric.cosine:
        raise ValueError(f"{name} has metric {str(bank.metric)!r}, expected 'cosine'")
    limit = max_slots(bank.computing_dtype)
    check_at_most(f"{name}.num_rows", bank.num_rows, "the slots that can be ranked", limit)

"""SDNC: SAM with sparse temporal links (Rae et al. 2016, arXiv 1610.09027, supplement D)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.bank import MemoryBank
from sparsemem.checks import check_size
from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from sparsemem.memory.links import TemporalLinks
from sparsemem.models.base import Access, MemoryModel
from sparsemem.models.controller import ControllerState, mover
from sparsemem.models.sam import (
    NUM_HEADS,
    TOP_K,
    HeadInterface,
    SAMCell,
    access_of,
    content_weights,
    mapped,
    sizes_over,
)


class SDNCState(NamedTuple):
    """State of an SDNC cell: that of SAM, and the links."""

    controller: ControllerState
    reads: Float[Tensor, "B HW"]
    read: Entries  # [B, H, S]
    write: Entries  # [B, H, U]
    episode: Episode
    links: TemporalLinks

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

    def detach(self) -> SDNCState:
        """The same state, cut from what came before: truncated BPTT."""
        return self._replace(**mapped(Tensor.detach, self), episode=self.episode.detach())

    def clone(self) -> SDNCState:
        """A fork: both can be advanced, and both give gradients to what came before."""
        links = self.links.to(self.reads.device, self.reads.dtype)
        parts = mapped(Tensor.clone, self)
        return self._replace(**parts, episode=self.episode.clone(), links=links)

    def to(self, *args: Any, **kwargs: Any) -> SDNCState:
        """A detached copy on another device or of another floating dtype (as `Module.to`)."""
        parts = mapped(mover(self.reads, *args, **kwargs), self)
        links = self.links.to(parts["reads"].device, parts["reads"].dtype)
        return self._replace(**parts, episode=self.episode.to(*args, **kwargs), links=links)


class SDNCCell(SAMCell):
    """One step of SDNC. Arguments as in `SAMCell`, and num_links = K_L, links kept of a row.

    wR = pi_1 b + pi_2 c + pi_3 f: rows written before the last reads, by content, rows written
    after them. f and b keep their K largest entries each.
    """

    num_modes = 3

    state_type = SDNCState

    def __init__(self, *args: Any, num_links: int = 8, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_links = check_size("num_links", num_links)

    def initial_state(self, batch_size: int) -> Any:
        """The memory as it is before any write, nothing linked yet."""
        state = super().initial_state(batch_size)
        links = TemporalLinks.start(batch_size, self.num_heads, self.num_links, state.reads)
        return SDNCState(**state._asdict(), links=links)

    def _read(
        self, interface: HeadInterface, state: Any, write: Entries, episode: Episode
    ) -> tuple[Entries, Tensor, Episode]:
        content_ids = episode.search(interface.query, self.top_k)
        links, extent = state.links, max(episode.bound, self.top_k)
        last_read, slots = state.read.detach(), episode.slot_table
        with torch.no_grad():
            links.reserve(extent)
            links.update(write.detach(), extent, slots)
            after = links.follow(links.follows, last_read, self.top_k, extent, slots)
            before = links.follow(links.precedes, last_read, self.top_k, extent, slots)
        ids = torch.cat([before.ids, content_ids, after.ids], -1)
        # Rows linked with nothing read are the first ones, as those without content are.
        rows, episode = episode.read(ids, new=self.top_k)
        content_rows = rows[:, :, self.top_k : 2 * self.top_k]
        content = content_weights(interface.query, interface.strength, content_rows)
        last = state.read.weights.unsqueeze(-1)
        backward, forward = ((part.weights_of @ last).squeeze(-1) for part in (before, after))
        ways = torch.stack([backward, content, forward], 2)  # [B, H, 3, K]
        weights = (interface.modes.unsqueeze(-1) * ways).flatten(2)
        return Entries(ids, weights), rows, episode


class SDNC(MemoryModel):
    """Sparse differentiable neural computer; arguments as in `SAM`, and num_links (`SDNCCell`)."""

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
        cell = SDNCCell(input_size, hidden_size, *sizes, memory=memory, **options)
        super().__init__(cell, output_size)

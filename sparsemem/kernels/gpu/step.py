"""A memory step by Triton's kernels, on the store in its form for devices; nothing here waits."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparsemem.indexes.launching import launch
from sparsemem.indexes.ranking import GRID_BITS
from sparsemem.kernels import DTYPES
from sparsemem.kernels.fused import Step
from sparsemem.kernels.gpu.backward import read_backward_kernel, write_backward_kernel
from sparsemem.kernels.gpu.links import follow_kernel, mix_kernel, scan_kernel
from sparsemem.kernels.gpu.reading import read_kernel, search_kernel
from sparsemem.kernels.gpu.writing import write_kernel
from sparsemem.memory.entries import Entries

if TYPE_CHECKING:
    from sparsemem.memory.links import TemporalLinks
    from sparsemem.memory.store import EpisodeStore

TILE = 4096  # numbers that a program works on at once
MAX_READS = 32  # of an element that one program adds up at once
SCAN = 1024  # last accesses that it looks at at once
MIN_SIZE = 4  # of an array
MOST_ENTRIES, MOST_WIDTH = 128, 1024  # K and H, and W, that a program takes: more is for torch
MOST_JOINED = 128  # links of a row and what is added to them
PAIRS = 1024  # of them that a program compares at once, if it has several rows
PART_ROWS = 256  # that a program searches, at least, if a search is divided
PROGRAMS = 1024  # that fill a device
ROUNDING = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}


class Sizes(NamedTuple):
    """What the kernels are compiled for, and the number of threads."""

    dtype: torch.dtype
    heads: int
    inputs: int  # I
    width: int  # W
    top_k: int  # K
    linked: bool

    @property
    def read(self) -> int:
        """R, rows that a head reads."""
        return 3 * self.top_k if self.linked else self.top_k

    @property
    def columns(self) -> int:
        """W."""
        return padded(self.width)

    @property
    def neighbours(self) -> int:
        """K."""
        return padded(self.top_k)

    @property
    def support(self) -> int:
        """S + 1, at any step: the last reads are R, or none."""
        return padded(self.read + 1)

    def block(self, count: int) -> int:
        """How many of `count` rows are worked on at once."""
        return min(padded(count), max(TILE // self.columns, MIN_SIZE))

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of most kernels."""
        return {"INPUTS": self.inputs, "WIDTH": self.width, "COLUMNS": self.columns}

    @property
    def ranking(self) -> dict[str, float]:
        """Arguments of kernels that rank scores."""
        return {"GRID": 2.0 ** GRID_BITS[self.dtype], "ROUNDING": ROUNDING[self.dtype]}

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of kernels that read K rows."""
        neighbours = self.neighbours
        warps = warps_for(neighbours * max(self.columns, self.support))
        return {"K": self.top_k, "NEIGHBOURS": neighbours, "num_warps": warps}

    def room_to_write(self, last: Entries) -> Entries:
        """For what a step writes after reads [B, H, S]: S + 1 entries a head."""
        batch, heads, support = last.ids.shape
        shape = (batch, heads, support + 1)
        return Entries(last.ids.new_empty(shape), last.weights.new_empty(shape))

    def room_to_read(self, last: Entries) -> Reading:
        """For what a step reads."""
        batch, heads, weights = *last.ids.shape[:2], last.weights
        shape = (batch, heads, self.read)
        rows, reads = (*shape, self.width), (batch, heads * self.width)
        made = (weights.new_empty(part) for part in (rows, shape, reads))
        return Reading(last.ids.new_empty(shape), *made)


class Reading(NamedTuple):
    """What a step read; R entries a head."""

    ids: Tensor  # [B, H, R]
    rows: Tensor  # [B, H, R, W]
    weights: Tensor  # [B, H, R]
    reads: Tensor  # [B, H * W], rows of another table perhaps


def padded(count: int) -> int:
    """The length of an array of `count` numbers."""
    return max(MIN_SIZE, 1 << (count - 1).bit_length())


def warps_for(numbers: int) -> int:
    """How many warps work on an array: 8 numbers a thread, or more."""
    return min(max(1, numbers // 256), 8)


def device_step(
    store: EpisodeStore, values: Tensor, last: Entries, top_k: int, links: TemporalLinks | None
) -> Step | None:
    """As `take_step`; where the host must not see what is touched."""
    if not can_step(store, values, last, top_k):
        return None
    heads, width = last.ids.shape[1], store.rows.shape[2]
    inputs = values.shape[1] // heads
    sizes = Sizes(values.dtype, heads, inputs, width, top_k, links is not None)
    last = Entries(last.ids.contiguous(), last.weights.detach().contiguous())
    store.visible(heads + top_k)  # makes room
    write, read = sizes.room_to_write(last), sizes.room_to_read(last)
    with torch.no_grad(), torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        write_step(sizes, store, values, last, write, torch.empty_like(store.touched))
        keys = search_step(sizes, store, values, store.touched)
        linked, weights_of = values.new_empty(0, dtype=torch.int64), values.new_empty(0)
        if links is not None:
            linked, weights_of = links_step(sizes, store, links, write, last)
        read_step(sizes, store, values, last, write, read, keys, linked, weights_of)
    entries, backward = Entries(read.ids, read.weights), partial(device_backward, sizes)
    return Step(backward, write, entries, weights_of, read.rows, read.reads)


def can_step(store: EpisodeStore, values: Tensor, last: Entries, top_k: int) -> bool:
    """Whether what a step needs is as the kernels expect it, and not too much for a program."""
    return (
        store.has_prefix
        and max(top_k, last.ids.shape[1]) <= MOST_ENTRIES
        and store.rows.shape[2] <= MOST_WIDTH
        and store.is_bounded
        and values.dtype == store.rows.dtype == last.weights.dtype
        and values.dtype in DTYPES
        and type(values) is Tensor  # a tensor that is only being traced has no numbers
    )


def write_step(
    sizes: Sizes,
    store: EpisodeStore,
    values: Tensor,
    last: Entries,
    write: Entries,
    touched: Tensor,
) -> None:
    """Choose fresh rows, erase them, write. Made: `write`, and [B] what is touched then."""
    batch, heads, support = last.ids.shape
    memory = (store.rows, store.norms, store.order.last_access, store.touched)
    entries = padded(heads) * sizes.support
    whole = entries * max(entries, sizes.columns) <= TILE
    block = sizes.block(heads * (sizes.read + 1))
    launch(
        write_kernel, (batch,),
        *memory, touched, values, *last, *write, support, store.rows.shape[1],
        HEADS=heads, HEAD_SIZE=padded(heads), **sizes.common, SUPPORT=sizes.support,
        SCAN=SCAN, WHOLE=whole, BLOCK=block, num_warps=max(4, warps_for(block * sizes.columns)),
    )  # fmt: skip
    store.touched, store.extent = touched, min(store.extent + heads, store.num_slots)
    store.version += 1


def search_step(
    sizes: Sizes,
    store: EpisodeStore,
    values: Tensor,
    touched: Tensor,
    room: Tensor | None = None,
) -> Tensor:
    """The best rows by content of each part of the rows, as keys [B, H, P, K], in `room` perhaps.

    touched: rows of each element that may differ from the base, [B].
    """
    batch, capacity = store.rows.shape[:2]
    parts = parts_of(store.extent + sizes.top_k, batch * sizes.heads)
    shape = (batch, sizes.heads, parts, sizes.top_k)
    keys = touched.new_empty(shape) if room is None else room[: prod(shape)].view(shape)
    block = min(max(2 * TILE // sizes.columns, MIN_SIZE), 256)
    launch(
        search_kernel, (batch, sizes.heads, parts),
        store.rows, store.norms, touched, values, keys, capacity,
        HEADS=sizes.heads, **sizes.common, K=sizes.top_k, NEIGHBOURS=sizes.neighbours,
        SCAN=block, **sizes.ranking, num_warps=8,
    )  # fmt: skip
    return keys


def parts_of(rows: int, searches: int) -> int:
    """Into how many parts each search of so many rows is divided."""
    return max(1, min(rows // PART_ROWS, PROGRAMS // searches))


def links_step(
    sizes: Sizes, store: EpisodeStore, links: TemporalLinks, write: Entries, last: Entries
) -> tuple[Tensor, Tensor]:
    """Update the links; ids [B, H, 2, K] of linked rows, and weights [B, H, 2, K, S]."""
    extent, top_k = max(store.extent, sizes.top_k), sizes.top_k
    links.reserve(extent)
    if can_link(sizes, links):
        before = mix_links(sizes, links, write)
        keys = scan_links(sizes, links, before, write, last, store.touched, extent)
        return follow_links(sizes, links, last, keys)
    links.update(write, extent)
    linked = [links.follow(way, last, top_k, extent) for way in (links.precedes, links.follows)]
    ids, weights_of = zip(*linked, strict=True)
    return torch.stack(ids, 2), torch.stack(weights_of, 2)


def can_link(sizes: Sizes, links: TemporalLinks) -> bool:
    """Whether the links of a row and what is added to them are not too many for a program."""
    weights = links.precedence.weights
    kept = weights.shape[2]
    return kept + max(kept, sizes.read + 1) <= MOST_JOINED and weights.dtype == sizes.dtype


def mix_links(sizes: Sizes, links: TemporalLinks, write: Entries) -> Entries:
    """Link what was written [B, H, S + 1], but for the decay of other rows. The last precedence."""
    before = links.precedence
    batch, heads, kept = before.ids.shape
    few, many = padded(2 * kept), padded(kept + sizes.read + 1)
    rows, columns = sizes.support, padded(kept)
    few_block, many_block = (max(PAIRS // size**2, 1) for size in (few, many))
    few_block, many_block = min(few_block, rows), min(many_block, columns)
    links.precedence = Entries(*map(torch.empty_like, before))
    launch(
        mix_kernel, (batch * heads, rows // few_block + columns // many_block + 1),
        *links.follows, *links.precedes, *before, *write, *links.precedence,
        write.ids.shape[2] - 1, links.follows.ids.shape[2],
        L=kept, LINKS=columns, SUPPORT=rows, FEW=few, FEW_BLOCK=few_block, MANY=many,
        MANY_BLOCK=many_block, **sizes.ranking,
        num_warps=min(max(PAIRS, few**2, many**2) // 256, 16),
    )  # fmt: skip
    return before


def scan_links(
    sizes: Sizes,
    links: TemporalLinks,
    before: Entries,
    write: Entries,
    last: Entries,
    touched: Tensor,
    extent: int,
) -> Tensor:
    """Decay what precedes; the best rows of each part of both tables, as keys [B, H, 2, P, K]."""
    batch, heads, kept = before.ids.shape
    parts = parts_of(extent + PART_ROWS - 1, batch * heads)  # of one tile, if there are few rows
    columns = padded(kept)
    keys = touched.new_empty(batch, heads, 2, parts, sizes.top_k)
    launch(
        scan_kernel, (batch * heads, parts, 2),
        *links.follows, *links.precedes, before.ids, touched, *write, *last, keys,
        last.ids.shape[2], links.follows.ids.shape[2],
        HEADS=heads, K=sizes.top_k, NEIGHBOURS=sizes.neighbours, L=kept, LINKS=columns,
        ROWS=min(max(TILE // (2 * columns), MIN_SIZE), PART_ROWS), **sizes.ranking, num_warps=8,
    )  # fmt: skip
    return keys


def follow_links(
    sizes: Sizes, links: TemporalLinks, last: Entries, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids [B, H, 2, K] of the best rows, and weights [B, H, 2, K, S]."""
    batch, heads, _, parts, top_k = keys.shape
    support, shape = last.ids.shape[2], (batch, heads, 2, top_k)
    ids, weights_of = keys.new_empty(shape), last.weights.new_empty(*shape, support)
    launch(
        follow_kernel, (batch * heads, 2),
        *links.follows, *links.precedes, *last, keys, ids, weights_of,
        support, parts, links.follows.ids.shape[2],
        L=links.follows.ids.shape[3], SUPPORT=sizes.support, KEYS=16 * sizes.neighbours,
        **sizes.reading,
    )  # fmt: skip
    return ids, weights_of


def read_step(
    sizes: Sizes,
    store: EpisodeStore,
    values: Tensor,
    last: Entries,
    write: Entries,
    read: Reading,
    keys: Tensor,
    linked: Tensor,
    weights_of: Tensor,
) -> None:
    """Read, and end the step: mark what was accessed. Made: `read`."""
    batch, heads, parts, top_k = keys.shape
    support, order = last.ids.shape[2], store.order
    given = (values, last.weights, *write, keys, linked, weights_of)
    launch(
        read_kernel, (batch, heads),
        store.rows, order.last_access, store.touched, *given, *read,
        support, parts, store.rows.shape[1], order.time, read.reads.stride(0),
        HEADS=heads, **sizes.common, **sizes.reading, SUPPORT=sizes.support,
        LINKED=sizes.linked, KEYS=16 * sizes.neighbours, MARKS=min(32, 2 * sizes.support),
    )  # fmt: skip
    order.time += 1
    store.extent = min(store.extent + top_k, store.num_slots)


def device_backward(
    sizes: Sizes,
    buffer: Tensor,
    values: Tensor,
    last_weights: Tensor,
    write_ids: Tensor,
    ids: Tensor,
    links: Tensor,
    rows: Tensor,
    weights: Tensor,
    to_reads: Tensor | None,
    to_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the values and of the last read weights; the buffer is changed."""
    to_reads = torch.zeros_like(rows[:, :, 0]) if to_reads is None else to_reads.contiguous()
    to_weights = torch.zeros_like(weights) if to_weights is None else to_weights.contiguous()
    last_weights = last_weights.contiguous()
    to_values, to_last = torch.empty_like(values), torch.empty_like(last_weights)
    made = (values, last_weights, write_ids, ids, links, rows, weights)
    flows = (to_reads.flatten(1), to_weights, torch.empty_like(rows), to_values, to_last)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        backward_step(sizes, buffer, *made, *flows)
    return to_values, to_last


def backward_step(
    sizes: Sizes,
    buffer: Tensor,
    values: Tensor,
    last_weights: Tensor,
    write_ids: Tensor,
    ids: Tensor,
    links: Tensor,
    rows: Tensor,
    weights: Tensor,
    to_reads: Tensor,
    to_weights: Tensor,
    to_rows: Tensor,
    to_values: Tensor,
    to_last: Tensor,
) -> None:
    """Through the reads into the buffer, then through the write out of it.

    Given: gradients of reads [B, H * W] and read weights. Made: those of the rows that were read
    [B, H, R, W], of values and of the last read weights.
    """
    batch, heads, support = last_weights.shape
    launch(
        read_backward_kernel, (batch * heads,),
        values, last_weights, links, rows, weights, to_reads, to_weights, to_rows, to_values,
        to_last, support, to_reads.stride(0),
        HEADS=heads, **sizes.common, **sizes.reading, SUPPORT=sizes.support, LINKED=sizes.linked,
    )  # fmt: skip
    reads, written = heads * sizes.read, padded(heads) * sizes.support * sizes.columns
    whole = reads <= MAX_READS and written * values.element_size() <= 4 * TILE  # float32's
    warps = {"num_warps": max(4, warps_for(written))} if whole else {}
    launch(
        write_backward_kernel, (batch,),
        buffer, values, write_ids, last_weights, ids, to_rows, to_values, to_last, support,
        buffer.shape[1],
        HEADS=heads, HEAD_SIZE=padded(heads), **sizes.common, SUPPORT=sizes.support,
        **{**sizes.reading, **warps}, GROUPS=3 if sizes.linked else 1, READ_SIZE=padded(reads),
        WHOLE=whole, BLOCK=sizes.block(sizes.read + 1),
    )  # fmt: skip

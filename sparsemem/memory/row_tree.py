"""The trees that the rows of long episodes are found by; short ones are scanned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from sparsemem.indexes.metrics import inverse_norm
from sparsemem.indexes.ranking import top_k
from sparsemem.kernels.trees import TreeKernels, tree_kernels

NONE = -1  # as in sparsemem/kernels/tree.py, with the next two
PART, FEW = 4, 16  # of a node: what a part of it has at least; with less a list is given up
LANES = 64  # as in sparsemem/kernels/lanes.py
NODE_SIZE = 256  # members
PROBED_GROUPS = 8
PROBED_LISTS = 20
SPARE_CANDIDATES = 60  # more than k are proposed, where so many seem to be nearly as good
ENTERED_AT_ONCE = 4_096


class Tables(NamedTuple):
    """The arrays of B trees: see sparsemem/kernels/tree.py. M rows, L lists, G groups, S members
    of a node, in Z blocks (Y of the root).
    """

    row_codes: Int8[Tensor, "B L Z W 64"]
    row_members: Int[Tensor, "B L S"]
    row_counts: Int[Tensor, "B L"]
    row_places: Int[Tensor, "B M"]
    row_state: Int[Tensor, "B 2"]
    list_codes: Int8[Tensor, "B G Z W 64"]
    list_members: Int[Tensor, "B G S"]
    list_counts: Int[Tensor, "B G"]
    list_places: Int[Tensor, "B L"]
    list_state: Int[Tensor, "B 2"]
    group_codes: Int8[Tensor, "B 1 Y W 64"]
    group_members: Int[Tensor, "B 1 G"]
    group_counts: Int[Tensor, "B 1"]
    group_places: Int[Tensor, "B G"]
    group_state: Int[Tensor, "B 2"]
    entered: Int[Tensor, "B 1"]  # rows 0 .. entered - 1 are in the tree

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, W, M, S, L, G."""
        batch, lists, _, width, _ = self.row_codes.shape
        size, groups = self.row_members.shape[2], self.list_counts.shape[1]
        return batch, width, self.row_places.shape[1], size, lists, groups

    @property
    def places(self) -> tuple[int, ...]:
        """Where they are."""
        return tuple([table.data_ptr() for table in self])

    @staticmethod
    def empty(batch: int, width: int, rows: int, size: int, lists: int, groups: int) -> Tables:
        """Trees without a row."""
        whole, byte = (torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int8))
        state = torch.tensor([[0, NONE]]).repeat(batch, 1)
        blocks, of_root = -(-size // LANES), -(-groups // LANES)
        return Tables(
            byte.new_empty(batch, lists, blocks, width, LANES),
            whole.new_empty(batch, lists, size),
            whole.new_empty(batch, lists),
            whole.new_full((batch, rows), NONE),
            state,
            byte.new_empty(batch, groups, blocks, width, LANES),
            whole.new_empty(batch, groups, size),
            whole.new_empty(batch, groups),
            whole.new_empty(batch, lists),
            state.clone(),
            byte.new_empty(batch, 1, of_root, width, LANES),
            whole.new_empty(batch, 1, groups),
            whole.new_zeros(batch, 1),
            whole.new_empty(batch, groups),
            state.clone(),
            whole.new_zeros(batch, 1),
        )


class RowTrees:
    """Finds rows of B growing tables by cosine, without looking at all of them.

    From when an element has touched `minimum` rows on, all that it has touched are in its tree,
    where they point now: a read sees every write. A tree only proposes rows: the caller scores
    them.
    """

    def __init__(self, batch_size: int, width: int, minimum: int) -> None:
        self.minimum = minimum
        self.tables = Tables.empty(batch_size, width, 0, NODE_SIZE, 0, 0)

    @property
    def entered(self) -> Int[Tensor, " B"]:
        """How many rows are in the tree of each element."""
        return self.tables.entered.squeeze(1)

    @property
    def kernels(self) -> TreeKernels | None:
        """None where there are none: then rows are scanned."""
        return tree_kernels()

    def reserve(self, capacity: int, entering: int, moving: int) -> None:
        """Make room to enter so many of `capacity` rows, and to move so many."""
        old = self.tables
        batch, width, rows, size, lists, groups = old.sizes
        used = [int(state[:, 0].max()) for state in (old.row_state, old.list_state)]
        splits = min(entering, used[0] + PART * entering // size) + moving * (1 + size // FEW)
        needed = 2 + splits  # as has_room in sparsemem/kernels/tree.py
        if rows >= capacity and used[0] + needed <= lists and used[1] + needed <= groups:
            return
        rows = max(rows, capacity)
        lists, groups = max(lists, 2 * used[0] + needed), max(groups, 2 * used[1] + needed)
        self.tables = Tables.empty(batch, width, rows, size, lists, groups)
        self._fill(old)

    def _fill(self, old: Tables) -> None:
        for table, before in zip(self.tables, old, strict=True):
            common = tuple(slice(0, count) for count in before.shape)
            table[common] = before

    def copy(self) -> RowTrees:
        """Independent ones that find the same."""
        batch, width, *_ = self.tables.sizes
        copy = RowTrees(batch, width, self.minimum)
        copy.tables = Tables(*(table.clone() for table in self.tables))
        return copy

    def absorb(
        self, touched: Int[Tensor, " B"], rows: Float[Tensor, "B M W"], norms: Float[Tensor, "B M"]
    ) -> bool:
        """Enter what episodes have touched; False while all are short, or without kernels."""
        long = touched >= self.minimum
        if not bool(long.any()) or self.kernels is None:
            return False
        stops = torch.where(long, touched, self.entered)
        while missing := int((stops - self.entered).max()):
            self.reserve(rows.shape[1], missing, 0)
            ids = self.tables.entered + torch.arange(min(missing, ENTERED_AT_ONCE))
            self._put(ids.masked_fill(ids >= stops.unsqueeze(1), NONE), rows, norms)
            self.tables.entered[:, 0] = torch.minimum(self.entered + ids.shape[1], stops)
        return True

    def update(
        self, ids: Int[Tensor, "B n"], rows: Float[Tensor, "B M W"], norms: Float[Tensor, "B M"]
    ) -> None:
        """Tell the trees of changed rows; those that are not entered yet have time."""
        known = ids < self.tables.entered
        if bool(known.any()) and self.kernels is None:  # switched off since
            batch, width, _, size, *_ = self.tables.sizes
            self.tables = Tables.empty(batch, width, 0, size, 0, 0)
        elif bool(known.any()):
            self.reserve(rows.shape[1], 0, ids.shape[1])
            self._put(ids.masked_fill(~known, NONE), rows, norms)

    def _put(self, ids: Tensor, rows: Tensor, norms: Tensor) -> None:
        at = ids.clamp(min=0)
        vectors = rows.gather(1, at.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
        vectors = vectors * norms.gather(1, at).unsqueeze(-1)
        kernels, vectors = self._given(vectors)
        sizes = (*self.tables.sizes, ids.shape[1])
        places = (*self.tables.places, ids.data_ptr(), vectors.data_ptr())
        kernels.enter_rows(kernels.like, sizes, places)

    def proposed(self, queries: Float[Tensor, "B H W"], k: int) -> Int[Tensor, "B H C"]:
        """Rows among which the k best of those entered should be, in any order; -1: none."""
        kernels, queries = self._given(queries * inverse_norm(queries).unsqueeze(-1))
        proposed, *probed = self.effort(k)
        ids = self.tables.entered.new_empty(*queries.shape[:2], proposed)
        sizes = (*self.tables.sizes, queries.shape[1], k, proposed, *probed)
        places = (*self.tables.places, queries.data_ptr(), ids.data_ptr())
        kernels.propose_rows(kernels.like, sizes, places)
        return ids

    def effort(self, k: int) -> tuple[int, int, int]:
        """How many rows are proposed for the k best, from how many groups and lists."""
        return k + SPARE_CANDIDATES, PROBED_GROUPS, PROBED_LISTS

    def _given(self, vectors: Tensor) -> tuple[TreeKernels, Tensor]:
        """The kernels, and vectors as they take them."""
        kernels = self.kernels
        assert kernels is not None, "there were kernels when the first row was entered"
        # A diverged network is the training loop's to report.
        return kernels, vectors.detach().nan_to_num(0, 0, 0).float().contiguous()

    def candidates(
        self,
        queries: Float[Tensor, "B H W"],
        k: int,
        rows: Float[Tensor, "B M W"],
        norms: Float[Tensor, "B M"],
    ) -> tuple[Int[Tensor, "B H C"], Float[Tensor, "B H C"]]:
        """Proposed ids, ascending and without repetitions, and their scores.

        Rows that not all elements have entered are among them, exactly, with at least k of those
        that are last. Where a tree knew too few, id 0 stands at score -inf.
        """
        start = min(int(self.entered.min()), rows.shape[1] - k)
        tail = torch.bmm(queries, rows[:, start:].mT) * norms[:, start:].unsqueeze(1)
        found = self.proposed(queries, k)
        found = found.masked_fill(found >= start, NONE)  # those are in the tail
        ids = torch.cat([found, top_k(tail, k) + start], 2).sort(2).values
        flat = ids.clamp(min=0).flatten(1)
        element = torch.arange(len(flat)).unsqueeze(1)
        picked = rows[element, flat].view(*ids.shape, rows.shape[2])
        scores = (picked @ queries.unsqueeze(-1)).squeeze(-1) * norms[element, flat].view_as(ids)
        return ids.clamp(min=0), scores.masked_fill(ids < 0, -torch.inf)

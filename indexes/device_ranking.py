"""What an index on a GPU proposes, scored and ranked by one kernel; its buffer, scanned in place.

In torch's operations a search of a derived index is some 100 launches, which take the host twenty
times as long as FAISS's search takes. `DeviceDerived` and `DeviceBuffer` say in those operations
what is meant; here it is a kernel for the proposals, one for which buffered rows are current, and
the two of `device_scan` for the best of them. Scores are computed as that search computes them, to
the last bit, so that a row has the same one wherever it was found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.indexes.base import Found
from sparsemem.indexes.device_scan import fits, pass_of, power_of_two, shape_of
from sparsemem.indexes.exact import SPARE
from sparsemem.indexes.launching import launch
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from sparsemem.indexes.triton_switch import use_triton

# Proposals ranked at once. Of few, too: else sums over columns are taken in another order than in
# an exact search, as fewer of the numbers that lie together are a thread's.
CHUNK = 64
BLOCK = 256  # entries of a buffer looked at by a program


class Proposals(NamedTuple):
    """What a FAISS index proposes, best first, by the labels of its entries; -1: no more."""

    scores: Float[Tensor, "Q C"]  # as FAISS has them
    labels: Int[Tensor, "Q C"]
    are_all: bool  # the index has no other entries


class Known(NamedTuple):
    """What is known of labels, rows and the buffer: see `DeviceDerived` and `DeviceBuffer`."""

    row_of: Int[Tensor, " L"]  # by label
    label_of: Int[Tensor, " N"]  # by row: one more than its latest label
    place: Int[Tensor, " N"]  # by row: one more than that of its latest entry
    entries: Int[Tensor, " E"]  # of the buffer: rows


class Entries(RowTable):
    """The first entries of a buffer as a table: the rows that are current are live."""

    def __init__(self, rows: Float[Tensor, "E W"], current: Bool[Tensor, " E"], count: int) -> None:
        self.rows, self.live, self.extent = rows, current, count


def ranks(table: RowTable, k: int) -> bool:
    """Whether the kernels rank rows of a table, and those of its buffer."""
    return use_triton(table.rows) and fits(table, k + SPARE)


def comparable_queries(queries: Float[Tensor, "Q W"], metric: Metric) -> Float[Tensor, "Q W"]:
    """As `kinds.comparable`."""
    from sparsemem.indexes import ranking_kernels

    made = torch.empty(queries.shape, device=queries.device)
    launch(
        ranking_kernels.comparable_queries, (len(queries),),
        queries.contiguous(), made,
        WIDTH=queries.shape[1], COLUMNS=power_of_two(queries.shape[1]),
        SCALED=metric is Metric.cosine, num_warps=1,
    )  # fmt: skip
    return made


def rank(
    table: RowTable,
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    proposals: Proposals,
    beside: Int[Tensor, "Q B"],
    known: Known,
    k: int,
) -> tuple[Found, Bool[Tensor, " Q"]]:
    """The k best of what is proposed and of entries of the buffer, scored from the rows.

    And which queries' results may lack something better: fewer than k live rows were found; or so
    many proposals were stale that what comes after the worst of them may belong here, or what comes
    after the last entry.

    Args:
        beside: places in the buffer, best first; -1: no more.
    """
    from sparsemem.indexes import ranking_kernels

    scores = queries.new_empty(len(queries), k)
    ids = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
    unsure = torch.empty(len(queries), dtype=torch.bool, device=queries.device)
    wanted, besides = proposals.labels.shape[1], beside.shape[1]
    shape = shape_of(table.width, pass_of(table, metric, rough=False).product, 16)
    launch(
        ranking_kernels.rank_proposals, (len(queries),),
        table.rows, table.live.view(torch.uint8), queries.contiguous(), proposals.scores,
        proposals.labels, known.row_of, known.label_of, known.place, known.entries, beside,
        scores, ids, unsure.view(torch.uint8), wanted, besides, k, min(k, table.num_live),
        STRIDE=table.rows.stride(0), WIDTH=table.width,
        PART=shape.part, PARTS=-(-table.width // shape.part),
        CHUNK=CHUNK, KEPT=max(16, power_of_two(k)),
        ALL=proposals.are_all, METRIC=str(metric), SIGN=metric.sign, num_warps=4,
    )  # fmt: skip
    return Found(scores, ids), unsure


def current_entries(
    ids: Int[Tensor, " E"], place: Int[Tensor, " N"], live: Bool[Tensor, " N"], count: int
) -> Bool[Tensor, " E"]:
    """Which of a buffer's first `count` entries are the latest of a live row; others may be any."""
    from sparsemem.indexes import ranking_kernels

    current = torch.empty(len(ids), dtype=torch.bool, device=ids.device)
    launch(
        ranking_kernels.latest_entries, (-(-count // BLOCK),),
        ids, place, live.view(torch.uint8), current.view(torch.uint8), count,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return current

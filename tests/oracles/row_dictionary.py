"""What an index is to find, in a dictionary, loops and Python's floats; and random work on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch

from sparsemem.indexes.base import Found
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import COSINE_EPSILON, Metric
from sparsemem.indexes.product_key import ProductTable
from sparsemem.indexes.table import RowTable

OPERATIONS = ("update", "touch", "remove", "rebuild", "refused", "failure", "restart")
# So few values that ties are common, and so round that every sum of products is exact.
GRID = (-1.0, 0.0, 0.0, 0.5, 1.0)


LARGE_BUFFER = 1000  # takes all changed rows of a sequence


class Kind(NamedTuple):
    """A kind of index, and what it promises beyond the contract."""

    name: str
    exact: bool = False
    exhaustive: bool = False  # scores as good as exact search's, though ties may fall otherwise
    metrics: tuple[Metric, ...] = tuple(Metric)
    fresh: bool = True  # a FAISS kind, kept true by a `FreshIndex`
    floor: float | None = None  # of the recall that it is tuned for
    ks: tuple[int, ...] = (1, 2, 5, 50)  # rows asked for: fewer and more than there are

    def index(self, table: RowTable, metric: Metric, manner: Manner) -> Any:
        """Built from the first row on, and looked after in the calling thread."""
        options: dict[str, Any] = {}
        if self.fresh:
            options = {"background": False, "exact_below": 1, "min_recall": self.floor}
            options["buffer_rows"] = manner.buffer_rows
        return make_index(self.name, table, metric, **options)

    def derivation(self) -> type:
        """What a FAISS kind is built, absorbed into and searched by."""
        from sparsemem.indexes.derived import Derived

        return Derived


class Manner(NamedTuple):
    """How a sequence begins, and how a FAISS kind is looked after while it lasts."""

    filled: int  # rows that are there at first
    buffer_rows: int
    steady: bool  # lists are trained anew only when asked for


class RowDictionary(dict[int, list[float]]):
    """Live rows by id."""

    def score(self, metric: Metric, query: Sequence[float], row: int) -> float:
        pairs = list(zip(query, self[row], strict=True))
        if metric is Metric.l2:
            return sum((m - q) ** 2 for q, m in pairs)
        dot = sum(q * m for q, m in pairs)
        if metric is Metric.ip:
            return dot
        lengths = [sum(x * x for x in vector) + COSINE_EPSILON for vector in (query, self[row])]
        return dot / (math.sqrt(lengths[0]) * math.sqrt(lengths[1]))

    def ranked(self, metric: Metric, query: Sequence[float]) -> list[tuple[float, int]]:
        """(score, id) of every row: best first, ties by id."""
        scored = [(self.score(metric, query, row), row) for row in self]
        return sorted(scored, key=lambda pair: (-metric.sign * pair[0], pair[1]))

    def check(
        self,
        metric: Metric,
        query: Sequence[float],
        k: int,
        scores: Sequence[float],
        ids: Sequence[int],
    ) -> list[tuple[float, int]]:
        """What every kind promises of one query's result; returns the true k best."""
        best = self.ranked(metric, query)[:k]
        assert len(scores) == len(ids) == k
        found, rest = list(ids[: len(best)]), list(ids[len(best) :])
        assert rest == [-1] * len(rest), f"more than {len(best)} live rows: {ids}"
        assert list(scores[len(best) :]) == [-metric.sign * math.inf] * len(rest)
        assert all(row in self for row in found), f"stale: {set(found) - set(self)} of {ids}"
        assert len(set(found)) == len(found), f"found twice: {ids}"
        own = [self.score(metric, query, row) for row in found]
        for score, expected in zip(scores, own, strict=False):
            assert math.isclose(score, expected, rel_tol=1e-12, abs_tol=1e-12)
        order = [(-metric.sign * score, row) for score, row in zip(own, found, strict=True)]
        assert order == sorted(order), f"not best first, ties by id: {order}"
        return best


class Work:
    """One index under random work, beside the dictionary that says what it must find."""

    num_rows, width = 40, 4

    def __init__(self, kind: Kind, metric: Metric, dtype: torch.dtype, manner: Manner) -> None:
        self.kind, self.metric, self.dtype, self.manner = kind, metric, dtype, manner
        self.rows = RowDictionary()
        self.fresh: set[int] = set()  # changed since the index was last built, not absorbed
        self.table = self.make_table(manner.filled)
        self.restart(Random(0))

    def make_table(self, filled: int) -> RowTable:
        """A table whose first rows are filled."""
        random = Random(filled)
        rows = torch.zeros(self.num_rows, self.width, dtype=self.dtype)
        for row in range(filled):
            self.rows[row] = self.vector(random)
            rows[row] = torch.tensor(self.rows[row])
        return RowTable(rows, torch.arange(self.num_rows) < filled)

    def apply(self, operation: str, seed: int) -> None:
        """One operation, then searches."""
        random = Random(seed)
        built = self.builds()
        getattr(self, operation)(random)
        if self.builds() != built or self.manner.buffer_rows < LARGE_BUFFER:
            self.fresh.clear()
        self.search(random)

    def builds(self) -> int:
        return int(self.index.stats().get("rebuilds", 0))

    def vector(self, random: Random) -> list[float]:
        return random.choices(GRID, k=self.width)

    def some_ids(self, random: Random, among: Sequence[int]) -> list[int]:
        return random.sample(among, min(len(among), random.choice((0, 1, 1, 2, 5, 20))))

    def update(self, random: Random) -> None:
        """Rows written through the index."""
        ids = self.some_ids(random, range(self.num_rows))
        vectors = [self.vector(random) for _ in ids]
        given = torch.tensor(ids, dtype=torch.int64), self.tensor(vectors)
        copies = [tensor.clone() for tensor in given]
        self.index.update(*given)
        assert all(map(torch.equal, given, copies)), "the caller's arrays have changed"
        self.rows.update(zip(ids, vectors, strict=True))
        self.fresh.update(ids)

    def touch(self, random: Random) -> None:
        """Live rows changed in place by their owner, who tells the index."""
        ids = self.some_ids(random, sorted(self.rows))
        vectors = [self.vector(random) for _ in ids]
        with self.table.lock.write():
            for row, vector in zip(ids, vectors, strict=True):
                self.table.rows[row] = torch.tensor(vector)
            self.index.changed(torch.tensor(ids, dtype=torch.int64))
        self.rows.update(zip(ids, vectors, strict=True))
        self.fresh.update(ids)

    def remove(self, random: Random) -> None:
        """Rows taken out, some of which may not have been there."""
        ids = self.some_ids(random, range(self.num_rows))
        self.index.remove(torch.tensor(ids, dtype=torch.int64))
        for row in ids:
            self.rows.pop(row, None)
            self.fresh.discard(row)

    def rebuild(self, random: Random) -> None:
        with suppress(RuntimeError):  # FAISS cannot train on fewer rows than lists
            self.index.rebuild()

    def refused(self, random: Random) -> None:
        """Changes that are refused as a whole."""
        ids = torch.tensor(random.sample(range(self.num_rows), 3))
        rows = self.tensor([self.vector(random) for _ in ids])
        for bad_ids, bad_rows in (
            (ids, rows.index_fill(0, torch.tensor([2]), torch.nan)),
            (torch.tensor([int(ids[0]), int(ids[1]), self.num_rows]), rows),
            (ids[[0, 1, 0]], rows),
        ):
            with suppress(ValueError):
                self.index.update(bad_ids, bad_rows)
                raise AssertionError("was not refused")

    def failure(self, random: Random) -> None:
        """A build or an update of the index's own that breaks off in the middle."""
        step = random.choice(("build", "absorb", "_add", "_vectors"))
        broken = mock.patch.object(
            self.kind.derivation(), step, side_effect=RuntimeError("injected")
        )
        with broken, suppress(RuntimeError):
            self.update(random)
            self.index.rebuild()

    def restart(self, random: Random) -> None:
        """A new index of the same table."""
        self.index = self.kind.index(self.table, self.metric, self.manner)
        self.fresh.clear()

    def search(self, random: Random) -> None:
        """Two searches and what they promise: of a row that is there, and of any vector."""
        known = sorted(self.fresh or self.rows)
        vectors = [self.rows[random.choice(known)]] if known else [self.vector(random)]
        vectors.append(self.vector(random))
        queries, k = self.tensor(vectors), random.choice(self.kind.ks)
        copy = queries.clone()
        found: Found = self.index.search(queries, k)
        assert torch.equal(queries, copy), "the caller's queries have changed"
        for query, scores, ids in zip(
            vectors, found.scores.tolist(), found.ids.tolist(), strict=True
        ):
            best = self.rows.check(self.metric, query, k, scores, ids)
            missing = {row for _, row in best} - set(ids)
            if self.kind.exact:
                assert [row for _, row in best] == ids[: len(best)]
            assert not missing & self.fresh, f"changed and not found: {missing & self.fresh}"
            if self.kind.exhaustive:
                for score, (expected, _) in zip(scores, best, strict=False):
                    assert math.isclose(score, expected, rel_tol=1e-5, abs_tol=1e-5)

    def tensor(self, vectors: list[list[float]]) -> torch.Tensor:
        return torch.tensor(vectors, dtype=self.dtype).view(len(vectors), self.width)


class ProductWork(Work):
    """The same over product keys, whose rows change with their sub-keys."""

    half = 6
    num_rows = half**2

    def make_table(self, filled: int) -> RowTable:
        random = Random(filled)
        halves = [[self.vector(random)[:2] for _ in range(self.half)] for _ in range(2)]
        table = ProductTable(torch.tensor(halves, dtype=self.dtype))
        self.revive(table, range(self.num_rows))
        gone = range(min(filled, self.num_rows), self.num_rows)
        table.set_live(torch.tensor(gone, dtype=torch.int64), False)
        for row in gone:
            del self.rows[row]
        return table

    def revive(self, table: ProductTable, ids: Sequence[int]) -> None:
        halves = table.subkeys.tolist()
        for row in ids:
            self.rows[row] = halves[0][row // self.half] + halves[1][row % self.half]

    def update(self, random: Random) -> None:
        ids = self.some_ids(random, range(self.num_rows))
        rows = self.table.take(torch.tensor(ids, dtype=torch.int64))
        self.index.update(torch.tensor(ids, dtype=torch.int64), rows)
        self.revive(self.table, ids)

    def touch(self, random: Random) -> None:
        with self.table.lock.write():
            new = torch.tensor(self.vector(random)[:2])
            self.table.subkeys[random.randrange(2), random.randrange(self.half)] = new
        self.revive(self.table, sorted(self.rows))

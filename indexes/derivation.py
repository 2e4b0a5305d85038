"""What `FreshIndex` keeps beside a table: an index derived from it, on the host or on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from sparsemem.indexes.base import Found
from sparsemem.indexes.kinds import Knob

SPARE = 4  # candidates beyond k: FAISS's scores differ from the rows' own by rounding
QUANTISED = 4  # times k candidates where the index scores something coarser than the rows
START_EFFORT = 16
LEAST_TRAINING = 10_000
MOST_STRAYS = 0.25  # of the live rows: a scan of more would be dearer than looking harder


class Setting(NamedTuple):
    """How hard a search looks: the value of the knob, and candidates asked for, in units of k."""

    effort: int
    oversample: int


class Abandoned(Exception):
    """The work was given up because everything is to stop."""


class Derivation(ABC):
    """One index derived from a table, and a buffer of what it does not know: see `Derived`."""

    stride: ClassVar[int] = 1  # how many times more rows or queries it takes at once than `Derived`
    start: Setting  # before tuning
    setting: Setting
    knob: Knob
    holds: bool  # the floor of the recall, at that setting
    overrun: bool = False  # by strays: it had to take in rows that few searches would find
    absorbed: int  # rows that came or took another place since it was built
    buffer: Any  # a Buffer or a DeviceBuffer

    @property
    @abstractmethod
    def entries(self) -> int:
        """Entries, valid or not."""

    @abstractmethod
    def build(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train on a sample of the live rows, and add them all; Abandoned once `stopped()`."""

    @abstractmethod
    def mark(self, ids: Any) -> None:
        """Rows [n] have changed: they are searched exactly until absorbed."""

    @abstractmethod
    def forget(self, ids: Any) -> None:
        """Rows [n] are no longer live."""

    def tidy(self) -> None:  # noqa: B027 (`Derived` knows all the time)
        """Count exactly what waits in the buffer: under the table's write lock."""

    def buffered(self) -> tuple[int, int]:
        """Rows in the buffer, exactly, and how many of them are strays."""
        return int(self.buffer.count), int(self.buffer.strays)

    def settle(self) -> int:
        """Of the rows that were told since the last call, those that call for nothing: so many.

        They belong where their entry is, or were told again. Under the table's write lock.
        """
        return 0

    def noted(self) -> None:  # noqa: B027 (`Derived` counts what stays when it is settled)
        """What was told until now has been taken account of: `settle` is not to return it."""

    def absorb(self, count: int) -> None:
        """Take the `count` rows that were changed longest ago into the index, but for strays."""
        self.finish(self.prepare(self.begin(count)))

    @abstractmethod
    def begin(self, count: int) -> Any:
        """Rows to absorb: under the table's write lock."""

    @abstractmethod
    def prepare(self, batch: Any) -> Any:
        """Read the rows and find where they belong: needs no lock."""

    @abstractmethod
    def finish(self, prepared: Any) -> None:
        """Enter what was not changed meanwhile and does not stray: under the write lock."""

    @abstractmethod
    def found(
        self, queries: Float[Tensor, "Q W"], k: int, setting: Setting | None = None
    ) -> tuple[Found, Bool[Tensor, " Q"]]:
        """The k best of what is proposed and of the buffer, scored from the rows.

        And which queries' results may lack something better.
        """

    @abstractmethod
    def imbalance(self) -> float:
        """How uneven the lists are: 1 is even; n: a search takes about n times as long."""

    @abstractmethod
    def stale(self) -> int:
        """Entries that are not valid, at least."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Memory of the entries and of what is known of them, about."""


def ladder(limit: int) -> list[int]:
    """Values of a knob to try: 1, 2, 3, 4, 6, 8, 12, ... limit."""
    steps = {limit}
    value = 1
    while value <= limit:
        steps |= {value, min(limit, value + value // 2)}
        value *= 2
    return sorted(steps)

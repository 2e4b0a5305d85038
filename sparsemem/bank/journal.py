"""The journal of a durable bank: every change of its rows, written down before it is made.

A log is a file of records, each written whole by one append. A write that has returned is in
the file, and so survives the process; with `sync` it is on the disk, and survives the machine.
docs/bank-format.md gives the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from jaxtyping import Int
from torch import Tensor


class Kind(IntEnum):
    """What a record says; each operation sets fields of rows and is safe to repeat."""

    START = 0  # the log begins
    PUT = 1  # rows are there: `rows` and `values` where given, `tags`, `expiry`
    DROP = 2  # rows are gone
    FLAG = 3  # rows are frozen or not: `frozen`


class Journal(Protocol):
    """What a bank tells of its changes (`bank.journal`; None where nothing is durable)."""

    path: Path

    def record(self, kind: Kind, ids: Int[Tensor, " n"], arrays: Mapping[str, Tensor]) -> None:
        """Write an operation down, under `table.lock.write()` and before it is applied.

        Raises BankError where that fails; then nothing was written and nothing may be applied.
        """

    def touched(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of rows changed in place without a record (an optimiser's step).

        They become durable at the next `save`. Any order, repeats allowed; O(len(ids)).
        """

    def save(self) -> None:
        """Make everything durable that is not, and shorten the log to nothing."""

    def close(self) -> None:
        """Let go of the folder. The bank goes on without being durable."""

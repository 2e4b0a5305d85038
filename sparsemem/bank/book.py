"""What is known of each row of a bank beside its contents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsemem.bank.rows import zeros

FOREVER = 0  # as an expiry: the row has no time to live


class RowBook(nn.Module):
    """One entry a row: live, frozen, tag, expiry, last access, number of accesses.

    All start at zero, lazily: a table of 10^8 rows costs only the pages that are touched.
    """

    live: Tensor
    frozen: Tensor
    tags: Tensor
    expiry: Tensor
    last_access: Tensor
    accesses: Tensor
    clock: Tensor

    def __init__(self, num_rows: int, device: torch.device | str | None) -> None:
        super().__init__()
        for name, dtype in (
            ("live", torch.bool),
            ("frozen", torch.bool),
            ("tags", torch.int64),
            ("expiry", torch.int64),  # clock time at which the row goes; FOREVER: never
            ("last_access", torch.int64),  # clock time; 0: never
            ("accesses", torch.int64),
        ):
            self.register_buffer(name, zeros(num_rows, dtype=dtype, device=device))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))  # calls so far

"""Small banks, and what a bank holds as plain Python values."""

import torch

from sparsemem.bank import MemoryBank

NUM_ROWS = 12


def new_bank(path=None, **options):
    """A small bank."""
    return MemoryBank(**{"num_rows": NUM_ROWS, "width": 3, "value_width": 2, **options}, path=path)


def fill(bank):
    """Do every kind of operation on it."""
    bank.append(torch.randn(8, 3), torch.randn(8, 2), tags=torch.arange(8), ttl=40)
    bank.write(torch.tensor([11, 3]), torch.randn(2, 3), ttl=5)
    bank.write(torch.tensor([2]), values=torch.randn(1, 2), tags=9)
    bank.freeze(torch.tensor([1, 2, 4]))
    bank.unfreeze(torch.tensor([2]))
    bank.remove(torch.tensor([5, 6]))
    return bank


def reopened(bank, path):
    """The bank of a folder, after it was closed."""
    bank.close()
    return MemoryBank.load(path)


def names(path):
    """What is in a bank's folder."""
    return sorted(file.name for file in path.iterdir() if file.name != "lock")


def rows_of(bank) -> dict[int, tuple]:
    """Of each live row: key (with product keys: value), value, frozen, tag, expiry."""
    book = bank.book
    ids = book.live.nonzero().squeeze(1)
    tables = [bank.tables[0], bank.tables[-1]]
    columns = [*tables, book.frozen, book.tags, book.expiry]
    parts = [column.detach()[ids].tolist() for column in columns]
    return dict(zip(ids.tolist(), zip(*map(_hashable, parts), strict=True), strict=True))


def usage_of(bank) -> dict[int, tuple]:
    """Of each row that was ever accessed: last access, accesses, background batches."""
    book = bank.book
    ids = book.last_access.nonzero().squeeze(1)
    parts = [c[ids].tolist() for c in (book.last_access, book.accesses, book.background)]
    return dict(zip(ids.tolist(), zip(*parts, strict=True), strict=True))


def _hashable(part: list) -> list:
    return [tuple(row) if isinstance(row, list) else row for row in part]

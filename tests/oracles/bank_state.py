"""What a bank holds, as plain Python values, for comparison."""


def rows_of(bank) -> dict[int, tuple]:
    """Of each live row: key, value, frozen, tag, expiry."""
    book = bank.book
    ids = book.live.nonzero().squeeze(1)
    tables = [bank.keys, bank.keys if bank.values is None else bank.values]
    columns = [*tables, book.frozen, book.tags, book.expiry]
    parts = [column.detach()[ids].tolist() for column in columns]
    return dict(zip(ids.tolist(), zip(*map(_hashable, parts), strict=True), strict=True))


def usage_of(bank) -> dict[int, tuple]:
    """Of each row that was ever used: last access, accesses, background batches."""
    book = bank.book
    ids = (book.live | book.last_access.ne(0)).nonzero().squeeze(1)
    parts = [c[ids].tolist() for c in (book.last_access, book.accesses, book.background)]
    return dict(zip(ids.tolist(), zip(*parts, strict=True), strict=True))


def _hashable(part: list) -> list:
    return [tuple(row) if isinstance(row, list) else row for row in part]

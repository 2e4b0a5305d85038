"""MemoryBank: rows that outlive a sequence, found by content, trained by row-sparse gradients."""

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.errors import BankError, DamagedError
from sparsemem.bank.reading import Hit
from sparsemem.bank.transfer import from_embedding, from_rows

__all__ = ["BankError", "DamagedError", "Hit", "MemoryBank", "from_embedding", "from_rows"]

"""MemoryBank: rows that outlive a sequence, found by content, trained by row-sparse gradients."""

from sparsemem.bank.bank import Hit, MemoryBank

__all__ = ["Hit", "MemoryBank"]

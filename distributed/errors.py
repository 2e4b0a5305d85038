"""What can be wrong with shards."""

from sparsemem.bank.errors import BankError
from sparsemem.errors import UserError


class ShardError(UserError):
    """A shard did not answer in time, or is gone for good; the message names it."""


class OutOfTurnError(BankError):
    """A change came before the one that its client asked for before it, or long after."""

"""What can be wrong with shards."""

from sparsemem.errors import UserError


class ShardError(UserError):
    """A shard did not answer in time, or is gone for good; the message names it."""

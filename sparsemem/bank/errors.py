"""What can be wrong with a bank's folder."""

from sparsemem.errors import UserError


class BankError(UserError):
    """A bank's folder is foreign, in use, of another version, or could not be read or written."""


class DamagedError(BankError):
    """Files of a bank are missing, torn or changed; the message names the file and the place."""

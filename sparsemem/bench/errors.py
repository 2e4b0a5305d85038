"""Errors of benchmarks that a user can mend."""

from sparsemem.errors import UserError


class BenchError(UserError):
    """A result file is foreign, an option is wrong, or a process that measures has failed."""

"""The base of errors that a user can mend: the command line prints their one line."""


class UserError(Exception):
    """Something outside the program is wrong: a config, a file, a disk, a diverged run."""

"""Errors that a user can mend: the command line prints their one line without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: a config, a file, a disk, a diverged run."""


class ConfigError(UserError, ValueError):
    """A config value is unknown or not what was expected."""


class CheckpointError(UserError):
    """A checkpoint is foreign, torn, of another model, or could not be written."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing, torn or changed: an older one may be whole."""


class RunError(UserError):
    """A run folder is missing or in use, or training cannot go on."""

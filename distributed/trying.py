"""Whether a config can be trained over shards, found out before anything is started."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsemem.checks import check_at_most, check_size
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.cluster import Wanted
from sparsemem.distributed.opening import open_bank
from sparsemem.distributed.transport import LocalShards
from sparsemem.models.registry import bank_argument
from sparsemem.training.banks import NoBank, bank_arguments, check_bank_section
from sparsemem.training.config import Config
from sparsemem.training.errors import ConfigError, section_errors
from sparsemem.training.setup import Setup, check_split, prepare
from sparsemem.training.team import check_shares
from sparsemem.training.trainer import Trainer

# Of the bank over which a model is made, about: a whole one is elsewhere. A square number.
TRIED_ROWS = 2**16


def tried(config: Config, wanted: Wanted) -> Setup:
    """What the config names, over a small empty bank in as many shards; the config is resolved.

    ConfigError says what is wrong with it, or with what is wanted.
    """
    check_wanted(config, wanted)
    assert config.bank is not None
    device = config.training.device
    rows = min(config.bank.num_rows, max(TRIED_ROWS, (math.isqrt(wanted.shards) + 1) ** 2))
    config = on_device(config, "cpu")  # trainers may have GPUs where this process has none
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bank"
        create_bank(path, config, wanted.shards, num_rows=rows, initial="empty")
        bank = open_bank(path, LocalShards(path))
        try:
            setup = prepare(config, bank)
            Trainer(setup, keeper=NoBank())
            if config.training.evaluate_every is not None:
                check_split(setup, "validation")
        finally:
            bank.close()
    return setup._replace(config=on_device(setup.config, device))


def on_device(config: Config, device: str) -> Config:
    """A config for another device."""
    training = config.training.model_copy(update={"device": device})
    return config.model_copy(update={"training": training})


def check_wanted(config: Config, wanted: Wanted) -> None:
    """ConfigError where a config cannot be shared out like this."""
    with section_errors(None):
        check_size("--shards", wanted.shards)
        check_size("--workers", wanted.workers)
        check_bank_section(config)
        if config.bank is None:
            raise ConfigError(
                f"--shards is {wanted.shards}, but the config has no section bank: expected one,"
                " whose rows the shards hold"
            )
        if bank_argument(config.model.name) == "memory":
            raise ConfigError(
                f"model.name is {config.model.name!r}, whose episodes copy rows of a bank in the"
                " same process: expected 'memory-lstm', or no --shards"
            )
        check_at_most("--shards", wanted.shards, "bank.num_rows", config.bank.num_rows)
    if config.training.device not in ("cpu", "cuda"):
        raise ConfigError(
            f"training.device is {config.training.device!r}, expected 'cpu' or 'cuda': with"
            " --shards each worker has a GPU of its own"
        )
    check_shares(config.training.batch_size, wanted.workers)


def create_bank(path: Path, config: Config, num_shards: int, **changes: int | str) -> None:
    """The folder of a config's bank, in shards, with some of its arguments changed."""
    with section_errors("bank"):
        ShardedBank.create(path, num_shards=num_shards, **bank_arguments(config) | changes)

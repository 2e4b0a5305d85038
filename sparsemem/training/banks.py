"""The bank of a run: how it is made, and how checkpoints keep its rows.

A checkpoint's tensors hold no rows: they are the bank's to save. A `Keeper` does both together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.contract import Bank
from sparsemem.bank.errors import BankError
from sparsemem.bank.errors import DamagedError as DamagedBank
from sparsemem.bank.rows import bank_of
from sparsemem.indexes.factory import PRODUCT_KEY
from sparsemem.indexes.product_key import num_subkeys
from sparsemem.models.registry import bank_argument, bank_readers, needs_bank
from sparsemem.training.checkpoint import Checkpoint
from sparsemem.training.config import Config
from sparsemem.training.errors import CheckpointError, ConfigError, DamagedError, section_errors

FOLDER = "bank"  # in a checkpoint

Fill = Callable[[Path], None]


# Making it -----------------------------------------------------------------------------


def bank_arguments(config: Config) -> dict[str, Any]:
    """What makes the bank of a config, for `MemoryBank(**...)` and `ShardedBank.create(...)`."""
    assert config.bank is not None
    given = config.bank.model_dump(exclude={"optimizer"})
    options = {name: given.pop(name) for name in ("background", "buffer_rows", "exact_below")}
    given["dtype"] = getattr(torch, given["dtype"] or config.training.dtype)
    if given["seed"] is None:
        given["seed"] = config.training.seed
    return given | {name: value for name, value in options.items() if value is not None}


def make_bank(config: Config, **changes: Any) -> MemoryBank:
    """The bank of a config, with some of its arguments changed."""
    with section_errors("bank"):
        return MemoryBank(**bank_arguments(config) | changes)


def check_bank_section(config: Config) -> None:
    """ConfigError where the model and the section `bank` do not go together."""
    name, bank = config.model.name, config.bank
    if bank is None:
        if needs_bank(name):
            raise ConfigError(
                f"bank is missing: model {name!r} reads one, expected a section bank with num_rows"
                " and width"
            )
        return
    if bank_argument(name) is None:
        raise ConfigError(
            f"bank is given, but model {name!r} reads none: expected no section bank, or one of"
            f" the models {', '.join(bank_readers())}"
        )
    if bank.index == PRODUCT_KEY:
        with section_errors("bank"):
            num_subkeys(bank.num_rows)
    elif bank.initial == "empty":
        raise ConfigError(
            "bank.initial is 'empty', expected 'normal': nothing but the optimiser changes rows,"
            " and it changes those that are there"
        )


def row_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The tables of the bank that a model reads."""
    return [parameter for parameter in model.parameters() if bank_of(parameter) is not None]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of a model but the rows of a bank."""
    return [parameter for parameter in model.parameters() if bank_of(parameter) is None]


def dense_state(model: nn.Module, bank: Bank | None) -> dict[str, Tensor]:
    """A model's `state_dict` without the bank that it reads."""
    modules = model.named_modules(remove_duplicate=False)
    places = tuple(f"{name}." for name, module in modules if module is bank)
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(places)}


# Keeping it ----------------------------------------------------------------------------


@runtime_checkable
class Write(Protocol):
    """What writes a run's checkpoint."""

    def __call__(self, kept: Mapping[str, Any], fill: Fill | None = None) -> Path:
        """Write it; returns its path.

        kept: JSON values for the manifest, under "bank"; `restore` finds them there.
        fill: called with the checkpoint's folder before that appears, to put files beside.
        """


@runtime_checkable
class Keeper(Protocol):
    """How checkpoints keep the rows of a bank, with the state of what steps them where that is
    not in the row optimiser of the trainer.
    """

    def save(self, write: Write) -> Path:
        """Write a checkpoint by `write`, called once, and the rows with it: both or neither.

        Called by member 0 of a team, while the others wait. CheckpointError or BankError where
        that fails; earlier checkpoints are as they were.
        """

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to the rows of a checkpoint. Called by all members of a team.

        CheckpointError or BankError, with nothing changed, where they are damaged or of another
        bank.
        """


class NoBank:
    """The keeper of a run without a bank."""

    def save(self, write: Write) -> Path:
        """Write the checkpoint."""
        return write({})

    def restore(self, checkpoint: Checkpoint) -> None:
        """CheckpointError if there are rows in it."""
        if checkpoint.manifest.get("bank") is not None:
            raise CheckpointError(
                f"{checkpoint.path} is of a run with a bank, expected one without"
            )


class Snapshots:
    """The keeper of a `MemoryBank`: each checkpoint has a snapshot of it."""

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank

    def save(self, write: Write) -> Path:
        """Write the checkpoint with a snapshot in its folder `bank`."""
        return write({}, lambda folder: self.bank.save(folder / FOLDER))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to the checkpoint's snapshot, of which every byte is checked."""
        path = checkpoint.path / FOLDER
        if checkpoint.manifest.get("bank") is None or not path.is_dir():
            raise CheckpointError(f"{checkpoint.path} holds no snapshot of a bank, expected {path}")
        try:
            loaded = MemoryBank.load(path, device=self.bank.keys.device)
        except DamagedBank as error:
            raise DamagedError(str(error)) from None
        except BankError as error:
            raise CheckpointError(str(error)) from None
        with_tables(loaded, path, self.bank)


def with_tables(loaded: MemoryBank, path: Path, bank: MemoryBank) -> None:
    """Give a bank the tables of another, and what is known of their rows, without a copy."""
    found, expected = (
        {name: (list(x.shape), x.dtype) for name, x in each.named_parameters()}
        for each in (loaded, bank)
    )
    if found != expected:
        raise CheckpointError(f"{path} is of another bank: it has {found}, expected {expected}")
    loaded.index.close()
    bank.keys.data, bank.book = loaded.keys.data, loaded.book
    if bank.values is not None and loaded.values is not None:
        bank.values.data = loaded.values.data
    bank.rebind()


def keeper_of(bank: Bank | None) -> Keeper:
    """The keeper of a bank in this process, or of none."""
    if bank is None:
        return NoBank()
    if isinstance(bank, MemoryBank):
        return Snapshots(bank)
    raise TypeError(f"keeper is None, expected one for a bank of type {type(bank).__name__}")

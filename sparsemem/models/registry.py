"""Models by name, for configs and the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sparsemem.bank.contract import Bank
from sparsemem.checks import nearest
from sparsemem.models.base import Cell, MemoryModel
from sparsemem.models.dnc import DNC
from sparsemem.models.lstm import LSTM
from sparsemem.models.memory_lstm import MemoryLSTM, MemoryLSTMCell
from sparsemem.models.ntm import NTM
from sparsemem.models.sam import SAM, SAMCell
from sparsemem.models.sdnc import SDNC, SDNCCell

MODELS: dict[str, type[MemoryModel]] = {
    "sam": SAM,
    "sdnc": SDNC,
    "dnc": DNC,
    "ntm": NTM,
    "lstm": LSTM,
    "memory-lstm": MemoryLSTM,
}
# Where a model takes **options, they are those of its cell.
_CELLS: dict[str, type[Cell]] = {"sam": SAMCell, "sdnc": SDNCCell, "memory-lstm": MemoryLSTMCell}
# The argument of each model that reads a bank.
_BANKS = {"sam": "memory", "sdnc": "memory", "memory-lstm": "bank"}


def find_model(name: str) -> type[MemoryModel]:
    """The class of a model, upper or lower case; ValueError names the nearest known one."""
    if name.lower() not in MODELS:
        raise ValueError(f"unknown model {name!r}: {nearest(name.lower(), MODELS)}")
    return MODELS[name.lower()]


def model_options(name: str) -> dict[str, Any]:
    """Options that a config may give for a model, with their defaults.

    A required option's value is `inspect.Parameter.empty`. Arguments that only code can
    give, such as a controller factory or a bank, are left out.
    """
    options: dict[str, Any] = {}
    kinds = _kinds(name)
    for parameter in (
        p for init in _inits(name) for p in inspect.signature(init).parameters.values()
    ):
        many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        sayable = parameter.name != "self" and not many and _is_sayable(kinds[parameter.name])
        # Where a model's default is None, its cell's counts.
        if sayable and options.get(parameter.name) is None:
            options[parameter.name] = parameter.default
    return options


def bank_readers() -> list[str]:
    """The models that can read a bank."""
    return list(_BANKS)


def bank_argument(name: str) -> str | None:
    """The argument of a model that takes the bank that it reads; None: it reads none."""
    return _BANKS.get(name.lower())


def needs_bank(name: str) -> bool:
    """Whether a model cannot do without a bank."""
    argument = bank_argument(name)
    if argument is None:
        return False
    parameter = inspect.signature(find_model(name).__init__).parameters[argument]
    return parameter.default is inspect.Parameter.empty


def make_model(name: str, bank: Bank | None = None, /, **options: Any) -> MemoryModel:
    """Build a model: `make_model("sam", input_size=8, output_size=8, hidden_size=100)`.

    `bank` is for a model that reads one (`bank_argument`).

    ValueError for an unknown name or option names the nearest known one; TypeError for a
    value of the wrong kind. What else a model refuses (a size below 1, a top_k over
    num_slots) it says itself.
    """
    known = model_options(name)
    kinds = _kinds(name)
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"unknown option {option!r} of model {name!r}: {nearest(option, known)}"
            )
        _check_kind(option, value, kinds[option])
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"model {name!r} needs the option {option!r}")
    argument = bank_argument(name)
    if bank is not None:
        if argument is None:
            raise ValueError(f"bank is given, but model {name!r} reads none")
        options[argument] = bank
    elif needs_bank(name):
        raise ValueError(f"model {name!r} needs a bank")
    return find_model(name)(**options)


def _kinds(name: str) -> dict[str, Any]:
    """The annotated type of each argument of a model."""
    kinds: dict[str, Any] = {}
    for init in _inits(name):
        kinds = get_type_hints(init) | kinds
    return kinds


def _is_sayable(kind: Any) -> bool:
    """Whether YAML can say a value of an annotated type."""
    return all(part in (bool, int, float, str, type(None)) for part in get_args(kind) or (kind,))


def _inits(name: str) -> list[Callable[..., None]]:
    """The constructors that a model's options come from: its own, its cell's, its cell's bases'."""
    cell = _CELLS.get(name.lower())
    bases = [kind for kind in cell.__mro__ if issubclass(kind, Cell)] if cell else []
    return [kind.__init__ for kind in (find_model(name), *bases) if "__init__" in vars(kind)]


def _check_kind(option: str, value: Any, kind: Any) -> None:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise TypeError(f"{option} is {value!r}, expected {expected}") from None

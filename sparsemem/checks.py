"""Checks of arguments: each error names the argument, its value and what was expected."""

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from torch import Tensor


class NotFiniteError(ValueError):
    """A tensor has NaN or infinite values where finite ones are expected."""


def check_size(name: str, value: int, minimum: int = 1) -> int:
    """Return `value` if it is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected at least {minimum}")
    return value


def check_at_most(name: str, value: int, limit_name: str, limit: int) -> int:
    """Return `value` if it does not exceed `limit`, another argument's value."""
    if value > limit:
        raise ValueError(f"{name} is {value}, expected at most {limit_name} = {limit}")
    return value


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinite values, naming the first."""
    # The sum is finite unless an element is not (or it overflowed: then look closer).
    if math.isfinite(tensor.sum().item()):
        return
    bad = (~tensor.isfinite()).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        value = tensor[where].item()
        raise NotFiniteError(f"{name}{list(where)} is {value}, expected finite values")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def check_known(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is not a known one."""
    if value not in known:
        raise ValueError(f"{name} is {str(value)!r}, {nearest(str(value), known)}")


def check_fraction(name: str, value: float) -> float:
    """Return `value` if it is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")
    return value


def check_like(name: str, tensor: Tensor, parameter: Tensor) -> None:
    """Refuse a tensor of another dtype or device than the model's parameters."""
    if tensor.dtype != parameter.dtype or tensor.device != parameter.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}, the model's parameters are"
            f" {parameter.dtype} on {parameter.device}"
        )


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number above 0")
    return value

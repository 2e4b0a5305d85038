"""Optimisers and learning-rate schedules by name: torch's, and for a bank's rows those by row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sparsemem.checks import nearest
from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD
from sparsemem.training.banks import dense_parameters, row_parameters
from sparsemem.training.config import Config, Optimizer, RowOptimizer, Schedule
from sparsemem.training.errors import ConfigError

PLACE, ROW_PLACE = "training.optimizer", "bank.optimizer"
Kinds = Mapping[str, type[torch.optim.Optimizer]]
OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
ROW_OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": RowAdam,
    "adamw": RowAdamW,
    "adagrad": RowAdagrad,
    "sgd": RowSGD,
}


class Optimisers:
    """What steps a model, as one: that of all parameters but rows, then that of a bank's rows."""

    def __init__(self, each: Sequence[torch.optim.Optimizer]) -> None:
        self.each = list(each)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last gradients."""
        for optimiser in self.each:
            optimiser.zero_grad(set_to_none)

    def step(self) -> None:
        """Step all parameters; the rows first, as that may fail where they are elsewhere."""
        for optimiser in reversed(self.each):
            optimiser.step()


def make_optimisers(config: Config, model: nn.Module) -> Optimisers:
    """The optimisers of a config, for all parameters of its model."""
    each = [make_optimiser(config.training.optimizer, dense_parameters(model))]
    if config.bank is not None:
        each.append(make_row_optimiser(config.bank.optimizer, row_parameters(model)))
    return Optimisers(each)


def optimiser_options(name: str, kinds: Kinds = OPTIMISERS, place: str = PLACE) -> dict[str, Any]:
    """Options of an optimiser beside its learning rate, with their defaults.

    Without those for gradients through the optimiser and for CUDA graphs: nothing here has these.
    """
    if name not in kinds:
        raise ConfigError(
            f"{place}.name is {name!r}, expected an optimiser: {nearest(name, kinds)}"
        )
    parameters = inspect.signature(kinds[name]).parameters
    return {
        key: list(value.default) if isinstance(value.default, tuple) else value.default
        for key, value in parameters.items()
        if key not in ("params", "lr", "differentiable", "capturable")
    }


def make_optimiser(config: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a config; ConfigError names the option that is wrong."""
    return _made(config, parameters, OPTIMISERS, PLACE)


def make_row_optimiser(
    config: RowOptimizer, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The row optimiser of a config; ConfigError names the option that is wrong."""
    return _made(config, parameters, ROW_OPTIMISERS, ROW_PLACE)


def _made(
    config: Optimizer | RowOptimizer, parameters: Iterable[nn.Parameter], kinds: Kinds, place: str
) -> torch.optim.Optimizer:
    known = optimiser_options(config.name, kinds, place)
    for key, value in config.options.items():
        if key not in known:
            names = [*known, "learning_rate"]
            raise ConfigError(
                f"unknown key {place}.{key} for {config.name!r}: {nearest(key, names)}"
            )
        if key != "rounding_seed":  # the row optimisers check it themselves
            _check_kind(f"{place}.{key}", value, known[key])
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.options.items()
    }
    try:
        return kinds[config.name](parameters, lr=config.learning_rate, **options)  # type: ignore[call-arg]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_kind(path: str, value: Any, default: Any) -> None:
    """Torch checks ranges, not kinds: a string would fail deep inside a comparison."""
    if isinstance(default, list):
        fits = isinstance(value, list) and len(value) == len(default)
        fits = fits and all(isinstance(item, int | float) for item in value)
        expected = f"a list of {len(default)} numbers"
    elif default is None or isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
        fits = fits or (default is None and value is None)
    else:
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    if not fits:
        raise ConfigError(f"{path} is {value!r}, expected {expected}")


def learning_rate_factor(step: int, schedule: Schedule, steps: int) -> float:
    """Factor of the learning rate at a step counted from 0.

    Rises linearly over the first `warmup` steps, then stays (constant) or falls to
    `final` at the last of `steps`, along a line or half a cosine (Loshchilov & Hutter
    2017, without restarts).
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    part = min(1.0, (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup))
    left = 1.0 - part if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * part))
    return schedule.final + (1.0 - schedule.final) * left


def make_schedule(optimiser: torch.optim.Optimizer, schedule: Schedule, steps: int) -> LambdaLR:
    """The schedule of a config as a torch scheduler, stepped once a batch."""
    return LambdaLR(optimiser, lambda step: learning_rate_factor(step, schedule, steps))

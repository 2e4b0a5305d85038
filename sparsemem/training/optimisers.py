"""Torch optimisers and learning-rate schedules by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sparsemem.checks import nearest
from sparsemem.training.config import Optimizer, Schedule
from sparsemem.training.errors import ConfigError

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
_PLACE = "training.optimizer"


def optimiser_options(name: str) -> dict[str, Any]:
    """Options of a torch optimiser beside its learning rate, with their defaults.

    Without those for gradients through the optimiser and for CUDA graphs: nothing here has these.
    """
    if name not in OPTIMISERS:
        raise ConfigError(
            f"{_PLACE}.name is {name!r}, expected an optimiser: {nearest(name, OPTIMISERS)}"
        )
    parameters = inspect.signature(OPTIMISERS[name]).parameters
    return {
        key: list(value.default) if isinstance(value.default, tuple) else value.default
        for key, value in parameters.items()
        if key not in ("params", "lr", "differentiable", "capturable")
    }


def make_optimiser(config: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a config; ConfigError names the option that is wrong."""
    known = optimiser_options(config.name)
    for key, value in config.options.items():
        if key not in known:
            names = [*known, "learning_rate"]
            raise ConfigError(
                f"unknown key {_PLACE}.{key} for {config.name!r}: {nearest(key, names)}"
            )
        _check_kind(f"{_PLACE}.{key}", value, known[key])
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.options.items()
    }
    try:
        return OPTIMISERS[config.name](parameters, lr=config.learning_rate, **options)  # type: ignore[call-arg]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{_PLACE}: {error}") from None


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

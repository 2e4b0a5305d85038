"""Difficulty over a training run.

Exponential: Rae et al. 2016 (arXiv 1610.09027, section 4.3): the level of each batch is
drawn uniformly from 1..h, and h doubles whenever the mean loss stays under a threshold.
"""

from __future__ import annotations

import random
from typing import Any

from sparsemem.training import config as configs


def draw(seed: int, step: int, low: int, high: int) -> int:
    """An integer of [low, high], uniform, a pure function of its arguments.

    Pure, so that a resumed run needs no generator's state to draw the same levels.
    """
    return random.Random(f"level {seed} {step}").randint(low, high)


class Fixed:
    """Levels uniform in [minimum, maximum] from the first batch to the last."""

    def __init__(self, seed: int, minimum: int, maximum: int) -> None:
        self.seed, self.minimum, self.maximum = seed, minimum, maximum

    @property
    def hardest(self) -> int:
        """The largest level drawn at present."""
        return self.maximum

    def level(self, step: int) -> int:
        """Level of the batch of a step."""
        return draw(self.seed, step, self.minimum, self.maximum)

    def update(self, loss: float) -> bool:
        """Hear the loss of a batch; True if the difficulty has changed."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes, nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Exponential:
    """Levels uniform in [minimum, h]; h doubles once `window` losses average under threshold.

    The window is emptied when h doubles, so each h is judged by its own losses only.
    """

    def __init__(
        self, seed: int, minimum: int, initial: int, maximum: int, threshold: float, window: int
    ) -> None:
        self.seed, self.minimum, self.maximum = seed, minimum, maximum
        self.threshold, self.window = threshold, window
        self._hardest = initial
        self._losses: list[float] = []

    @property
    def hardest(self) -> int:
        """h, the largest level drawn at present."""
        return self._hardest

    def level(self, step: int) -> int:
        """Level of the batch of a step."""
        return draw(self.seed, step, self.minimum, self._hardest)

    def update(self, loss: float) -> bool:
        """Hear the loss of a batch; True if h has doubled."""
        self._losses = [*self._losses, loss][-self.window :]
        mean = sum(self._losses) / len(self._losses)
        full = len(self._losses) == self.window
        if not full or mean >= self.threshold or self._hardest == self.maximum:
            return False
        self._hardest = min(2 * self._hardest, self.maximum)
        self._losses = []
        return True

    def state_dict(self) -> dict[str, Any]:
        """h and the losses since it last doubled."""
        return {"hardest": self._hardest, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._hardest, self._losses = int(state["hardest"]), [float(x) for x in state["losses"]]


Curriculum = Fixed | Exponential


def make_curriculum(config: configs.Curriculum, seed: int) -> Curriculum:
    """The curriculum of a config, as resolved."""
    assert config.minimum is not None
    assert config.maximum is not None
    if config.name == "fixed":
        return Fixed(seed, config.minimum, config.maximum)
    initial = config.minimum if config.initial is None else config.initial
    return Exponential(
        seed, config.minimum, initial, config.maximum, config.threshold, config.window
    )

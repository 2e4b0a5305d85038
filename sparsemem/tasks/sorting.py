"""Priority sort (Graves et al. 2014, arXiv 1410.5401, section 4.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsemem.checks import check_fraction, check_size
from sparsemem.tasks.base import Batch
from sparsemem.tasks.bits import BitTask


class PrioritySortTask(BitTask):
    """Show `level` words, each with a priority; give back the highest ones, highest first.

    Priorities are uniform in [-1, 1]; equal ones keep their order. `fraction` of the
    words, rounded and at least one, is to be given back: 16 of 20, as in the paper.
    Input channels: `bits`, priority, delimiter. T = level + 1 + answer steps.
    """

    def __init__(
        self, *, bits: int = 8, fraction: float = 0.8, max_level: int = 20, **common: Any
    ) -> None:
        self.bits = check_size("bits", bits)
        self.fraction = check_fraction("fraction", fraction)
        self.input_size, self.output_size = bits + 2, bits
        super().__init__(max_level=max_level, **common)

    def answer_length(self, level: int) -> int:
        """How many words are to be given back."""
        return max(1, round(level * self.fraction))

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """Words with priorities, delimiter, sorted words."""
        words = self.random_bits(rng, level, self.bits)
        priorities = torch.from_numpy(rng.uniform(-1, 1, (self.batch_size, level))).to(self.dtype)
        batch = self.silence(level + 1 + self.answer_length(level))
        batch.input[:, :level, : self.bits] = self.shown(words)
        batch.input[:, :level, self.bits] = priorities
        batch.input[:, level, self.bits + 1] = 1
        order = priorities.argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.answer_length(level), None].expand(-1, -1, self.bits)
        batch.target[:, level + 1 :] = words.gather(1, order)
        batch.mask[:, level + 1 :] = True
        return batch

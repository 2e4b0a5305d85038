"""Dynamic n-grams (Graves et al. 2014, arXiv 1410.5401, section 4.4).

Shape letters: B batch, T steps, C contexts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.checks import check_at_most, check_size
from sparsemem.tasks.base import Batch
from sparsemem.tasks.bits import BitTask

LARGEST_N = 16  # a table has 2^(n-1) entries a sequence


class NGramsTask(BitTask):
    """Predict the next bit of a sequence drawn from a random n-gram table.

    Each sequence has its own table: P(next bit = 1 | last n - 1 bits) is drawn from
    Beta(1/2, 1/2) for each of the C = 2^(n-1) contexts. `level` is the number of bits of
    the sequence (the paper: n = 6, 200 bits). The first n - 1 bits are fair and are not
    to be predicted. Input: one bit a step; T = level - 1 steps.
    """

    input_size = output_size = 1

    def __init__(self, *, n: int = 6, max_level: int = 200, **common: Any) -> None:
        self.n = check_at_most("n", check_size("n", n, 2), "the largest n", LARGEST_N)
        self.lowest_level = n
        super().__init__(max_level=max_level, **common)

    def generate(self, rng: np.random.Generator, level: int) -> Batch:
        """Input bits 0 .. level-2, targets 1 .. level-1."""
        bits = torch.from_numpy(self._draw(rng, level)).to(self.dtype)[..., None]
        batch = self.silence(level - 1)
        batch.input.copy_(self.shown(bits[:, :-1]))
        batch.target.copy_(bits[:, 1:])
        batch.mask[:, self.n - 2 :] = True
        return batch

    def _draw(self, rng: np.random.Generator, level: int) -> np.ndarray:
        """Bits [B, level] of sequences, each from a table of its own."""
        contexts = 2 ** (self.n - 1)
        tables = rng.beta(0.5, 0.5, (self.batch_size, contexts))
        thresholds = rng.random((self.batch_size, level))
        bits = np.zeros((self.batch_size, level), np.int64)
        context, rows = np.zeros(self.batch_size, np.int64), np.arange(self.batch_size)
        for step in range(level):
            chance = tables[rows, context] if step >= self.n - 1 else 0.5
            bits[:, step] = thresholds[:, step] < chance
            context = (2 * context + bits[:, step]) % contexts
        return bits

    def optimal_output(self, batch: Batch) -> Float[Tensor, "B T 1"]:
        """Logits of the Bayes-optimal predictor, the reference of the NTM paper.

        Equation 10: P(1 | N1, N0, c) = (N1 + 1/2) / (N1 + N0 + 1), where N1 and N0 count the
        ones and zeros seen after context c so far. Give it whole batches, not slices.
        `task.loss(task.optimal_output(batch), batch)` and `task.metric(...)` are its figures.
        """
        bits = (batch.input[..., 0] > 0).long()
        contexts = 2 ** (self.n - 1)
        counts = batch.input.new_full((len(bits), contexts, 2), 0.5)
        logits = torch.zeros_like(batch.target)
        context, rows = torch.zeros_like(bits[:, 0]), torch.arange(len(bits), device=bits.device)
        for step, bit in enumerate(bits.unbind(1)):
            if step >= self.n - 1:
                counts[rows, context, bit] += 1
            context = (2 * context + bit) % contexts
            if step >= self.n - 2:
                zeros, ones = counts[rows, context].unbind(1)
                logits[:, step, 0] = (ones / zeros).log()
        return logits

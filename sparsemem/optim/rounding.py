"""Rounding to bfloat16 so that small updates are not lost."""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor


def round_stochastically(
    values: Float32[Tensor, "*S"], generator: torch.Generator
) -> BFloat16[Tensor, "*S"]:
    """One of the two bfloat16 neighbours of each value, at random: right on average.

    The further a value is on the way to the upper neighbour, the more likely it becomes that one.
    So an update of 1/100 of the distance moves a row once in 100 times; rounded to nearest, it
    never would. (Gupta et al. 2015, arXiv 1502.02551, section 3.)
    """
    # bfloat16 is the upper half of a float32: noise in the lower half carries into the upper one.
    noise = torch.randint(
        1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).bfloat16()

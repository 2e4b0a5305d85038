"""The one definition of "best first": by score, descending, then by position, ascending.

Scores are compared on a grid that is coarser than rounding noise, so that rows which
are multiples of one another tie (unless noise straddles the edge of a grid cell, which is
rare), whatever kernel computed their scores.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Bits of a score that count, and the positions that fit beside them in a double's 52 bits.
GRID_BITS = {torch.float64: 28, torch.float32: 14, torch.bfloat16: 7, torch.float16: 10}
POSITION_BITS = 22


def on_grid(scores: Float[Tensor, "*Q M"]) -> Float[Tensor, "*Q M"]:
    """Scores rounded to the grid of their dtype, in units of the grid (an integral value)."""
    return scores.mul(2.0 ** GRID_BITS[scores.dtype]).round_()


def top_k(scores: Float[Tensor, "*Q M"], k: int) -> Int[Tensor, "*Q K"]:
    """Positions of the k best of M scores in [-1, 1], best first, ties by lower position.

    One unique key a position: the score on its grid is the integral part, the position a
    small penalty behind the point. Raises ValueError when the two would not fit.
    """
    count = scores.shape[-1]
    if count > 2**POSITION_BITS:
        raise ValueError(
            f"scores has {count} positions, expected at most {2**POSITION_BITS} in one scan"
        )
    penalty = torch.arange(count, device=scores.device, dtype=torch.float64)
    key = on_grid(scores).double().sub_(penalty.mul_(2.0**-POSITION_BITS))
    return key.topk(k).indices

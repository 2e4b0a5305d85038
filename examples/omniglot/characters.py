"""The Omniglot characters (Lake et al. 2015) and how training distorts them.

Letters: C classes, D = 20 drawers of each, n images. Images are 28 x 28, ink 1, paper 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPARSEMEM_DATA", ROOT.parent / "shared" / "data"))
FILE = Path("omniglot") / "omniglot-28.npz"
HELD_OUT = 5  # background alphabets that training does not see, to choose by
ROTATION, SCALE, SHEAR, SHIFT = 0.15, 0.1, 0.15, 0.08  # standard deviations of distortions


class Characters(NamedTuple):
    """Images [C, D, 28, 28] of bytes, 255 is ink, and the alphabet of each class."""

    images: Tensor
    alphabets: list[str]

    def take(self, chosen: list[int]) -> Characters:
        """Some of the classes."""
        return Characters(self.images[chosen], [self.alphabets[number] for number in chosen])


class Parts(NamedTuple):
    """Characters of different alphabets each."""

    training: Characters  # 25 of the 30 background alphabets
    validation: Characters  # the other 5
    evaluation: Characters  # the 20 evaluation alphabets


def load(data: Path = DATA) -> Parts:
    """The three parts of omniglot/omniglot-28.npz. FileNotFoundError if it is not there."""
    with np.load(data / FILE) as file:
        images, split, alphabets = (file[name] for name in ("images", "split", "alphabet"))
    everything = Characters(torch.from_numpy(images), alphabets.tolist())
    background = (split == "background").nonzero()[0].tolist()
    known = list(dict.fromkeys(everything.alphabets[number] for number in background))
    held_out = known[-HELD_OUT:]
    return Parts(
        everything.take([i for i in background if everything.alphabets[i] not in held_out]),
        everything.take([i for i in background if everything.alphabets[i] in held_out]),
        everything.take((split == "evaluation").nonzero()[0].tolist()),
    )


def turned(images: Tensor) -> Tensor:
    """[C, D, 28, 28] -> [4 C, D, 28, 28]: a character turned by a right angle is another class."""
    return torch.cat([images.rot90(turns, (-2, -1)) for turns in range(4)])


def inked(images: Tensor) -> Tensor:
    """Bytes [*n, 28, 28] as an encoder takes them: [n, 1, 28, 28], from 0 to 1."""
    return images.reshape(-1, 1, *images.shape[-2:]).float() / 255


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each of [n, 1, 28, 28] a little, at random."""
    draws = torch.randn(len(images), 6, generator=generator).to(images.device)
    angle, shear = ROTATION * draws[:, 0], SHEAR * draws[:, 1]
    across, down = (SCALE * draws[:, 2:4]).exp().unbind(1)
    cos, sin = angle.cos(), angle.sin()
    # Rotation times [[across, shear], [0, down]], and the shift as a last column.
    top = torch.stack([cos * across, cos * shear - sin * down, SHIFT * draws[:, 4]], 1)
    bottom = torch.stack([sin * across, sin * shear + cos * down, SHIFT * draws[:, 5]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

"""The picture of the example: what is recalled, and how a stream of new characters goes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from recognition import Stream, by_sight, correct, fresh_memory
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator

RANDOM, WRONG, NEIGHBOURS = 6, 4, 5
RIGHT_COLOUR, WRONG_COLOUR, PLAIN = "tab:green", "tab:red", "0.6"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}


def draw(path: Path, images: Tensor, embedded: Tensor, seen: Stream, threshold: float) -> None:
    """Images [C, D, 28, 28] and their embeddings [C, D, W] of characters never trained on."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 6.2), dpi=150, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
        neighbours(left, images, embedded)
        above, below = right.subplots(2, 1, height_ratios=[1.6, 1])
        accuracy(above, seen, threshold)
        rows(below, seen)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def neighbours(figure: SubFigure, images: Tensor, embedded: Tensor) -> None:
    """Queries by the second drawer, and the nearest of all classes as the first drew them."""
    memory = fresh_memory(len(embedded), embedded.shape[2], min(NEIGHBOURS, len(embedded)))
    labels = torch.arange(len(embedded))
    memory.remember(embedded[:, 0], labels, memory(embedded[:, 0]))
    recall = memory(embedded[:, 1])
    wrong = (recall.predict() != labels).nonzero().squeeze(1)
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shown = [*mixed[:RANDOM].tolist(), *wrong[:: max(1, len(wrong) // WRONG)][:WRONG].tolist()]
    axis = figure.subplots()
    for row, query in enumerate(shown):
        character(axis, 0, row, images[query, 1], PLAIN)
        for place, label in enumerate(recall.labels[query].tolist()):
            colour = RIGHT_COLOUR if label == query else WRONG_COLOUR
            cosine = f"{recall.scores[query, place]:.2f}"
            character(axis, 1.3 + place, row, images[label, 0], colour, cosine)
    axis.set(xlim=(-0.1, 1.3 + recall.labels.shape[1]), ylim=(len(shown), -0.1), aspect="equal")
    axis.axis("off")
    share = 100 * (1 - len(wrong) / len(labels))
    axis.set_title(
        f"One example each of {len(labels)} new characters: {share:.1f} % of\nqueries find theirs."
        f" Query, nearest rows, their cosines;\n{min(RANDOM, len(labels))} random queries, then"
        f" {len(shown) - min(RANDOM, len(labels))} of those that went wrong"
    )


def character(
    axis: Axes, left: float, top: float, image: Tensor, colour: str, caption: str = ""
) -> None:
    """An image in a frame, in a place of 1 x 1, and what is written under it."""
    size = 0.78
    extent = (left, left + size, top + size, top)
    axis.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255, extent=extent)
    axis.add_patch(Rectangle((left, top), size, size, fill=False, color=colour, linewidth=1.8))
    axis.text(left + size / 2, top + size + 0.02, caption, fontsize=6, ha="center", va="top")


def accuracy(axis: Axes, seen: Stream, threshold: float) -> None:
    """How often the answer is right, by how often the class was seen."""
    sights = range(1, int(seen.sight.max()) + 1)
    named = by_sight(correct(seen), seen)
    may = by_sight(correct(seen, threshold), seen)
    axis.plot(sights[1:], named[1:], "o-", markersize=4, label="nearest row's name")
    axis.plot(
        sights, may, "s--", markersize=4, label=f'"unknown" if its cosine is under {threshold:.2f}'
    )
    axis.set(xlabel="sight of a character", ylabel="right answers, %")
    axis.set_title(
        f"A stream of {len(seen.labels):,} images of {len(seen.labels.unique())} new characters:"
        "\npredict, then store"
    )
    axis.xaxis.set_major_locator(MultipleLocator(2, offset=0))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def rows(axis: Axes, seen: Stream) -> None:
    """How many rows the bank comes to hold, and how many classes it has seen."""
    axis.plot(seen.rows.numpy(), label="rows in the bank")
    axis.plot((seen.sight == 1).cumsum(0).numpy(), "--", label="characters seen")
    axis.set(xlabel="images seen", xlim=(0, len(seen.labels)), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")

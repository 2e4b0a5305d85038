"""An encoder trained with a bank in the loop, and what it recognises without further training.

Letters: C classes, D = 20 drawers of each, W width of an embedding, n images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from characters import distort, inked, turned
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

from sparsemem.bank import MemoryBank
from sparsemem.bank.contract import Bank
from sparsemem.layers import LifelongMemory, neighbour_loss

ROWS = 8192  # of the bank in training
TOP_K = 256  # neighbours that the loss looks at
TEMPERATURE = 0.07  # of the softmax over them
RATE, DECAY = 2e-3, 1e-4  # of learning (cosine schedule), of weights
WARM_UP = 50  # steps
CHANNELS = (24, 48, 96)
WIDTH = 128
QUERIES = 5  # a class and episode
WINDOW = 0.02  # share of the newest step in the running averages
MakeBank = Callable[[int, int], Bank]  # of so many rows, so wide


class Residual(nn.Module):
    """x -> relu(x + f(x)), f two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            *convolution(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, input: Tensor) -> Tensor:
        """The same shape."""
        return torch.relu(input + self.change(input))


class Encoder(nn.Sequential):
    """Images [n, 1, 28, 28] -> embeddings [n, W]; 28, 14, 7 and 3 pixels wide on the way."""

    def __init__(self, channels: tuple[int, int, int] = CHANNELS, width: int = WIDTH) -> None:
        first, second, third = channels
        super().__init__(
            *convolution(1, first),
            nn.MaxPool2d(2),
            *convolution(first, second),
            nn.MaxPool2d(2),
            *convolution(second, third),
            Residual(third),
            nn.MaxPool2d(2),
            Residual(third),
            nn.Flatten(),
            nn.Linear(3 * 3 * third, width),
        )
        self.width = width
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def convolution(before: int, after: int) -> list[nn.Module]:
    """3 x 3, batch norm, relu."""
    convolve = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return [convolve, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def train(
    encoder: Encoder,
    images: Tensor,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    make_bank: MakeBank = MemoryBank,
) -> list[dict[str, float]]:
    """Train on images [C, D, 28, 28]; returns the curve.

    Each step the bank is asked for the neighbours of new images, the loss pulls them to those of
    their class and from the others, and then the bank stores them.
    """
    images, generator = turned(images), torch.Generator().manual_seed(seed)
    memory = LifelongMemory(make_bank(ROWS, encoder.width), TOP_K)
    optimiser = torch.optim.AdamW(encoder.parameters(), RATE, weight_decay=DECAY)
    schedule = LambdaLR(
        optimiser,
        lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    encoder.train()
    curve, average = [], {"loss": 0.0, "accuracy": 0.0}
    for step in (bar := trange(1, steps + 1, desc="training", mininterval=1)):
        labels = torch.randperm(len(images), generator=generator)[:batch_size]
        drawers = torch.randint(images.shape[1], (len(labels),), generator=generator)
        queries = encoder(distort(inked(images[labels, drawers]), generator))
        recall = memory(queries)
        loss = neighbour_loss(recall, labels, TEMPERATURE)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        memory.remember(queries.detach(), labels, recall)
        right = recall.predict().eq(labels).float().mean().item()
        for name, value in (("loss", loss.item()), ("accuracy", right)):
            average[name] += max(WINDOW, 1 / step) * (value - average[name])
        if step % 100 == 0 or step == steps:
            curve.append({"step": step, **average})
            bar.set_postfix(average)
    return curve


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor) -> Tensor:
    """Images [C, D, 28, 28] -> [C, D, W]."""
    encoder.eval()
    parts = [encoder(inked(part)) for part in images.flatten(0, 1).split(500)]
    return torch.cat(parts).view(*images.shape[:2], -1)


def fresh_memory(
    num_rows: int, width: int, top_k: int = 1, make_bank: MakeBank = MemoryBank
) -> LifelongMemory:
    """A memory for an encoder that does not change any more: a row averages all its examples."""
    return LifelongMemory(make_bank(num_rows, width), top_k, inertia=math.inf)


def episode(embedded: Tensor, way: int, shot: int, generator: torch.Generator) -> float:
    """Store `shot` examples of `way` classes of [C, D, W]; the share of others recognised."""
    classes = torch.randperm(len(embedded), generator=generator)[:way]
    drawers = torch.rand(way, embedded.shape[1], generator=generator).argsort(1)
    support, queries = embedded[classes.unsqueeze(1), drawers[:, : shot + QUERIES]].split(
        [shot, QUERIES], 1
    )
    labels = torch.arange(way)
    memory = fresh_memory(way * shot, embedded.shape[2])
    for examples in support.unbind(1):
        memory.remember(examples, labels)
    predicted = memory(queries.flatten(0, 1)).predict()
    return predicted.eq(labels.repeat_interleave(QUERIES)).float().mean().item()


def few_shot(
    embedded: Tensor, way: int, shot: int, *, episodes: int, seed: int
) -> dict[str, float]:
    """Mean accuracy over episodes, and half of its 95 % interval, in percent."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.tensor([episode(embedded, way, shot, generator) for _ in range(episodes)])
    half = 1.96 * scores.std().item() / math.sqrt(episodes)
    return {"accuracy": 100 * scores.mean().item(), "interval": 100 * half, "episodes": episodes}


class Stream(NamedTuple):
    """What was said of each image of a stream before it was stored, all [n]."""

    labels: Tensor
    sight: Tensor  # how often the class was seen, this time included
    predicted: Tensor  # the nearest row's class
    scores: Tensor  # its cosine; minus infinity for the first of all
    rows: Tensor  # that the bank holds then


def stream(embedded: Tensor, seed: int, make_bank: MakeBank = MemoryBank) -> Stream:
    """Show all images of [C, D, W] once, in random order, to one memory: predict, then store."""
    classes, drawers, width = embedded.shape
    order = torch.randperm(classes * drawers, generator=torch.Generator().manual_seed(seed))
    labels = order // drawers
    memory = fresh_memory(len(order), width, make_bank=make_bank)
    predicted, scores, rows = [], [], []
    for query, label in zip(embedded.flatten(0, 1)[order].split(1), labels.split(1), strict=True):
        recall = memory(query)
        memory.remember(query, label, recall)
        predicted.append(recall.labels[0, 0])
        scores.append(recall.scores[0, 0])
        rows.append(memory.bank.stats()["num_live"])
    sight = torch.empty_like(labels)
    sight[labels.argsort(stable=True)] = torch.arange(1, drawers + 1).repeat(classes)
    return Stream(labels, sight, torch.stack(predicted), torch.stack(scores), torch.tensor(rows))


def correct(seen: Stream, threshold: float = -math.inf) -> Tensor:
    """Which answers of a stream are right [n], if a cosine under the threshold means "unknown".

    "Unknown" is right at the first sight of a class, and its name at all others.
    """
    known = seen.scores >= threshold
    return torch.where(seen.sight == 1, ~known, known & (seen.predicted == seen.labels))


def best_threshold(seen: Stream) -> float:
    """The threshold at which first sights and later ones come out best, both counting half."""
    order = seen.scores.argsort()
    first = seen.sight[order] == 1
    named = (seen.predicted == seen.labels)[order] & ~first
    # With the threshold at score number i those before it are unknown.
    unknown = (first.cumsum(0) - first.long()) / first.sum()
    known = (named.sum() - named.cumsum(0) + named.long()) / (~first).sum()
    return seen.scores[order][(unknown + known).argmax()].item()


def by_sight(right: Tensor, seen: Stream) -> list[float]:
    """Accuracy, in percent, at the first, second, ... sight of a class."""
    return [
        100 * right[seen.sight == number].float().mean().item()
        for number in range(1, int(seen.sight.max()) + 1)
    ]

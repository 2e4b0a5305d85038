"""What the programs of this folder share: texts, a small transformer, its arithmetic, training.

Letters: B batch, T characters of context, D the network's width, A characters of the alphabet.
"""

from __future__ import annotations

import math
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from sparsemem import MemoryLayer
from sparsemem.bank import MemoryBank
from sparsemem.bank.contract import Bank
from sparsemem.optim import RowAdamW, clip_grad_norm

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPARSEMEM_DATA", ROOT.parent / "shared" / "data"))
RUNS = Path("runs/charlm")
VARIANTS = ("dense", "memory")
MakeBank = Callable[..., Bank]
Point = dict[str, float]  # step, seconds, and losses in nats a character by name
WARM_UP, END = 50, 0.1  # steps; share of the learning rate that is left at the end
NORM = 1.0  # that gradients are clipped to


@dataclass(frozen=True)
class Size:
    """Of the transformer, and of the memory in the place of some of its feed-forward blocks."""

    dim: int = 128
    blocks: int = 3
    heads: int = 4
    context: int = 128
    hidden: int = 512  # of the feed-forward blocks that both variants have
    memory_blocks: tuple[int, ...] = (1,)  # which blocks' feed-forward the memory replaces
    num_rows: int = 2**20
    key_width: int = 32
    value_width: int = 128
    queries: int = 2  # heads of the memory
    top_k: int = 16


@dataclass(frozen=True)
class Text:
    """Characters as numbers: the first nine tenths to train on, the last to validate."""

    train: Tensor
    valid: Tensor

    def batches(self, count: int, size: int, context: int, seed: int) -> Iterator[Tensor]:
        """`count` batches [size, context + 1] of random stretches."""
        generator = torch.Generator().manual_seed(seed)
        stretch = torch.arange(context + 1)
        for _ in range(count):
            starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
            yield self.train[starts + stretch]

    def windows(self, size: int, context: int) -> Iterator[Tensor]:
        """The validation text, each character predicted once, in batches [size, context + 1]."""
        yield from self.valid.unfold(0, context + 1, context).split(size)


def shakespeare(data: Path) -> str:
    """Tiny Shakespeare: 1.1 million characters, 65 different ones."""
    return (data / "text" / "tinyshakespeare.txt").read_text()


def wikitext(data: Path) -> str:
    """1.1 million characters of Wikipedia: the validation part of WikiText-2."""
    with tarfile.open(data / "text" / "wikitext-2_valid_test.tar.xz") as archive:
        file = archive.extractfile("wikitext-2/valid.txt")
        assert file is not None
        return file.read().decode()


def encode(text: str, alphabet: str) -> Text:
    """A text in an alphabet; characters that are not in it are left out."""
    numbers = {character: number for number, character in enumerate(alphabet)}
    whole = torch.tensor([numbers[character] for character in text if character in numbers])
    return Text(*whole.split([split := len(whole) * 9 // 10, len(whole) - split]))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.context = size.heads, size.context
        self.project = nn.Linear(size.dim, 3 * size.dim)
        self.out = nn.Linear(size.dim, size.dim)

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        parts = self.project(input).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, size: Size, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(size), feed_forward
        self.norms = nn.ModuleList(nn.LayerNorm(size.dim) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        input = input + self.attention(self.norms[0](input))
        return input + self.feed_forward(self.norms[1](input))


class CharLM(nn.Module):
    """A transformer that predicts the next character."""

    def __init__(self, alphabet: int, size: Size, feed_forwards: Iterable[nn.Module]) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, size.dim)
        self.places = nn.Embedding(size.context, size.dim)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(size, layer) for layer in feed_forwards))
        self.norm = nn.LayerNorm(size.dim)
        self.out = nn.Linear(size.dim, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        """[B, T] -> logits [B, T, A]."""
        embedded = self.characters(text) + self.places.weight[: text.shape[1]]
        return self.out(self.norm(self.blocks(embedded)))

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross-entropy of the characters [B, T + 1] after the first, in nats."""
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


@contextmanager
def bank_maker(shards: int, folder: Path) -> Iterator[MakeBank]:
    """What makes the bank: in this process, or over Ray processes, which end with the block.

    folder: where the shards' folder is meanwhile.
    """
    if not shards:
        yield MemoryBank
        return
    from sparsemem.distributed.bank import ShardedBank
    from sparsemem.distributed.cluster import Group, Resources
    from sparsemem.distributed.connecting import connected
    from sparsemem.distributed.product_keys import ShardedProductKeys
    from sparsemem.distributed.rayshards import RayShards

    with TemporaryDirectory(dir=folder) as place, ExitStack() as banks:
        group = Group("shard", shards, Resources(cpus=1.0, gpus=0.0, memory=0.0))
        banks.enter_context(connected(None, [group]))

        def make(*sizes: int, **options: Any) -> ShardedProductKeys:
            new = Path(place).absolute() / "bank"
            path = ShardedBank.create(new, *sizes, num_shards=shards, **options)
            bank = ShardedProductKeys(path, RayShards.start(path))
            banks.callback(bank.close)
            return bank

        yield make


def bank_of(model: CharLM) -> Any:
    """The bank that all memories of a model share, a `MemoryBank` or a `ShardedProductKeys`."""
    return next(layer.bank for layer in model.modules() if isinstance(layer, MemoryLayer))


def bring_here(model: CharLM) -> None:
    """Bring the rows of a sharded bank into this process, for the model to be saved with them."""
    from sparsemem.distributed.versions import read_version

    bank = bank_of(model)
    bank.save()
    here = read_version(bank.path)
    for layer in model.modules():
        if isinstance(layer, MemoryLayer):
            layer.bank = here


def build(
    variant: str, alphabet: int, size: Size, seed: int = 0, make_bank: MakeBank = MemoryBank
) -> CharLM:
    """The transformer with memories, or with dense blocks of as many multiply-adds in their place.

    All memories are one bank.
    """
    torch.manual_seed(seed)
    # Values start at zero: a slot says nothing before it is trained.
    bank = make_bank(
        size.num_rows, size.key_width, size.value_width, index="product-key", metric="ip"
    )
    memory = partial(MemoryLayer, size.dim, bank, size.queries, size.top_k)
    if variant == "dense":
        hidden = round(multiply_adds(memory()) / (2 * size.dim))
        memory = partial(dense, size.dim, hidden)
    feed_forwards = (
        memory() if number in size.memory_blocks else dense(size.dim, size.hidden)
        for number in range(size.blocks)
    )
    return CharLM(alphabet, size, feed_forwards)


def dense(dim: int, hidden: int) -> nn.Module:
    """The usual feed-forward block."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def multiply_adds(module: nn.Module) -> int:
    """Multiply-adds of matrix products a character, forward (backward: twice as many).

    Both variants are counted by this function. Norms, activations, softmaxes, biases and what only
    compares (top-k) or moves numbers are not counted, in either.
    """
    own = 0
    if isinstance(module, nn.Linear):
        own = module.weight.numel()
    elif isinstance(module, Attention):
        own = 2 * module.context * module.out.in_features  # scores and sums over the context
    elif isinstance(module, MemoryLayer):
        own = sum(memory_parts(module).values())
    return own + sum(multiply_adds(child) for child in module.children())


def memory_parts(layer: MemoryLayer) -> dict[str, int]:
    """Multiply-adds of a product-key memory beside those of its linear layers."""
    bank, top_k = layer.bank, layer.top_k
    assert bank.value_width is not None
    a_head = {
        "scores of 2 sqrt(N) sub-keys": 2 * math.isqrt(bank.num_rows) * (bank.width // 2),
        "sums of K^2 candidates": top_k**2,
        "scores again, from the rows": 3 * (top_k + 8) * bank.width,  # halves, pairs, rows read
        "weighted sum of K values": top_k * bank.value_width,
    }
    gate = {"product with the gate": bank.value_width}
    return {part: layer.num_heads * count for part, count in a_head.items()} | gate


def optimiser_of(model: CharLM, learning_rate: float, row_learning_rate: float) -> RowAdamW:
    """Lazy AdamW: of the memory's values it steps the rows that were read, the rest as AdamW."""
    values, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (values if name.endswith("bank.values") else rest).append(parameter)
    groups = [
        {"params": rest, "lr": learning_rate, "betas": (0.9, 0.99), "weight_decay": 0.01},
        {"params": values, "lr": row_learning_rate, "weight_decay": 0.0},
    ]
    return RowAdamW([group for group in groups if group["params"]])


def share_at(step: int, steps: int) -> float:
    """Of the learning rate: warm-up, then down along a cosine."""
    cosine = (1 + math.cos(math.pi * min(step / steps, 1))) / 2
    return min((step + 1) / WARM_UP, 1) * (END + (1 - END) * cosine)


@torch.no_grad()
def validate(model: CharLM, text: Text, context: int, part: int = 1) -> float:
    """Mean loss over the validation text, or over every `part`-th batch of it."""
    model.eval()
    windows = list(text.windows(32, context))[::part]
    losses = [float(model.loss(window)) * len(window) for window in windows]
    model.train()
    return sum(losses) / sum(map(len, windows))


def fit(
    model: CharLM,
    batches: Iterable[Tensor],
    steps: int,
    optimiser: RowAdamW,
    evaluate: Callable[[], Point],
    every: int,
    after_forward: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Train; the points hold what `evaluate` says, and the training loss since the point before."""
    schedule = LambdaLR(optimiser, lambda step: share_at(step, steps))
    points, losses, seconds = [{"step": 0, "seconds": 0.0, **evaluate()}], [], 0.0
    for step, batch in enumerate(tqdm(batches, total=steps), 1):
        start = time.perf_counter()
        loss = model.loss(batch)
        after_forward()
        loss.backward()
        clip_grad_norm(model.parameters(), NORM)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - start
        losses.append(float(loss.detach()))
        if step % every == 0 or step == steps:
            mean = sum(losses) / len(losses)
            points.append({"step": step, "seconds": seconds, "train": mean, **evaluate()})
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in points[-1].items()))
            losses = []
    return points

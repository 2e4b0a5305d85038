"""A training step of a product-key memory: python benchmarks/product_key.py (7 minutes).

A `MemoryLayer` over a bank with index "product-key", at 2^20 and 2^26 slots, against

- `PKM` of the package product-key-memory (pip install product-key-memory; left out where it is
  not installed), stepped by Adam as its README has it: its gradients are dense;
- a product-key lookup in plain torch that feeds `nn.EmbeddingBag(sparse=True)`, stepped by
  SparseAdam: row-sparse gradients, two dense tables of state.

All have the same shape: a linear query network, a layer norm, heads, the best of their halves'
best sub-keys, a softmax, and the sum of the values. Each is in a process of its own, so that its
peak of memory is its own, on fresh random inputs at every step. Where a size's cases fit into
memory side by side they take turns, else they run one after another; what does not fit even so is
not run, and the result says what it would need. Writes product_key.json.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from common import Timings, machine
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam

from sparsemem import MemoryBank
from sparsemem.layers import MemoryLayer
from sparsemem.optim import RowAdam

TOKENS, HEADS, TOP_K, HALF = 512, 4, 32, 32  # queries have two halves of this width
RATE, VALUE_RATE = 1e-3, 1e-2
WARM_UP, REPETITIONS = 3, 11
RESULT = Path(__file__).with_suffix(".json")
SPARE = 0.9  # share of the memory available that the cases may need
OURS = "sparsemem"
PHASES = ("forward", "backward", "optimiser")


class Size(NamedTuple):
    """How many slots (the square of `subkeys`), and how wide values, inputs and outputs are."""

    subkeys: int
    width: int

    @property
    def slots(self) -> int:
        """N."""
        return self.subkeys**2

    @property
    def table(self) -> int:
        """Bytes of all values."""
        return 4 * self.slots * self.width


SIZES = {"2^20": Size(2**10, 64), "2^26": Size(2**13, 8)}
Made = tuple[nn.Module, list[Optimizer]]


def make_ours(size: Size) -> Made:
    """A MemoryLayer whose rows are all live."""
    bank = MemoryBank(
        size.slots, 2 * HALF, size.width, index="product-key", metric="ip", initial="normal"
    )
    layer = MemoryLayer(size.width, bank, HEADS, TOP_K, gated=False)
    assert bank.values is not None
    rest = [parameter for parameter in layer.parameters() if parameter is not bank.values]
    groups = [{"params": rest}, {"params": [bank.values], "lr": VALUE_RATE}]
    return layer, [RowAdam(groups, lr=RATE)]


def make_pkm(size: Size) -> Made:
    """The package's layer with the optimiser of its README."""
    from product_key_memory import PKM, fetch_optimizer_parameters

    layer = PKM(size.width, heads=HEADS, num_keys=size.subkeys, topk=TOP_K, dim_head=HALF)
    return layer, [Adam(fetch_optimizer_parameters(layer, VALUE_RATE), lr=RATE)]


class EmbeddingBagLayer(nn.Module):
    """What one writes without a library: sub-keys that all heads share, and an embedding bag."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.query = nn.Linear(size.width, HEADS * 2 * HALF)
        self.norm = nn.LayerNorm(2 * HALF)
        self.subkeys = nn.Parameter(torch.randn(2, size.subkeys, HALF) / (2 * HALF) ** 0.5)
        self.values = nn.EmbeddingBag(size.slots, size.width, mode="sum", sparse=True)
        nn.init.normal_(self.values.weight, std=size.width**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        queries = self.norm(self.query(input).view(-1, HEADS, 2 * HALF))
        halves = zip(queries.chunk(2, -1), self.subkeys, strict=True)
        first, second = ((part @ keys.mT).topk(TOP_K) for part, keys in halves)
        sums = first.values.unsqueeze(-1) + second.values.unsqueeze(-2)
        scores, places = sums.flatten(-2).topk(TOP_K)
        pairs = first.indices.unsqueeze(-1) * self.subkeys.shape[1] + second.indices.unsqueeze(-2)
        ids = pairs.flatten(-2).gather(-1, places)
        weights = F.softmax(scores, -1)
        return self.values(ids.flatten(1), per_sample_weights=weights.flatten(1)).unsqueeze(0)


def make_embedding_bag(size: Size) -> Made:
    """The layer above, its table stepped by SparseAdam."""
    layer = EmbeddingBagLayer(size)
    table = layer.values.weight
    rest = [parameter for parameter in layer.parameters() if parameter is not table]
    return layer, [Adam(rest, lr=RATE), SparseAdam([table], lr=VALUE_RATE)]


class Case(NamedTuple):
    """A layer and its optimisers, and what they need."""

    make: Callable[[Size], Made]
    needs: Callable[[Size], int]  # bytes of what grows with the slots, once all were touched
    module: str = "torch"  # that has to be installed


CASES = {
    # Values and two moments; a count of steps and a book of 47 bytes a row.
    OURS: Case(make_ours, lambda size: 3 * size.table + 51 * size.slots),
    # Values, gradient, two moments and two temporaries of Adam's.
    "product-key-memory": Case(make_pkm, lambda size: 6 * size.table, "product_key_memory"),
    "EmbeddingBag + SparseAdam": Case(make_embedding_bag, lambda size: 3 * size.table),
}
ALL_SIZES, ALL_CASES = list(SIZES), list(CASES)


def training_step(made: Made, input: Tensor) -> list[float]:
    """Seconds of forward, backward and the optimisers' step."""
    model, optimisers = made
    for optimiser in optimisers:
        optimiser.zero_grad()
    times = [time.perf_counter()]
    loss = model(input).square().mean()
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    for optimiser in optimisers:
        optimiser.step()
    times.append(time.perf_counter())
    return [end - start for start, end in pairwise(times)]


def worker(case: str, size: Size, pipe: Connection) -> None:
    """Make the case; a step for each True received; then send figures of memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    imported = status("VmRSS")
    made = CASES[case].make(size)
    pipe.send(status("VmHWM"))
    while pipe.recv():
        pipe.send(training_step(made, torch.randn(1, TOKENS, size.width)))
    pipe.send({"imports": imported, "peak": status("VmHWM")})


def status(name: str) -> int:
    """Bytes of this process: VmRSS, what it has in memory now; VmHWM, the most so far."""
    return _kib("/proc/self/status", name)


def _kib(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def started(case: str, size: Size) -> Iterator[Connection]:
    """A worker's end of the pipe; the worker is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker, args=(case, size, there))
    process.start()
    there.close()  # so that a worker's death is an end of file here
    try:
        yield here
    finally:
        here.close()
        process.join(30)
        process.kill()


def answers(pipes: dict[str, Connection], message: bool | None = None) -> dict[str, Any]:
    """What each worker answers, one after another. Those that died are taken out of `pipes`."""
    result = {}
    for name, pipe in list(pipes.items()):
        try:
            if message is not None:
                pipe.send(message)
            result[name] = pipe.recv()
        except (EOFError, ConnectionError):
            del pipes[name]
    return result


def measure(names: list[str], size: Size, repetitions: int) -> tuple[dict[str, Any], Timings]:
    """Figures of cases that take turns, and the times of their steps."""
    parts: dict[str, list[list[float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(started(name, size)) for name in names}
        made = answers(pipes)
        for number in range(WARM_UP + repetitions):
            for name, answer in answers(pipes, True).items():
                if number >= WARM_UP:
                    parts[name].append(answer)
        memory = answers(pipes, False)
    times = Timings({name: [sum(step) for step in parts[name]] for name in memory})
    result: dict[str, Any] = {name: {"not_measured": "its process died"} for name in names}
    for name, figures in memory.items():
        phases = zip(PHASES, zip(*parts[name], strict=True), strict=True)
        result[name] = {
            "step_ms": times.median(name) * 1e3,
            **{f"{phase}_ms": statistics.median(values) * 1e3 for phase, values in phases},
            "peak_gib": figures["peak"] / 2**30,
            "peak_above_imports_gib": (figures["peak"] - figures["imports"]) / 2**30,
            "once_made_gib": made[name] / 2**30,
        }
    return result, times


def measure_size(size: Size, repetitions: int, names: list[str]) -> dict[str, Any]:
    """Figures of the cases at one size, and of the others by ours."""
    result: dict[str, Any] = {"slots": size.slots, "value_width": size.width}
    missing = [name for name in names if importlib.util.find_spec(CASES[name].module) is None]
    result |= {name: {"not_measured": "not installed"} for name in missing}
    there = [name for name in names if name not in missing]
    limit = SPARE * _kib("/proc/meminfo", "MemAvailable")
    together = sum(CASES[name].needs(size) for name in there) <= limit
    times = Timings()
    for group in [there] if together else [[name] for name in there]:
        limit = SPARE * _kib("/proc/meminfo", "MemAvailable")
        needed = sum(CASES[name].needs(size) for name in group)
        if needed > limit:
            reason = f"needs {needed / 2**30:.1f} GiB, machine has {limit / 2**30:.1f} to spare"
            result |= {name: {"not_measured": reason} for name in group}
            continue
        figures, some = measure(group, size, repetitions)
        result |= figures
        times |= some
    result["took_turns"] = together
    for name in [name for name in times if name != OURS and OURS in times]:
        result[name]["step_to_ours"] = times.ratio(name, OURS)
        peaks = (result[each]["peak_above_imports_gib"] for each in (name, OURS))
        result[name]["memory_to_ours"] = next(peaks) / next(peaks)
    return result


def main(
    size: Annotated[list[str], typer.Option(help="Only this one.")] = ALL_SIZES,
    case: Annotated[list[str], typer.Option(help="Only this one.")] = ALL_CASES,
    repetitions: Annotated[int, typer.Option(min=1)] = REPETITIONS,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULT,
) -> None:
    """Measure and write the JSON."""
    for name, known in [*((name, SIZES) for name in size), *((name, CASES) for name in case)]:
        if name not in known:
            raise typer.BadParameter(f"{name!r}, expected one of {', '.join(known)}")
    result: dict[str, Any] = {
        "machine": machine(),
        "setting": f"{TOKENS} tokens, {HEADS} heads, top {TOP_K}, queries of 2 x {HALF}, float32,"
        f" medians of {repetitions} training steps after {WARM_UP}",
    }
    for name in size:
        result[name] = measure_size(SIZES[name], repetitions, case)
    text = json.dumps(result, indent=2)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)

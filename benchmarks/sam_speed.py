"""How fast SAM is: python benchmarks/sam_speed.py (25 minutes, 12 GiB; --part NAME for one part).

Forward and backward a step, one thread, batch 8, 4 heads, K = 4, width 32, LSTM 100, T = 100:

- controller: SAM with 2^20 slots against the same controller without a memory, time and memory;
- sizes: slopes of log time and log memory over the log of the number of slots, 2^10 to 2^30;
- dense: SAM against this project's NTM at 2^20 slots, that against what memory bandwidth allows,
  and against an NTM written plainly;
- links: SDNC against DNC at 2,048 slots;
- long: one sequence of 100,000 steps with truncated BPTT.

Writes sam_speed.json, where a part replaces the figures that it had there before.
"""

from __future__ import annotations

import cProfile
import json
import math
import os
import pstats
import random
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from common import Timings, interleaved, machine, seconds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsemem import DNC, NTM, SAM, SDNC
from sparsemem.bench.fits import log_slope
from sparsemem.bench.measuring import tensor_peak
from sparsemem.kernels import can_find
from sparsemem.kernels.trees import tree_kernels
from sparsemem.memory.dense import DenseMemory
from sparsemem.models.base import MemoryModel
from sparsemem.models.ntm import NTMCell, NTMState

INPUTS, HIDDEN, HEADS, TOP_K, WIDTH = 8, 100, 4, 4, 32
STEPS, BATCH, SLOTS = 100, 8, 2**20
SIZES = [2**power for power in range(10, 31, 2)]
DENSE_STEPS, PLAIN_STEPS = 3, 2  # what fits; the first step, without a past, is the cheapest
ROW_PASSES = 24  # of a step of the NTM, forward and backward: counted in memory/products.py
LINKED_SLOTS, LINKED_STEPS = 2_048, 10
LONG, TRUNCATE, WINDOW, OTHERS = 100_000, 100, 1_000, 8
# Large tensors reuse memory of the process instead of asking the kernel for zeroed pages each
# time, which takes longer than a dense step's work. Read when a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**37),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}


class WithoutMemory(nn.Module):
    """The controller of SAM with its interface and output layers; reads are interface values."""

    def __init__(self) -> None:
        super().__init__()
        read = HEADS * WIDTH
        self.controller = nn.LSTMCell(INPUTS + read, HIDDEN)
        self.interface = nn.Linear(HIDDEN, HEADS * (2 * WIDTH + 3))
        self.output = nn.Linear(HIDDEN + read, INPUTS)

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        """Output [B, T, Y]."""
        state, reads, features = None, input.new_zeros(len(input), HEADS * WIDTH), []
        for step in input.unbind(1):
            state = self.controller(torch.cat([step, reads], 1), state)
            reads = self.interface(state[0])[:, : HEADS * WIDTH]
            features.append(torch.cat([state[0], reads], 1))
        return self.output(torch.stack(features, 1)), None


class PlainMemory(DenseMemory):
    """A dense memory as public NTMs write it: everything is expanded to [B, H, N, W]."""

    def similarity(self, keys: Tensor, masks: Tensor | None = None) -> Tensor:
        """Cosine of every key with every row."""
        return F.cosine_similarity(self.rows.unsqueeze(1), keys.unsqueeze(2), dim=-1)

    def read(self, weights: Tensor) -> Tensor:
        """sum_i w_h(i) M(i)."""
        return (weights.unsqueeze(-1) * self.rows.unsqueeze(1)).sum(2)

    def write(
        self, weights: Tensor, erases: Tensor, words: Tensor, kept: Tensor | None = None
    ) -> PlainMemory:
        """Erase and add, one head after the other."""
        rows = self.rows
        for head in range(weights.shape[1]):
            weight = weights[:, head].unsqueeze(-1)
            rows = rows * (1 - weight * erases[:, head].unsqueeze(1))
        for head in range(weights.shape[1]):
            rows = rows + weights[:, head].unsqueeze(-1) * words[:, head].unsqueeze(1)
        return PlainMemory(rows)


class WeightPasses(TorchDispatchMode):
    """Counts what operations read and write of vectors over the slots, in numbers of floats."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.least, self.most, self.floats = slots, slots * width, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; views move nothing, and rows are counted elsewhere."""
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and self.least <= tensor.numel() < self.most:
                    self.floats += tensor.numel()
        return result


def weight_passes() -> float:
    """Passes of an NTM's step over vectors such as [B, H, N], in units of passes over the rows."""
    slots, counts = 2**19, []  # more than a block has numbers: what is done within is not counted
    for steps in (2, 3):
        ntm = NTM(INPUTS, HIDDEN, INPUTS, slots, WIDTH, HEADS)
        with WeightPasses(slots, WIDTH) as counted:
            pass_of(ntm, steps, 1)
        counts.append(counted.floats)
    return (counts[1] - counts[0]) / (slots * WIDTH)


class PlainCell(NTMCell):
    """An NTM's cell over a `PlainMemory`."""

    def initial_state(self, batch_size: int) -> NTMState:
        """That of the NTM."""
        state = super().initial_state(batch_size)
        return state._replace(memory=PlainMemory(state.memory.rows))


def sparse(model: type[MemoryModel], slots: int) -> MemoryModel:
    """SAM or SDNC."""
    return model(INPUTS, HIDDEN, INPUTS, slots, WIDTH, HEADS, TOP_K)  # type: ignore[call-arg]


def pass_of(model: nn.Module, steps: int, batch: int = BATCH) -> None:
    """Forward and backward over random sequences."""
    output, _ = model(torch.randn(batch, steps, INPUTS))
    output.square().mean().backward()


def microseconds(times: Timings, name: str, steps: int, scale: float = 1) -> dict[str, Any]:
    """A step's time: median and quartiles."""
    values = [value / steps * scale * 1e6 for value in times[name]]
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartiles": [low, high], "repetitions": len(values)}


def controller() -> dict[str, Any]:
    """SAM's step against its controller's alone."""
    models = {"sam": sparse(SAM, SLOTS), "without_memory": WithoutMemory()}
    work = {name: partial(pass_of, model, STEPS) for name, model in models.items()}
    interleaved(work, 3)
    times = interleaved(work, 60)
    return {
        "microseconds_a_step": {name: microseconds(times, name, STEPS) for name in models},
        "sam_to_without_memory": times.ratio("sam", "without_memory"),
        "peak_mib_of_one_sequence": {
            name: tensor_peak(partial(pass_of, model, STEPS, 1)) / 2**20
            for name, model in models.items()
        },
    }


def sizes(repetitions: int = 60) -> dict[str, Any]:
    """Slopes over the number of slots: of each round of all sizes, in random order."""
    work = {size: partial(pass_of, sparse(SAM, size), STEPS) for size in SIZES}
    peaks = {}
    for size, run in work.items():
        run()
        peaks[size] = tensor_peak(run)
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    order = list(SIZES)
    for _ in range(repetitions):
        random.shuffle(order)
        for size in order:
            times[size].append(seconds(work[size]))
    rounds = [log_slope(SIZES, list(found)).slope for found in zip(*times.values(), strict=True)]
    return {
        "time_slope": statistics.mean(rounds),
        "time_slope_standard_error": statistics.stdev(rounds) / math.sqrt(repetitions),
        "time_slope_of_medians": log_slope(SIZES, list(map(statistics.median, times.values())))[0],
        "memory_slope": log_slope(SIZES, list(peaks.values())).slope,
        "microseconds_a_step": {
            size: microseconds(Timings({"": found}), "", STEPS) for size, found in times.items()
        },
        "peak_bytes": peaks,
    }


def dense(batch: int, repetitions: int = 5) -> dict[str, Any]:
    """SAM against dense NTMs and what bandwidth allows them, `batch` sequences at a time."""
    sam, scale = sparse(SAM, SLOTS), BATCH / batch
    ntm = NTM(INPUTS, HIDDEN, INPUTS, SLOTS, WIDTH, HEADS)
    plain = MemoryModel(PlainCell(INPUTS, HIDDEN, SLOTS, WIDTH, HEADS), INPUTS)
    source, target = torch.rand(2, 2, SLOTS, WIDTH).unbind()
    work = {
        "sam": partial(pass_of, sam, STEPS),
        "copy": lambda: target.copy_(source),
        "ntm": partial(pass_of, ntm, DENSE_STEPS, batch),
    }
    interleaved(work, 3)  # until the allocator has what it needs
    times = interleaved(work, repetitions)
    plain_times = interleaved({"plain": partial(pass_of, plain, PLAIN_STEPS, 1)}, 3)
    one_pass = times.median("copy") / 2 * BATCH / len(source)
    step, plain_step = times.median("ntm") / DENSE_STEPS * scale, plain_times.median("plain")
    plain_step *= BATCH / PLAIN_STEPS
    sam_step, vectors = times.median("sam") / STEPS, weight_passes()
    passes = ROW_PASSES + vectors
    return {
        "ntm_batch": f"{batch}, times scaled by {scale:g} to {BATCH}",
        "plain_batch": f"1, times scaled by {BATCH} to {BATCH}",
        "microseconds_a_step": {
            "sam": microseconds(times, "sam", STEPS),
            "ntm": microseconds(times, "ntm", DENSE_STEPS, scale),
            "plain": microseconds(plain_times, "plain", PLAIN_STEPS, BATCH),
        },
        "copy_gigabytes_a_second": 2 * source.nbytes / times.median("copy") / 1e9,
        "bound": {
            "row_passes": ROW_PASSES,
            "weight_passes": vectors,
            "milliseconds": passes * one_pass * 1e3,
            "milliseconds_of_rows_alone": ROW_PASSES * one_pass * 1e3,
            "ntm_to_bound": step / (passes * one_pass),
            "ntm_to_bound_of_rows_alone": step / (ROW_PASSES * one_pass),
        },
        "ntm_to_sam": step / sam_step,
        "plain_to_sam": plain_step / sam_step,
        "memory": dense_memory(sam, ntm, batch),
    }


def dense_memory(sam: nn.Module, ntm: nn.Module, batch: int) -> dict[str, Any]:
    """Peaks of 100 steps of a batch; the NTM's extrapolated from what one more step takes."""
    few, more = (tensor_peak(partial(pass_of, ntm, n, batch)) for n in (1, DENSE_STEPS))
    step = (more - few) / (DENSE_STEPS - 1)
    of_ntm = (few + (STEPS - 1) * step) * BATCH / batch
    of_sam = tensor_peak(partial(pass_of, sam, STEPS))
    alone = tensor_peak(partial(pass_of, WithoutMemory(), STEPS))
    return {
        "ntm_bytes_extrapolated": of_ntm,
        "ntm_bytes_a_step": step * BATCH / batch,
        "sam_bytes": of_sam,
        "without_memory_bytes": alone,
        "ntm_to_sam_extrapolated": of_ntm / of_sam,
        "ntm_to_sam_beyond_the_controller_extrapolated": of_ntm / (of_sam - alone),
    }


def links(repetitions: int = 7) -> dict[str, Any]:
    """SDNC against DNC."""
    dnc = DNC(INPUTS, HIDDEN, INPUTS, LINKED_SLOTS, WIDTH, HEADS)
    sdnc = sparse(SDNC, LINKED_SLOTS)
    work = {"sdnc": partial(pass_of, sdnc, STEPS), "dnc": partial(pass_of, dnc, LINKED_STEPS)}
    interleaved(work, 2)
    times = interleaved(work, repetitions)
    return {
        "microseconds_a_step": {
            "sdnc": microseconds(times, "sdnc", STEPS),
            "dnc": microseconds(times, "dnc", LINKED_STEPS),
        },
        "dnc_to_sdnc": times.ratio("dnc", "sdnc") * STEPS / LINKED_STEPS,
    }


class Sequence:
    """One sequence (batch 1) with truncated BPTT, chunk by chunk."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, None

    def chunk(self) -> None:
        """The next TRUNCATE steps, forward and backward."""
        output, self.state = self.model(torch.randn(1, TRUNCATE, INPUTS), self.state)
        output.square().mean().backward()
        self.state = self.state.detach()

    def microseconds(self) -> float:
        """A step of them."""
        return seconds(self.chunk) / TRUNCATE * 1e6


def long() -> dict[str, Any]:
    """Time a step along one sequence, and what the last steps spend it on.

    Behind its 100,000 steps, 1,000 at a time are taken in turns with the first 1,000 of other
    sequences, a chunk of each: a second later this machine is another one.
    """
    model, size = sparse(SAM, 2**30), WINDOW // TRUNCATE
    pass_of(model, TRUNCATE, 1)
    can_find(torch.float32)  # compiled, or loaded, before it is timed
    tree_kernels()
    grown = Sequence(model)
    times = [grown.microseconds() for _ in range(LONG // TRUNCATE)]
    first, last = [], []
    for _ in range(OTHERS):
        short = Sequence(model)
        for _ in range(size):
            first.append(short.microseconds())
            last.append(grown.microseconds())
    profile = cProfile.Profile()
    for _ in range(size):
        profile.runcall(grown.chunk)
    return {
        "slots_touched": int(grown.state.touched[0]),
        "first_1000_microseconds_a_step": statistics.median(first),
        "behind_100000_microseconds_a_step": statistics.median(last),
        "last_to_first": statistics.median(last) / statistics.median(first),
        "last_to_first_of_means": statistics.mean(last) / statistics.mean(first),
        "microseconds_a_step_by_10000_steps": [
            round(statistics.mean(some)) for some in batched(times, 10 * size)
        ],
        "slowest_100_steps_microseconds_a_step": max(times + last),
        "profile_of_1000_more_steps": top_functions(profile),
    }


def batched(values: list[float], size: int) -> list[list[float]]:
    """So many at a time."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def top_functions(profile: cProfile.Profile, count: int = 15) -> dict[str, float]:
    """Microseconds a step inside the functions that take longest, without what they call."""
    found: Any = pstats.Stats(profile)
    longest = sorted(found.stats.items(), key=lambda item: -item[1][2])[:count]
    return {
        f"{Path(file).name}:{line} {name}": round(own / WINDOW * 1e6, 1)
        for (file, line, name), (_, _, own, *_) in longest
    }


def measured(part: str, batch: int) -> Any:
    """The figures of a part, from this process."""
    parts: dict[str, Any] = {
        "controller": controller,
        "sizes": sizes,
        "dense": partial(dense, batch),
        "links": links,
        "long": long,
    }
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return parts[part]()


PARTS = ("controller", "sizes", "dense", "links", "long")


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}.")] = None,
    dense_batch: Annotated[int, typer.Option(help="Sequences at a time of the NTM.")] = 2,
    alone: Annotated[bool, typer.Option("--alone", hidden=True)] = False,
) -> None:
    """Measure each part in a process of its own, and write the JSON beside this file."""
    chosen = part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"part is {min(unknown)!r}, expected one of {', '.join(PARTS)}")
    if alone:
        print(json.dumps(measured(chosen[0], dense_batch)))
        return
    path = Path(__file__).with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    setting = f"T={STEPS}, batch {BATCH}, {HEADS} heads, K={TOP_K}, width {WIDTH}, LSTM {HIDDEN}"
    for name in chosen:
        command = [sys.executable, __file__, "--part", name, "--dense-batch", str(dense_batch)]
        found = subprocess.run(
            [*command, "--alone"],
            env={**os.environ, **ALLOCATOR},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        figures = json.loads(found.stdout.splitlines()[-1])
        result[name] = {"machine": machine(), "setting": setting, **figures}
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps({name: figures}, indent=2))


if __name__ == "__main__":
    typer.run(main)

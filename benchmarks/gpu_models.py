"""A part of scripts/gpu_check: training passes of sparse memories, against LSTMs and a dense NTM.

Forward and backward of sequences of 100 steps, batch 64, 4 heads, K = 4, 2^20 slots of width 32,
LSTM of 256, float32; the optimiser's step is not in it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from gpu_common import Figures, Options, Results, measure, options, peak_bytes, tidy, wait
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sparsemem
from sparsemem.training.dryrun import run_pass

WIDTH = 8  # of inputs and outputs
SHARE = 0.8  # of the free memory that the dense NTM may take
DENSE_STEPS = 4


class Sizes(NamedTuple):
    """What is run."""

    batch: int = 64
    steps: int = 100
    hidden: int = 256
    slots: int = 2**20
    heads: int = 4
    top_k: int = 4
    slot_dim: int = 32

    @property
    def controller_input(self) -> int:
        """What SAM's controller gets: the input and what was read."""
        return WIDTH + self.heads * self.slot_dim


def main() -> None:
    """All of it, the most important first."""
    given = options(__doc__ or "")
    results = Results(given.results, given.seconds)
    sizes = Sizes(batch=4, steps=6, hidden=16, slots=64, slot_dim=8) if given.tiny else Sizes()
    small = sizes._replace(batch=min(8, sizes.batch))

    def add(name: str, work: Callable[[Options, Sizes], Figures], of: Sizes = sizes) -> None:
        results.run(name, lambda: work(given, of))

    add("sam captured", lambda g, s: timed(g, s, sparsemem.captured(sparse(g, s))))
    add("lstm cudnn", lambda g, s: timed(g, s, CudnnLSTM(s).to(g.device)))
    add("sam", lambda g, s: timed(g, s, sparse(g, s)))
    add("sam kernels", kernels)
    add("sam agreement", agreement)
    add("controller captured", lambda g, s: timed(g, s, controller(g, s), s.controller_input))
    add("sam reference", reference)
    if given.quick:
        return
    add("sdnc captured", lambda g, s: timed(g, s, sparsemem.captured(sparse(g, s, sparsemem.SDNC))))
    add("ntm dense", dense)
    add("sam captured, batch 8", lambda g, s: timed(g, s, sparsemem.captured(sparse(g, s))), small)
    add("lstm cudnn, batch 8", lambda g, s: timed(g, s, CudnnLSTM(s).to(g.device)), small)
    add("sam forward captured", forward)
    add("sam reference captured", reference_captured)
    add("sam training captured", training)
    add("sdnc", lambda g, s: timed(g, s, sparse(g, s, sparsemem.SDNC)))
    add("sam, batch 8", lambda g, s: timed(g, s, sparse(g, s)), small)


class CudnnLSTM(nn.Module):
    """The LSTM by itself, as cuDNN has it: all steps in one call."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, sizes.hidden, batch_first=True)
        self.output = nn.Linear(sizes.hidden, WIDTH)

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        """Output [B, T, Y]."""
        return self.output(self.lstm(input)[0]), None


def sparse(given: Options, sizes: Sizes, kind: Any = sparsemem.SAM) -> Any:
    """A sparse model of these sizes."""
    torch.manual_seed(0)
    memory = (sizes.slots, sizes.slot_dim, sizes.heads, sizes.top_k)
    return kind(WIDTH, sizes.hidden, WIDTH, *memory).to(given.device)


def controller(given: Options, sizes: Sizes) -> Any:
    """SAM's controller and output layer without a memory, step by step in a graph."""
    model = sparsemem.LSTM(sizes.controller_input, sizes.hidden, WIDTH)
    return sparsemem.captured(model.to(given.device))


def sequences(given: Options, sizes: Sizes, width: int = WIDTH) -> Tensor:
    """A batch of random sequences."""
    generator = torch.Generator(given.device).manual_seed(1)
    shape = (sizes.batch, sizes.steps, width)
    return torch.randn(shape, generator=generator, device=given.device)


def both_ways(model: nn.Module, input: Tensor) -> Tensor:
    """Forward and backward, into gradients that were None."""
    model.zero_grad(set_to_none=True)
    output: Tensor = model(input)[0]
    output.square().mean().backward()
    return output


def timed(
    given: Options, sizes: Sizes, model: nn.Module, width: int = WIDTH, **limits: Any
) -> Figures:
    """Milliseconds of a pass both ways, and the memory it takes at its peak."""
    input = sequences(given, sizes, width)
    found = measure(lambda: both_ways(model, input), given.device, **limits)
    found["us_a_step"] = round(1e3 * found["ms"] / sizes.steps, 3)
    found["peak_bytes"] = peak_bytes(given.device)
    return found | graphs_of(model)


def graphs_of(model: nn.Module) -> Figures:
    """How many were captured, or why not: without them its figures are those of the model."""
    if not isinstance(model, sparsemem.models.captured.Captured):
        return {}
    return {"graphs": model.num_graphs, "failure": model.failure}


@contextmanager
def only_reference() -> Iterator[None]:
    """The torch code instead of kernels."""
    before = os.environ.get("SPARSEMEM_KERNELS")
    os.environ["SPARSEMEM_KERNELS"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("SPARSEMEM_KERNELS")
        if before is not None:
            os.environ["SPARSEMEM_KERNELS"] = before


def reference(given: Options, sizes: Sizes) -> Figures:
    """SAM in torch operations."""
    limits = {"warm_up": 1, "repetitions": 10, "least": 3 if given.quick else 10}
    with only_reference():
        return timed(given, sizes, sparse(given, sizes), **limits)


def reference_captured(given: Options, sizes: Sizes) -> Figures:
    """SAM in torch operations, in a graph."""
    with only_reference():
        return timed(given, sizes, sparsemem.captured(sparse(given, sizes)), repetitions=10)


def forward(given: Options, sizes: Sizes) -> Figures:
    """Forward alone, without gradients."""
    model, input = sparsemem.captured(sparse(given, sizes)), sequences(given, sizes)
    with torch.no_grad():
        return measure(lambda: model(input), given.device) | graphs_of(model)


def training(given: Options, sizes: Sizes) -> Figures:
    """With Adam's step."""
    model, input = sparsemem.captured(sparse(given, sizes)), sequences(given, sizes)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        both_ways(model, input)
        optimiser.step()

    return measure(step, given.device) | graphs_of(model)


def agreement(given: Options, sizes: Sizes) -> Figures:
    """How far kernels and graphs are from the torch code: largest differences, by largest value.

    In float64: in float32 rows that are level on the grid but for rounding change places.
    """
    sizes = sizes._replace(steps=min(sizes.steps, 20))
    model, input = sparse(given, sizes).double(), sequences(given, sizes).double()

    def found(net: nn.Module) -> list[Tensor]:
        output = both_ways(net, input).detach()
        return [output, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    with only_reference():
        truth = found(copy.deepcopy(model))
    fast = sparsemem.captured(copy.deepcopy(model))
    for _ in range(2):
        found(fast)
    results = {"kernels": found(copy.deepcopy(model)), "captured": found(fast)}
    differences = {
        f"{name}_{part}": difference(values[slices], truth[slices])
        for name, values in results.items()
        for part, slices in (("output", slice(1)), ("gradients", slice(1, None)))
    }
    return differences | graphs_of(fast)


def difference(values: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, by its tensor's largest value; NaN if one is, which Python's max could miss."""
    parts = [
        (ours - true).abs().max() / true.abs().max().clamp(min=1e-12)
        for ours, true in zip(values, truth, strict=True)
    ]
    return float(torch.stack(parts).max())


def kernels(given: Options, sizes: Sizes) -> Figures:
    """Which kernels a captured sequence spends its time in."""
    model, input = sparsemem.captured(sparse(given, sizes)), sequences(given, sizes)
    for _ in range(3):
        both_ways(model, input)
    wait(given.device)
    on_gpu = given.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        both_ways(model, input)
        wait(given.device)
    averages = profiler.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=25, max_name_column_width=80), flush=True)
    events = sorted(averages, key=lambda event: -getattr(event, order))
    # What runs on the device, not the operations that launched it.
    if on_gpu:
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    top = [
        {"name": e.key[:100], "calls": e.count, "us": round(getattr(e, order), 1)} for e in events
    ]
    return {
        "top": top[:20],
        "kernels": sum(entry["calls"] for entry in top),
        "busy_ms": round(sum(entry["us"] for entry in top) / 1e3, 4),
        **graphs_of(model),
    }


def dense(given: Options, sizes: Sizes) -> Figures:
    """A dense NTM with as many slots, or the most that fit: a few steps, and a step of them."""
    budget = torch.cuda.mem_get_info(given.device)[0] if given.device.type == "cuda" else 2**30
    slots, steps = sizes.slots, min(DENSE_STEPS, sizes.steps)
    while (needed := dense_bytes(sizes, slots, steps)) > SHARE * budget and slots > 1:
        steps, slots = (steps // 2, slots) if steps > 2 else (steps, slots // 2)
    found: Figures = {}
    while not found:
        of = sizes._replace(steps=steps, slots=slots)
        try:
            found = timed(given, of, ntm(of).to(given.device), warm_up=1, repetitions=10)
        except torch.cuda.OutOfMemoryError:
            slots //= 2
        tidy()
    scale = sizes.slots / slots
    return found | {
        "slots": slots,
        "steps": steps,
        "predicted_peak_bytes": needed,
        "us_a_step_at_all_slots": round(found["us_a_step"] * scale, 1),
        "extrapolated": scale > 1,
    }


def ntm(sizes: Sizes) -> sparsemem.NTM:
    """A dense NTM with as many heads."""
    memory = {"num_slots": sizes.slots, "slot_dim": sizes.slot_dim, "num_heads": sizes.heads}
    return sparsemem.NTM(WIDTH, sizes.hidden, WIDTH, **memory)


def dense_bytes(sizes: Sizes, slots: int, steps: int) -> int:
    """What a pass of the dense NTM takes, from shapes alone."""
    with torch.device("meta"):
        model = ntm(sizes._replace(slots=slots))
    return run_pass(model, sizes.batch, steps).peak


if __name__ == "__main__":
    main()

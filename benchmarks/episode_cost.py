"""What a SAM step costs: python benchmarks/episode_cost.py (3 minutes; writes episode_cost.json).

- time of forward and backward a step at N = 2^30 against N = 2^12 and against the same
  controller without a memory, interleaved, medians of paired ratios;
- peak memory of a 100-step forward and backward of one sequence;
- time a step over one 20,000-step sequence with truncated BPTT.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import interleaved, machine
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sparsemem import SAM

INPUT = HIDDEN_OUTPUT = 8
HIDDEN, HEADS, TOP_K, WIDTH = 100, 4, 4, 32
STEPS, BATCH, REPETITIONS = 100, 8, 21
LONG, TRUNCATE, WINDOW = 20_000, 100, 1_000


class WithoutMemory(nn.Module):
    """The controller of SAM with its interface and output layers; reads are interface values."""

    def __init__(self) -> None:
        super().__init__()
        read = HEADS * WIDTH
        self.controller = nn.LSTMCell(INPUT + read, HIDDEN)
        self.interface = nn.Linear(HIDDEN, HEADS * (2 * WIDTH + 3))
        self.output = nn.Linear(HIDDEN + read, HIDDEN_OUTPUT)

    def forward(self, input: Tensor) -> Tensor:
        """Output [B, T, Y]."""
        state, reads, features = None, input.new_zeros(len(input), HEADS * WIDTH), []
        for step in input.unbind(1):
            state = self.controller(torch.cat([step, reads], 1), state)
            reads = self.interface(state[0])[:, : HEADS * WIDTH]
            features.append(torch.cat([state[0], reads], 1))
        return self.output(torch.stack(features, 1))


def sam(num_slots: int) -> nn.Module:
    """The model that is measured."""
    return SAM(INPUT, HIDDEN, HIDDEN_OUTPUT, num_slots, WIDTH, HEADS, TOP_K)


def forward_backward(model: nn.Module, batch: int) -> None:
    """One training step's work."""
    output = model(torch.randn(batch, STEPS, INPUT))
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()


def step_times() -> dict[str, Any]:
    """Microseconds a step, and ratios within each repetition."""
    models = {"without_memory": WithoutMemory(), "2^12": sam(2**12), "2^30": sam(2**30)}
    for model in models.values():
        forward_backward(model, BATCH)
    work = {name: partial(forward_backward, model, BATCH) for name, model in models.items()}
    times = interleaved(work, REPETITIONS)
    return {
        "microseconds_a_step": {name: times.median(name) / STEPS * 1e6 for name in models},
        "2^30_to_2^12": times.ratio("2^30", "2^12"),
        "2^30_to_without_memory": times.ratio("2^30", "without_memory"),
    }


def peak_bytes(model: nn.Module) -> int:
    """Most bytes of tensors alive at once during one sequence's forward and backward."""
    forward_backward(model, 1)  # parameters' gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(model, 1)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def memory() -> dict[str, float]:
    """MiB above parameters and gradients, and above the controller's activations too."""
    with_memory, without = peak_bytes(sam(2**30)), peak_bytes(WithoutMemory())
    return {
        "mib_of_sam": with_memory / 2**20,
        "mib_of_the_controller_alone": without / 2**20,
        "mib_above_the_controller": (with_memory - without) / 2**20,
    }


def long_sequence() -> dict[str, Any]:
    """Time a step in the first and the last window of one long sequence (batch 1)."""
    model, state, times = sam(2**30), None, []
    forward_backward(model, 1)
    for _ in range(LONG // TRUNCATE):
        start = time.perf_counter()
        output, state = model(torch.randn(1, TRUNCATE, INPUT), state)
        output.square().mean().backward()
        state = state.detach()
        times.append((time.perf_counter() - start) / TRUNCATE)
    windows = [
        statistics.mean(times[i : i + WINDOW // TRUNCATE])
        for i in range(0, len(times), WINDOW // TRUNCATE)
    ]
    return {
        "slots_touched": int(state.touched[0]),
        "microseconds_a_step_by_1000_steps": [round(window * 1e6) for window in windows],
        "last_to_first": windows[-1] / windows[0],
        "slowest_100_steps_microseconds_a_step": round(max(times) * 1e6),
    }


def main() -> None:
    """Measure and write the JSON beside this file."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result = {
        "machine": machine(),
        "setting": "T=100, batch 8, 4 heads, K=4, width 32, LSTM 100, float32",
        "step": step_times(),
        "memory_batch_1": memory(),
        "long_sequence_batch_1_truncated_at_100": long_sequence(),
    }
    text = json.dumps(result, indent=2)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

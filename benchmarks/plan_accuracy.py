"""How near `sparsemem plan` is: python benchmarks/plan_accuracy.py (5 minutes).

Configs drawn at random, each in a process of its own: what is predicted, then what training takes.
Memory: tensors alive at the peak of training steps at the longest sequences, parameters and
optimiser included, as torch's profiler counts them at the allocator; and how much resident memory
grew, beside. Time: the mean of training steps of the run; planned and trained in turns, medians,
as a shared machine may run at two thirds of its speed for a second. Writes plan_accuracy.json.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from common import machine

from sparsemem.bench.measuring import process_bytes, reset_peak, tensor_peak
from sparsemem.bench.workers import Made, Worker
from sparsemem.training.calibration import plan_seconds
from sparsemem.training.config import make_config
from sparsemem.training.plan import plan_memory
from sparsemem.training.setup import prepare
from sparsemem.training.trainer import Trainer

RESULT = Path(__file__).with_suffix(".json")
WARM_UP, PEAK_STEPS = 3, 2
TURNS, SECONDS, MOST_STEPS = 5, 2.0, 15  # of a turn
LIMIT = 300.0
MEMORY_TARGET, TIME_TARGET = 0.2, 1.5
DENSE_SLOTS = {"ntm": (32, 4096), "dnc": (16, 256)}


def drawn(seed: int) -> dict[str, Any]:
    """A config from a seed: model, sizes, task, batch, optimiser, truncation."""
    pick = random.Random(f"plan {seed}")

    def size(low: int, high: int) -> int:
        """Uniform in the logarithm."""
        return round(low * (high / low) ** pick.random())

    name = pick.choice(["sam", "sdnc", "dnc", "ntm", "lstm"])
    model: dict[str, Any] = {"name": name, "hidden_size": size(32, 512)}
    if name != "lstm":
        model["slot_dim"], model["num_heads"] = size(8, 64), size(1, 8)
        model["num_slots"] = size(*DENSE_SLOTS.get(name, (2**12, 2**30)))
    task = pick.choice(["copy", "repeat-copy", "associative-recall", "priority-sort"])
    return {
        "model": model,
        "task": {"name": task} | ({"max_level": size(4, 60)} if task == "copy" else {}),
        "training": {
            "batch_size": size(2, 64),
            "truncate": pick.choice([None, None, 16]),
            "optimizer": {"name": pick.choice(["adam", "rmsprop", "sgd"]), "learning_rate": 1e-4},
        },
    }


class PlannedRun(NamedTuple):
    """A config, planned and then trained for some steps."""

    seed: int

    def make(self) -> Made:
        """Figures: predicted and measured."""
        config = make_config(drawn(self.seed))
        begun = time.perf_counter()
        planned = plan_memory(config)
        predicted = [plan_seconds(planned).step]
        plan_time = time.perf_counter() - begun
        resident = process_bytes("VmRSS")
        reset_peak()

        def train() -> None:
            trainer = Trainer(prepare(config))
            for _ in range(PEAK_STEPS):
                trainer._train_batch(trainer.curriculum.maximum)
                trainer.step += 1

        train()
        grown = process_bytes("VmHWM") - resident
        measured = tensor_peak(train)
        trainer = Trainer(prepare(config))
        mean_step(trainer, WARM_UP)
        trained = [mean_step(trainer)]
        for _ in range(TURNS - 1):
            predicted.append(plan_seconds(planned).step)
            trained.append(mean_step(trainer))
        turns = [plan / step for plan, step in zip(predicted, trained, strict=True)]
        figures = {
            "plan_seconds": plan_time,
            "predicted_bytes": float(planned.plan.memory.step),
            "measured_bytes": float(measured),
            "measured_rss_bytes": float(grown),
            "predicted_step_seconds": statistics.median(predicted),
            "measured_step_seconds": statistics.median(trained),
            "turns_within_factor_1.5": sum(within(ratio) for ratio in turns),
            "least_time_ratio_of_a_turn": min(turns),
            "largest_time_ratio_of_a_turn": max(turns),
        }
        return Made(figures, {})


def within(ratio: float) -> bool:
    """Whether a time was predicted well."""
    return 1 / TIME_TARGET <= ratio <= TIME_TARGET


def mean_step(trainer: Trainer, most: int = MOST_STEPS) -> float:
    """Seconds of a training step, over the next steps of the run."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < most and time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        trainer._train_batch(trainer.curriculum.level(trainer.step))
        trainer.step += 1
        times.append(time.perf_counter() - start)
    return statistics.mean(times)


def measured(seed: int) -> dict[str, Any]:
    """One config's figures and how far the prediction was off."""
    worker = Worker(PlannedRun(seed))
    figures = worker.made(LIMIT)
    worker.close()
    memory = figures["predicted_bytes"] / figures["measured_bytes"]
    step = figures["predicted_step_seconds"] / figures["measured_step_seconds"]
    return {
        "config": drawn(seed),
        **figures,
        "memory_ratio": memory,
        "time_ratio": step,
        "memory_within": abs(memory - 1) <= MEMORY_TARGET,
        "time_within": within(step),
    }


def main(
    configs: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    first: Annotated[int, typer.Option(help="Seed of the first.")] = 0,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULT,
) -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(1)
    found = []
    for seed in range(first, first + configs):
        found.append(measured(seed))
        last = found[-1]
        name = last["config"]["model"]["name"]
        print(f"{name}: memory {last['memory_ratio']:.3f}, time {last['time_ratio']:.2f}")
    result = {
        "machine": machine(),
        "setting": "predicted by measured; memory: tensors at the peak, "
        "time: mean training step (medians of turns)",
        "memory_within_20_percent": sum(each["memory_within"] for each in found),
        "time_within_factor_1.5": sum(each["time_within"] for each in found),
        "single_turns_within_factor_1.5": sum(each["turns_within_factor_1.5"] for each in found),
        "turns": TURNS * len(found),
        "configs": found,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

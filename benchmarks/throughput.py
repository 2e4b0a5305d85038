"""Training throughput of the example tasks: python benchmarks/throughput.py (4 minutes).

Sequences a second of whole training steps (data, forward, backward, clipping, optimiser) at the
longest sequences that a config trains on: with the compiled kernels in one thread and in two, and
with the plain torch code that they replace (SPARSEMEM_KERNELS=reference) in one, in turns in one
process. NTM, DNC and LSTM have no kernels on a CPU: their first two figures are the same code.
Writes throughput.json.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from common import Timings, interleaved, machine, seconds

from sparsemem.indexes.triton_switch import SWITCH
from sparsemem.training.config import load_config
from sparsemem.training.errors import ConfigError
from sparsemem.training.setup import prepare
from sparsemem.training.threads import set_threads
from sparsemem.training.trainer import Trainer

HERE = Path(__file__).resolve().parent
RESULT = Path(__file__).with_suffix(".json")
# What runs, and in how many threads.
KINDS = {"torch": ("reference", 1), "kernels": ("auto", 1), "two_threads": ("auto", 2)}
WARM_UP, MOST, SECONDS = 2, 31, 16.0  # of all kinds together


def a_step(trainer: Trainer, switch: str, threads: int) -> None:
    """One training step at the highest level."""
    os.environ[SWITCH] = switch
    trainer.config.training.threads = threads
    set_threads(trainer.config)
    trainer._train_batch(trainer.curriculum.maximum)
    trainer.step += 1


def measured(path: Path) -> dict[str, Any]:
    """A config's sequences a second, and how many times faster the kernels are."""
    trainer = Trainer(prepare(load_config(path)))
    work = {kind: partial(a_step, trainer, *how) for kind, how in KINDS.items()}
    interleaved(work, WARM_UP)
    once = sum(seconds(step) for step in work.values())
    times: Timings = interleaved(work, max(3, min(MOST, int(SECONDS / once))))
    batch = trainer.config.training.batch_size
    return {
        "model": trainer.config.model.name,
        "level": trainer.curriculum.maximum,
        "steps_a_sequence": trainer.task.batch(0, trainer.curriculum.maximum).input.shape[1],
        "batch_size": batch,
        "repetitions": len(times["torch"]),
        "sequences_a_second": {kind: batch / times.median(kind) for kind in KINDS},
        "times_faster": times.ratio("torch", "kernels"),
        "times_faster_with_two_threads": times.ratio("kernels", "two_threads"),
    }


def main(
    config: Annotated[list[Path] | None, typer.Argument(help="Configs.  [examples/*.yaml]")] = None,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULT,
) -> None:
    """Measure and write the JSON; an example whose data is not here is left out, and said."""
    found, begun = {}, time.perf_counter()
    for path in config or sorted((HERE.parent / "examples").glob("*.yaml")):
        try:
            found[path.stem] = measured(path)
        except ConfigError as error:
            print(f"{path.stem}: left out: {error}")
            continue
        print(path.stem, json.dumps(found[path.stem]["sequences_a_second"]), flush=True)
    result = {
        "machine": machine(),
        "setting": "whole training steps at the highest level, medians of turns",
        "seconds": time.perf_counter() - begun,
        "examples": found,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""A character language model with a memory of 2^20 slots, and one with a dense block instead.

Both are the same transformer but for one feed-forward block, which is a MemoryLayer in one and a
dense block of as many multiply-adds in the other. Same text, same batches, same number of steps;
each variant has its own best learning rates of those tried.

1,500 steps of 16 x 128 characters, seed 0, on one core of a busy machine:

    variant   multiply-adds a character   validation loss   minutes
    dense                       681,088             1.681         7
    memory                      681,216             1.607        14

    python examples/charlm/memory_vs_dense.py train dense
    python examples/charlm/memory_vs_dense.py train memory              # --shards 4: its values
                                                                        # over 4 Ray processes
    python examples/charlm/memory_vs_dense.py draw
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from charlm import (
    DATA,
    ROOT,
    RUNS,
    VARIANTS,
    CharLM,
    MakeBank,
    Point,
    Size,
    Text,
    bank_maker,
    bank_of,
    bring_here,
    build,
    encode,
    fit,
    memory_parts,
    multiply_adds,
    optimiser_of,
    shakespeare,
    validate,
)
from safetensors.torch import save_model

from sparsemem import MemoryLayer
from sparsemem.bank import MemoryBank
from sparsemem.checks import nearest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Of the network and of the memory's values: the best of those tried (see above).
RATES = {"dense": (3e-3, 3e-3), "memory": (3e-3, 1e-1)}
COLOURS = {"dense": "tab:blue", "memory": "tab:red"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Runs = Annotated[Path, typer.Option(help="Folder of curves and of the model with the memory.")]


def train(
    variant: str,
    text: Text,
    alphabet: int,
    size: Size,
    *,
    steps: int,
    batch_size: int,
    rates: tuple[float, float],
    every: int,
    seed: int = 0,
    make_bank: MakeBank = MemoryBank,
) -> tuple[CharLM, dict[str, Any]]:
    """Train one variant: the model, and its curve with what it was trained with."""
    model = build(variant, alphabet, size, seed, make_bank)
    is_sharded = make_bank is not MemoryBank
    print(arithmetic(model, size))

    def evaluate() -> Point:
        if is_sharded:
            bank_of(model).save()  # or the shards' logs would hold the gradients of all steps
        return {"valid": validate(model, text, size.context)}

    points = fit(
        model,
        text.batches(steps, batch_size, size.context, seed),
        steps,
        optimiser_of(model, *rates),
        evaluate,
        every,
    )
    if is_sharded:
        bring_here(model)
    about = {"steps": steps, "batch_size": batch_size, "rates": rates, "seed": seed}
    return model, {**about, "multiply_adds": multiply_adds(model), "points": points}


def arithmetic(model: CharLM, size: Size) -> str:
    """A table of multiply-adds a character."""
    block = model.blocks[size.memory_blocks[0]].feed_forward
    lines = {
        "model": multiply_adds(model),
        "  of these, the block that differs": multiply_adds(block),
    }
    if isinstance(block, MemoryLayer):
        linear = {name: multiply_adds(layer) for name, layer in block.named_children()}
        parts = {**linear, **memory_parts(block)}
        lines |= {f"    {part}": count for part, count in parts.items() if count}
    return "\n".join(f"{name:48}{count:10,}" for name, count in lines.items())


@app.command("train")
def train_command(
    variant: Annotated[str, typer.Argument(help="dense or memory")],
    steps: int = 1500,
    batch_size: int = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Of the network.")] = None,
    row_learning_rate: Annotated[float | None, typer.Option(help="Of the values.")] = None,
    every: Annotated[int, typer.Option(help="Steps between validations.")] = 100,
    seed: int = 0,
    threads: int = 1,
    data: Path = DATA,
    runs: Runs = RUNS,
    shards: Annotated[int, typer.Option(min=0, help="Of the memory; 0: in this process.")] = 0,
) -> None:
    """Train one variant on tiny Shakespeare and write its curve."""
    if variant not in VARIANTS:
        raise typer.BadParameter(f"variant is {variant!r}, {nearest(variant, VARIANTS)}")
    if shards and variant != "memory":
        raise typer.BadParameter(f"--shards is {shards}, expected it with variant 'memory'")
    torch.set_num_threads(threads)
    raw = shakespeare(data)
    alphabet = "".join(sorted(set(raw)))
    rates = (learning_rate or RATES[variant][0], row_learning_rate or RATES[variant][1])
    runs.mkdir(parents=True, exist_ok=True)
    with bank_maker(shards, runs) as make_bank:
        model, curve = train(
            variant,
            encode(raw, alphabet),
            len(alphabet),
            Size(),
            steps=steps,
            batch_size=batch_size,
            rates=rates,
            every=every,
            seed=seed,
            make_bank=make_bank,
        )
    (runs / f"{variant}.json").write_text(json.dumps(curve, indent=1))
    save_model(model, str(runs / f"{variant}.safetensors"))


@app.command("draw")
def draw_command(runs: Runs = RUNS, picture: Path = ROOT / "docs" / "charlm.png") -> None:
    """Draw the curves of both variants in one picture."""
    draw({name: json.loads((runs / f"{name}.json").read_text()) for name in VARIANTS}, picture)


def draw(curves: dict[str, dict[str, Any]], picture: Path) -> None:
    """Training and validation losses over the steps."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        points, count = curve["points"][1:], curve["multiply_adds"]
        steps = [point["step"] for point in points]
        best = min(point["valid"] for point in points)
        label = f"{name}, {count:,} multiply-adds a character: best {best:.3f}"
        axes.plot(steps, [p["valid"] for p in points], color=COLOURS[name], label=label)
        axes.plot(steps, [p["train"] for p in points], color=COLOURS[name], ls=":")
    axes.set(xlabel="steps", ylabel="nats a character", title="Tiny Shakespeare")
    axes.legend(title="validation (dotted: training)")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    app()

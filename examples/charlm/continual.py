"""The character language model with a memory learns a second text. What does it forget?

Three ways, each from the model that `memory_vs_dense.py train memory` left on tiny Shakespeare,
with the same batches of Wikipedia (characters that Shakespeare lacks are left out) and as many
steps:

    selected  sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): of the values that a
              batch reads, those `top` are trained that it uses far more than Shakespeare does
    read      all values that a batch reads are trained, and nothing else
    full      everything is trained

300 steps of 16 x 128 characters from the model that `memory_vs_dense.py` leaves (seed 0), 1-2
minutes each; loss on the second text (2.74 before), and rise of that on the first (1.61 before):

    selected    2.17    +0.02    --top 5000 --row-learning-rate 1e-1
    read        1.84    +0.28    --row-learning-rate 3e-2
    full        1.59    +1.04    --row-learning-rate 3e-2

Selected rows forget a fiftieth of what full training does, and learn half of it. Also tried for
selected: top 5000 at 3e-2 (2.38 and +0.00), top 1000 at 3e-2 (2.54 and +0.00); docs/continual.png.

    python examples/charlm/continual.py learn selected --top 5000 --row-learning-rate 1e-1
    python examples/charlm/continual.py learn read --row-learning-rate 3e-2
    python examples/charlm/continual.py learn full --row-learning-rate 3e-2
    python examples/charlm/continual.py draw
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
    CharLM,
    Point,
    Size,
    Text,
    bank_of,
    build,
    encode,
    fit,
    optimiser_of,
    shakespeare,
    validate,
    wikitext,
)
from safetensors.torch import load_model

from sparsemem.checks import nearest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {"selected": "tab:green", "read": "tab:orange", "full": "tab:purple"}
BACKGROUND = 200  # batches of the first text that tell which rows it uses
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Runs = Annotated[Path, typer.Option(help="Folder with memory.safetensors; the curves go there.")]


@torch.no_grad()
def gather_background(model: CharLM, text: Text, size: Size, batch_size: int) -> None:
    """Let the bank count in how many batches of a text each row is read."""
    for batch in text.batches(BACKGROUND, batch_size, size.context, seed=1):
        with bank_of(model).background():
            model.loss(batch)


def learn(
    method: str,
    model: CharLM,
    first: Text,
    second: Text,
    size: Size,
    *,
    steps: int,
    batch_size: int,
    rates: tuple[float, float],
    top: int,
    every: int,
    part: int = 1,
) -> list[Point]:
    """Train the model on the second text by a method; losses on both along the way."""
    bank = bank_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(method == "full" or parameter is bank.values)
    if method == "selected":
        gather_background(model, first, size, batch_size)

    def evaluate() -> Point:
        losses = {"first": first, "second": second}
        point = {name: validate(model, text, size.context, part) for name, text in losses.items()}
        bank.select(None)  # what was read here is no part of the next batch
        return point

    def select() -> None:
        if method == "selected":
            bank.select(policy="tf-idf", top=top)

    batches = second.batches(steps, batch_size, size.context, seed=2)
    return fit(model, batches, steps, optimiser_of(model, *rates), evaluate, every, select)


@app.command("learn")
def learn_command(
    method: Annotated[str, typer.Argument(help="selected, read or full")],
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: Annotated[float, typer.Option(help="Of the network.")] = 1e-3,
    row_learning_rate: Annotated[float, typer.Option(help="Of the values.")] = 3e-3,
    top: Annotated[int, typer.Option(help="Rows selected a batch.")] = 1000,
    every: Annotated[int, typer.Option(help="Steps between validations.")] = 30,
    threads: int = 1,
    data: Path = DATA,
    runs: Runs = RUNS,
) -> None:
    """Let the trained model learn the second text, and write the losses on both."""
    if method not in METHODS:
        raise typer.BadParameter(f"method is {method!r}, {nearest(method, METHODS)}")
    torch.set_num_threads(threads)
    size, raw = Size(), shakespeare(data)
    alphabet = "".join(sorted(set(raw)))
    model = build("memory", len(alphabet), size)
    load_model(model, runs / "memory.safetensors")
    settings: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "rates": (learning_rate, row_learning_rate),
        "top": top,
    }
    texts = encode(raw, alphabet), encode(wikitext(data), alphabet)
    points = learn(method, model, *texts, size, every=every, **settings)
    curve = {"method": method, **settings, "points": points}
    (runs / f"continual-{method}.json").write_text(json.dumps(curve, indent=1))


@app.command("draw")
def draw_command(runs: Runs = RUNS, picture: Path = ROOT / "docs" / "continual.png") -> None:
    """Draw learning and forgetting of all three in one picture."""
    draw({n: json.loads((runs / f"continual-{n}.json").read_text()) for n in METHODS}, picture)


def draw(curves: dict[str, dict[str, Any]], picture: Path) -> None:
    """Both losses over the steps, and one against the other."""
    figure, (over, against) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, curve in curves.items():
        points, colour = curve["points"], METHODS[name]
        steps = [point["step"] for point in points]
        first = [point["first"] - points[0]["first"] for point in points]
        second = [point["second"] for point in points]
        label = f"{name}: {second[-1]:.2f} on the second, first {first[-1]:+.2f}"
        over.plot(steps, second, color=colour, label=name)
        over.plot(steps, [point["first"] for point in points], color=colour, ls=":")
        against.plot(second, first, color=colour, marker=".", label=label)
    over.set(xlabel="steps", ylabel="nats a character", title="Losses (dotted: the first text)")
    against.set(xlabel="loss on the second text", ylabel="rise of the loss on the first")
    against.set_title("Learning (to the left) against forgetting (up)")
    against.invert_xaxis()
    for axes in (over, against):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    app()

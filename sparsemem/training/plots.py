"""Pictures of a run: the learning curve, and what the memory does over a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsemem.models.base import Access, MemoryModel
from sparsemem.models.registry import find_model
from sparsemem.tasks import Batch, BitTask, Task
from sparsemem.training.errors import RunError
from sparsemem.training.run import RunFolder
from sparsemem.training.setup import Setup

USED = 0.005  # weight over which a slot is shown: the delta of SAM's usage
MOST_SLOTS = 64  # rows of a memory picture; of more, those with the largest weights
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "figure.dpi": 150}
SLOT = "slot, by first use"
# Values outside the mask don't count and are left blank.
BLANK = "#eeeeee"


class Panel(NamedTuple):
    """One picture in a column of pictures over time."""

    title: str
    data: np.ndarray  # [rows, T]; NaN is left blank
    colours: str
    low: float
    high: float
    rows: str  # what a row is

    @property
    def height(self) -> int:
        """Height in text lines, within what is legible and what fits."""
        return max(5, min(len(self.data), 16 if self.rows == SLOT else 9))


class Trace(NamedTuple):
    """One sequence, step by step: numpy arrays, time last."""

    input: np.ndarray  # [X, T]
    target: np.ndarray | None  # [Y, T] bits, NaN where nothing counts
    output: np.ndarray | None  # [Y, T] probabilities, NaN where nothing counts
    writes: np.ndarray  # [slots shown, T] weights
    reads: np.ndarray  # [slots shown, T] weights
    touched: int


def plot_run(run: RunFolder, setup: Setup) -> list[Path]:
    """Draw what a run allows into its pictures folder; returns the files."""
    records = run.metrics()
    level = setup.config.evaluation.level
    batch = next(iter(setup.evaluation_task.evaluation_batches("test", 1, level)))
    trace = record(setup.model, setup.task, batch)
    name = find_model(setup.config.model.name).__name__
    slots = setup.config.model.options.get("num_slots")
    memory = f" with {slots:,} slots" if slots else ""
    title = f"{name}{memory}, task {setup.config.task.name}, level {level}"
    figures = {"memory.png": memory_figure(trace, title)}
    if records:
        figures["learning.png"] = learning_figure(records, setup.task.metric_name, name)
    try:
        run.pictures.mkdir(exist_ok=True)
        for file, figure in figures.items():
            figure.savefig(run.pictures / file)
    except OSError as error:
        raise RunError(f"cannot write {run.pictures}: {error.strerror}") from error
    return [run.pictures / file for file in figures]


# The sequence ------------------------------------------------------------------------


@torch.no_grad()
def record(model: MemoryModel, task: Task, batch: Batch) -> Trace:
    """Run the first sequence of a batch, one time step a call, and keep what was accessed."""
    model.eval()
    end = int(batch.mask[0].nonzero().max()) + 1  # what follows is padding
    first = Batch(*(part[:1, :end] for part in batch)).to(next(model.parameters()).device)
    state: Any = None
    outputs, accesses = [], []
    for step in range(first.input.shape[1]):
        output, state = model(first.input[:, step : step + 1], state)
        outputs.append(output)
        accesses.append(state.access)
    writes, reads = weights_over_time(accesses)
    target = output_bits = None
    if isinstance(task, BitTask):
        blank = ~first.mask[0].cpu().numpy()
        target = np.where(blank, np.nan, first.target[0].T.cpu().numpy())
        output_bits = torch.cat(outputs, 1)[0].sigmoid().T.cpu().numpy()
        output_bits = np.where(blank, np.nan, output_bits)
    touched = int(state.touched[0])
    return Trace(first.input[0].T.cpu().numpy(), target, output_bits, writes, reads, touched)


def weights_over_time(accesses: Sequence[Access | None]) -> tuple[np.ndarray, np.ndarray]:
    """Write and read weights [slots, T], summed over heads, slots in order of first use.

    Only slots with a weight over `USED` at some step are kept.
    """
    kinds = ("write", "read")
    found: dict[str, dict[int, dict[int, float]]] = {kind: {} for kind in kinds}
    for step, access in enumerate(accesses):
        if access is None:
            continue
        for kind in kinds:
            ids = getattr(access, f"{kind}_ids")[0].flatten().tolist()
            weights = getattr(access, f"{kind}_weights")[0].flatten().tolist()
            for slot, weight in zip(ids, weights, strict=True):
                row = found[kind].setdefault(slot, {})
                row[step] = row.get(step, 0.0) + weight
    slots = _slots_shown(found["write"], found["read"])
    return (
        _picture(found["write"], slots, len(accesses)),
        _picture(found["read"], slots, len(accesses)),
    )


def _picture(table: dict[int, dict[int, float]], slots: list[int], steps: int) -> np.ndarray:
    picture = np.zeros((len(slots), steps))
    for place, slot in enumerate(slots):
        for step, weight in table.get(slot, {}).items():
            picture[place, step] = weight
    return picture


def _slots_shown(*tables: dict[int, dict[int, float]]) -> list[int]:
    """Slots used, at most `MOST_SLOTS` of the largest weights, in order of first use."""
    first: dict[int, int] = {}
    total: dict[int, float] = {}
    for table in tables:
        for slot, row in table.items():
            used = [step for step, weight in row.items() if weight > USED]
            if used:
                first[slot] = min(first.get(slot, used[0]), used[0])
                total[slot] = total.get(slot, 0.0) + sum(row.values())
    largest = sorted(first, key=lambda slot: (-total[slot], slot))[:MOST_SLOTS]
    return sorted(largest, key=lambda slot: (first[slot], slot))


# The pictures ------------------------------------------------------------------------


def memory_figure(trace: Trace, title: str) -> Figure:
    """Input, target, output, error, and the weights of writes and reads, over time."""
    panels = [Panel("Input", trace.input, "RdBu_r", -1.4, 1.4, "channel")]
    if trace.target is not None and trace.output is not None:
        panels += _bit_panels(trace.target, trace.output)
    if len(trace.writes):
        panels += [
            _weight_panel("Write weights", trace.writes, "Oranges"),
            _weight_panel("Read weights", trace.reads, "Blues"),
        ]
    with mpl.rc_context(STYLE):
        heights = [panel.height for panel in panels]
        figure = Figure(figsize=(8, 0.7 + sum(heights) * 0.085 + 0.3 * len(panels)))
        figure.set_layout_engine("constrained")
        grid = figure.subplots(
            len(panels), 2, squeeze=False, width_ratios=[50, 1], height_ratios=heights
        )
        for (axes, bar), panel in zip(grid, panels, strict=True):
            _draw_panel(figure, axes, bar, panel)
            axes.tick_params(labelbottom=panel is panels[-1])
        grid[-1, 0].set_xlabel("time step")
        touched = f"{trace.touched:,} slots touched in {trace.input.shape[1]} steps"
        figure.suptitle(f"{title}: {touched}", fontsize=11)
    return figure


def _bit_panels(target: np.ndarray, output: np.ndarray) -> list[Panel]:
    wrong = np.where(np.isnan(target), np.nan, (output > 0.5) != (target > 0.5))
    return [
        Panel("Target", target, "Greys", 0, 1, "bit"),
        Panel("Output (probability of a 1)", output, "Greys", 0, 1, "bit"),
        Panel(f"Error: {int(np.nansum(wrong))} wrong bits", wrong, "Reds", 0, 1, "bit"),
    ]


def _weight_panel(title: str, weights: np.ndarray, colours: str) -> Panel:
    # Several heads on one slot can add up to more than 1.
    return Panel(title, weights, colours, 0, max(1.0, weights.max()), SLOT)


def _draw_panel(figure: Figure, axes: Axes, bar: Axes, panel: Panel) -> None:
    image = axes.imshow(
        panel.data,
        cmap=mpl.colormaps[panel.colours].with_extremes(bad=BLANK),
        vmin=panel.low,
        vmax=panel.high,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(panel.title)
    axes.set_ylabel(panel.rows)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, cax=bar, ticks=[int(panel.low), int(panel.high)])


def learning_figure(records: Sequence[dict[str, Any]], metric_name: str, name: str) -> Figure:
    """Loss, metric and level over training steps, in training and in validation."""
    with mpl.rc_context({**STYLE, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(8, 5.4))
        figure.set_layout_engine("constrained")
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
        for axes, key in zip(panels, ("loss", "metric", "level"), strict=True):
            _draw_curve(axes, records, key, "train", color="tab:blue")
            if key != "level":
                _draw_curve(axes, records, key, "validation", color="tab:red", marker="o")
        panels[0].set(title=f"{name}: loss (nats a bit or answer)", yscale="log")
        panels[1].set(title=metric_name.capitalize())
        if metric_name == "wrong bits":
            panels[1].set(title="Wrong bits a sequence")
            panels[1].set_yscale("symlog", linthresh=0.1)  # reaches 0
        panels[1].set_ylim(bottom=0)
        panels[2].set(title="Level (mean)", xlabel="training step")
        panels[0].legend()
    return figure


def _draw_curve(
    axes: Axes, records: Sequence[dict[str, Any]], key: str, kind: str, **style: Any
) -> None:
    chosen = [record for record in records if record["kind"] == kind]
    steps, values = [r["step"] for r in chosen], [r[key] for r in chosen]
    axes.plot(steps, values, label=kind, linewidth=1.2, markersize=3, **style)

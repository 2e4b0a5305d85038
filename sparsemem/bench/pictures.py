"""Results as pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsemem.bench.results import Measured, Result
from sparsemem.bench.scaling import bytes_a_step, step_seconds
from sparsemem.bench.tables import TITLES

STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "figure.dpi": 150}
SIZE = (9.0, 3.8)
COLOURS = {
    "lstm": "#777777",
    "ntm": "#c44e52",
    "dnc": "#dd8452",
    "sam": "#4c72b0",
    "sdnc": "#55a868",
    "exact": "#777777",
    "ivf": "#4c72b0",
    "hnsw": "#c44e52",
    "product-key": "#55a868",
}


def scaling_pictures(result: Result) -> dict[str, bytes]:
    """PNG files by name: models.png and banks.png, each where there is something to show."""
    kinds = {point.kind for point in result.points}
    drawn = {}
    with mpl.rc_context(STYLE):
        if "model" in kinds:
            drawn["models.png"] = _png(_models(result))
        if "bank" in kinds:
            drawn["banks.png"] = _png(_banks(result))
    return drawn


def _models(result: Result) -> Figure:
    """Time and memory over slots, log-log, slopes in the legend; predictions dotted."""
    figure = Figure(figsize=SIZE, layout="constrained")
    times, memory = figure.subplots(1, 2)
    steps = result.settings["model"]["steps"]
    predicted = {
        name: [(s.size, s.predicted_seconds) for s in result.skipped if s.name == name]
        for name in TITLES
    }
    for name in [name for name in TITLES if any(p.name == name for p in result.points)]:
        points = [p for p in result.points if p.kind == "model" and p.name == name]
        label = _label(result, name, "step_seconds")
        _line(times, result, points, name, label, step_seconds, "step")
        guessed = [(n, s) for n, s in predicted[name] if s is not None]
        if guessed and points:
            start = (points[-1].size, step_seconds(points[-1]))
            times.plot(*zip(start, *guessed, strict=True), ":", color=COLOURS[name], linewidth=1)
        label = _label(result, name, "bytes_a_step")
        _line(memory, result, points, name, label, lambda p: steps * bytes_a_step(p) / 2**20)
    for axes, title, unit in (
        (times, "A step, forward and backward", "seconds"),
        (memory, f"Memory of {steps} steps", "MiB"),
    ):
        axes.set(title=title, xlabel="slots", ylabel=unit, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _banks(result: Result) -> Figure:
    """Time of a read over rows, and recall over the time of a query."""
    figure = Figure(figsize=SIZE, layout="constrained")
    times, recalls = figure.subplots(1, 2)
    queries = result.settings["bank"]["queries"]
    points = [p for p in result.points if p.kind == "bank"]
    for name in dict.fromkeys(p.name for p in points):
        of = [p for p in points if p.name == name]
        label = _label(result, name, "read_seconds")
        _line(times, result, of, name, label, lambda p: p.times["read"].median, "read")
        at = [1e6 * p.times["read"].median / queries for p in of]
        found = [p.figures["recall"] for p in of]
        recalls.plot(at, found, "-", color=COLOURS[name], label=name)
        areas = [12.0 * math.log10(p.size) ** 2 / 4 for p in of]
        recalls.scatter(at, found, areas, color=COLOURS[name], alpha=0.6, linewidths=0)
    times.set(title=f"A read of {queries} queries", xlabel="rows", ylabel="seconds")
    times.set(xscale="log", yscale="log")
    recalls.set(title="Recall at 8 (larger points: more rows)", xscale="log")
    recalls.set(xlabel="microseconds a query", ylabel="recall")
    recalls.set_ylim(min(0.9, recalls.get_ylim()[0]), 1.005)
    for axes in (times, recalls):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _line(
    axes: Axes,
    result: Result,
    points: list[Measured],
    name: str,
    label: str,
    value: Callable[[Measured], float],
    time: str | None = None,
) -> None:
    """Medians over sizes, with quartiles as bars; a level line for what has no sizes."""
    colour, values = COLOURS[name], [value(p) for p in points]
    if name == "lstm" and points:
        axes.axhline(values[0], color=colour, linewidth=1, linestyle="--", label=label)
        return
    bars = None
    if time is not None:
        spread = [p.times[time] for p in points]
        bars = [
            [s.median - s.lower_quartile for s in spread],
            [s.upper_quartile - s.median for s in spread],
        ]
    axes.errorbar(
        [p.size for p in points], values, bars, marker="o", markersize=3, color=colour, label=label
    )


def _label(result: Result, name: str, measure: str) -> str:
    """The series' name and its fitted slope."""
    title = TITLES.get(name, name)
    for fit in result.fits:
        if (fit.name, fit.measure) == (name, measure):
            return f"{title}: N^{round(fit.slope, 2) + 0.0:.2f}"
    return title


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()

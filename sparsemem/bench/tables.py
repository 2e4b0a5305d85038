"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from sparsemem.bench.results import (
    Measured,
    Result,
    Skipped,
    show_bytes,
    show_seconds,
    show_size,
)
from sparsemem.bench.scaling import bytes_a_step, step_seconds

TITLES = {"lstm": "LSTM", "ntm": "NTM", "dnc": "DNC", "sam": "SAM", "sdnc": "SDNC"}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def scaling_markdown(result: Result) -> str:
    """Models, banks, slopes, and what was left out; each part where there is something to say."""
    lines = [f"Measured on {result.machine['cpu']}; medians of interleaved repetitions."]
    points = [p for p in result.points if p.kind == "model"]
    if points:
        lines += ["", *_models(result, points)]
    banks = [p for p in result.points if p.kind == "bank"]
    if banks:
        lines += ["", *_banks(result, banks)]
    if result.fits:
        lines += ["", *_slopes(result)]
    if result.skipped:
        lines += ["", "Left out:", ""]
        lines += _left_out(result.skipped)
    return "\n".join(lines) + "\n"


def _models(result: Result, points: list[Measured]) -> list[str]:
    """Time and memory of a step, N by model; predictions in parentheses."""
    settings = result.settings["model"]
    steps = settings["steps"]
    left_out = [s for s in result.skipped if s.kind == "model"]
    names = [name for name in TITLES if any(p.name == name for p in points)]
    sizes = sorted({p.size for p in points} | {s.size for s in left_out})
    columns = ["slots", *(TITLES[name] for name in names)]

    def rows(
        value: Callable[[Measured], float], guess: Callable[[Skipped], float | None], show: Show
    ) -> list[list[str]]:
        return [
            [
                show_size(size),
                *(_cell(points, left_out, n, size, value, guess, show) for n in names),
            ]
            for size in sizes
        ]

    return [
        f"A step, forward and backward (batch {settings['batch']}, {settings['heads']} heads,"
        f" K={settings['top_k']}, width {settings['width']}, LSTM {settings['hidden']}):",
        "",
        *table(columns, rows(step_seconds, lambda s: s.predicted_seconds, show_seconds)),
        "",
        f"Memory of {steps} steps, beyond parameters and their gradients:",
        "",
        *table(columns, rows(lambda p: steps * bytes_a_step(p), lambda s: None, show_bytes)),
        "",
        "In parentheses: predicted, not measured." + _fewer(points, steps),
    ]


Show = Callable[[float], str]


def _cell(
    points: list[Measured],
    left_out: list[Skipped],
    name: str,
    size: int,
    value: Callable[[Measured], float],
    guess: Callable[[Skipped], float | None],
    show: Show,
) -> str:
    """What was measured, else what was predicted, in parentheses."""
    for point in points:
        if (point.name, point.size) == (name, size):
            return show(value(point))
    for skipped in left_out:
        guessed = guess(skipped)
        if (skipped.name, skipped.size) == (name, size) and guessed is not None:
            return f"({show(guessed)})"
    return ""


def _fewer(points: list[Measured], steps: int) -> str:
    """Which points had fewer steps than asked for."""
    fewer = [f"{TITLES[p.name]} {show_size(p.size)}: {p.steps}" for p in points if p.steps != steps]
    return f" Scaled up from passes of fewer steps: {', '.join(fewer)}." if fewer else ""


def _banks(result: Result, points: list[Measured]) -> list[str]:
    settings = result.settings["bank"]
    rows = [
        [
            show_size(p.size),
            p.name,
            show_seconds(p.times["read"].median),
            show_seconds(p.times["update"].median),
            f"{p.figures['recall']:.3f}",
            show_seconds(p.figures["build_seconds"]),
            show_bytes(p.figures["peak_rss_bytes"]),
        ]
        for p in sorted(points, key=lambda p: (p.size, p.name))
    ]
    columns = ["rows", "index", "read", "update", "recall", "built in", "peak memory"]
    return [
        f"Banks of width {settings['width']}: reads of {settings['queries']} queries, top 8, and"
        f" updates of {settings['queries']} rows; recall floor {settings['min_recall']}:",
        "",
        *table(columns, rows),
    ]


def _left_out(skipped: list[Skipped]) -> list[str]:
    """A line for each series: the sizes, and why the first was."""
    lines = []
    for name in dict.fromkeys(s.name for s in skipped):
        of = [s for s in skipped if s.name == name]
        sizes = ", ".join(show_size(s.size) for s in of)
        lines.append(f"- {TITLES.get(name, name)}, N = {sizes}: {of[0].reason}")
    return lines


def _slopes(result: Result) -> list[str]:
    rows = [
        [
            TITLES.get(f.name, f.name),
            f.measure.replace("_", " "),
            f"{round(f.slope, 3) + 0.0:.3f}" + ("" if f.error is None else f" +- {f.error:.3f}"),
            f"{show_size(f.sizes[0])} .. {show_size(f.sizes[-1])}",
        ]
        for f in result.fits
    ]
    return ["Exponents in N:", "", *table(["", "of", "slope", "over N"], rows)]


def peers_markdown(result: Result, groups: Mapping[str, Sequence[str]]) -> str:
    """What each takes, and how many times that of ours; why some were not measured."""
    by_name = {p.name: p for p in result.points}
    reasons = {s.name: s.reason for s in result.skipped}
    lines = [f"Measured on {result.machine['cpu']}; medians of interleaved repetitions."]
    columns = ["", "N", "a step", "times ours", "peak memory"]
    for group in result.settings["groups"]:
        ours = by_name.get(groups[group][0])
        rows = []
        for name in groups[group]:
            point = by_name.get(name)
            if point is None:
                rows.append([name, "", f"not measured: {reasons.get(name, '')}", "", ""])
                continue
            seconds = step_seconds(point)
            times = "" if ours is None else f"{seconds / step_seconds(ours):.3g}"
            peak = show_bytes(point.figures["peak_rss_bytes"])
            rows.append([name, show_size(point.size), show_seconds(seconds), times, peak])
        lines += ["", *table(columns, rows)]
    return "\n".join(lines) + "\n"

"""What changed between two results, beyond the noise that both of them show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sparsemem.bench.measuring import Summary
from sparsemem.bench.results import Measured, Result, show_size

FIGURE_NOISE = 0.02  # figures that are found once, such as peaks of memory, repeat this well
PROVENANCE = ("cpu", "memory", "torch", "python", "numba", "faiss-cpu")


class Change(NamedTuple):
    """One measure of one point: B by A, with the interval that noise leaves.

    The interval goes from lower quartile by upper quartile to the opposite: ratios that single
    repetitions of both runs ordinarily show. It does not shrink with repetitions, because runs
    differ by what the machine did that day more than by how often they looked.
    """

    point: str
    measure: str
    ratio: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether no change is outside of the interval."""
        return not self.low <= 1 <= self.high

    def line(self) -> str:
        """For people: 0.80 is 1.25 times as good, in time or space."""
        verdict = ("less" if self.ratio < 1 else "more") if self.beyond_noise else "within noise"
        return (
            f"{self.point}, {self.measure}: {self.ratio:.3f}"
            f" ({self.low:.3f} .. {self.high:.3f}) {verdict}"
        )


def time_change(point: str, measure: str, a: Summary, b: Summary) -> Change:
    """Of two series of repetitions."""
    low = b.lower_quartile / a.upper_quartile
    high = b.upper_quartile / a.lower_quartile
    return Change(point, measure, b.median / a.median, low, high)


def figure_change(point: str, measure: str, a: float, b: float) -> Change:
    """Of two figures, each found once."""
    ratio = b / a if a else float("inf") if b else 1.0
    return Change(point, measure, ratio, ratio / (1 + FIGURE_NOISE), ratio * (1 + FIGURE_NOISE))


def changes(a: Result, b: Result) -> list[Change]:
    """Every measure that both results have of the same point."""
    there = {point.key: point for point in b.points}
    return [
        change
        for point in a.points
        if point.key in there
        for change in _of_point(point, there[point.key])
    ]


def _of_point(a: Measured, b: Measured) -> Iterator[Change]:
    name = f"{a.kind} {a.name} N={show_size(a.size)}"
    for measure in a.times.keys() & b.times.keys():
        yield time_change(name, f"{measure} time", a.times[measure], b.times[measure])
    for measure in sorted(a.figures.keys() & b.figures.keys()):
        if measure.endswith("_seconds"):
            continue  # built once, without a spread to judge it by
        # A peak is that of a pass: passes of other lengths are compared by the step.
        scale = (a.steps or 1) / (b.steps or 1) if measure.endswith("_bytes") else 1.0
        label = measure.replace("_", " ")
        yield figure_change(name, label, a.figures[measure], scale * b.figures[measure])


def unmatched(a: Result, b: Result) -> list[str]:
    """Points that only one of them has."""
    ours, theirs = ({point.key for point in result.points} for result in (a, b))
    return [f"only in A: {key}" for key in sorted(ours - theirs)] + [
        f"only in B: {key}" for key in sorted(theirs - ours)
    ]


def differing_grounds(a: Result, b: Result) -> list[str]:
    """Machines, versions and settings that differ, so that a change may be theirs."""
    lines = [
        f"{key} differs: {a.machine.get(key)} and {b.machine.get(key)}"
        for key in PROVENANCE
        if a.machine.get(key) != b.machine.get(key)
    ]
    for key in sorted(a.settings.keys() & b.settings.keys() - {"budget_minutes", "repetitions"}):
        if a.settings[key] != b.settings[key]:
            lines.append(f"{key} differs: {a.settings[key]} and {b.settings[key]}")
    return lines

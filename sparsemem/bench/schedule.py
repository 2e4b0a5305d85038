"""Measuring many points in turns within a budget; what would not fit into it is predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from sparsemem.bench.budget import Budget, Cost, predicted
from sparsemem.bench.measuring import Summary, available_bytes
from sparsemem.bench.results import Measured, Skipped, show_bytes, show_seconds
from sparsemem.bench.workers import Point, Worker, WorkerError

SPARE = 0.8  # share of the memory available that a point may take
RESIDENT = 1.3  # memory that a process takes for a byte of tensors at their peak, at most
PROCESS_BYTES = 300 * 2**20  # of a process that has imported everything
FEWEST_REPETITIONS = 5  # that a budget must allow before a point is begun
FEWEST_STEPS = 3
FIRST_STEPS = 10  # of a flexible series, of which nothing is known yet
PASS_SHARE = 0.005  # of the budget that one pass may take, where its steps can be cut down


@runtime_checkable
class Measurer(Protocol):
    """A `Worker`, or what stands for one in a test."""

    def made(self, limit: float) -> dict[str, float]:
        """Figures, once the point is ready."""

    def measure(self, limit: float) -> dict[str, float]:
        """Seconds of each of its functions."""

    def close(self) -> None:
        """End it."""


class Series(NamedTuple):
    """The same work at growing sizes.

    order: how its cost grows with the size, in theory, as an exponent. units: steps (or batches)
    in a repetition; those of a `flexible` series are cut down where they would not fit.
    """

    kind: Literal["model", "bank", "peer"]
    name: str
    sizes: tuple[int, ...]
    order: float
    units: int
    flexible: bool
    point: Callable[[int, int], Point]  # from size and units


class Listener(NamedTuple):
    """Who hears of progress: lines, the number of turns, and each turn."""

    say: Callable[[str], object]
    total: Callable[[int], object]
    advance: Callable[[], object]


class Running:
    """A point that is measured again and again."""

    def __init__(self, series: Series, size: int, units: int, worker: Measurer) -> None:
        self.series, self.size, self.units, self.worker = series, size, units, worker
        self.figures: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}

    def begin(self, limit: float) -> None:
        """Wait until it is made."""
        self.figures = self.worker.made(limit)

    def repeat(self, limit: float) -> None:
        """One more repetition."""
        for name, seconds in self.worker.measure(limit).items():
            self.times.setdefault(name, []).append(seconds / self.units)

    @property
    def repetition(self) -> float:
        """Seconds of the last repetition."""
        return sum(values[-1] for values in self.times.values()) * self.units

    @property
    def peak(self) -> float:
        """Bytes at the peak: of tensors where they are told, else of the process."""
        return self.figures.get("peak_tensor_bytes", self.figures.get("peak_rss_bytes", 0.0))

    def measured(self) -> Measured:
        """What was found."""
        model = self.series.kind != "bank"
        return Measured(
            kind=self.series.kind,
            name=self.series.name,
            size=self.size,
            steps=self.units if model else None,
            times={
                "step" if model else name: Summary.of(values) for name, values in self.times.items()
            },
            figures={k: v for k, v in self.figures.items() if k != "make_seconds"},
        )


class Schedule:
    """Points of several series, from small to large, then all of them in turns.

    Those whose cost does not grow come first, so that the others cannot use up the budget.
    Each point is in a process of its own, which waits while others are measured.
    """

    def __init__(
        self,
        series: list[Series],
        budget: Budget,
        repetitions: int,
        start: Callable[[Point], Measurer] = Worker,
        memory: Callable[[], float] = available_bytes,
        say: Callable[[str], object] = print,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self.series, self.budget, self.repetitions = series, budget, repetitions
        self._start, self._memory, self._say, self._advance = start, memory, say, advance
        self._history: dict[str, list[tuple[int, Cost]]] = {s.name: [] for s in series}
        self._running: list[Running] = []
        self._imports = 0.0  # seconds that a process takes before it makes anything
        self.measured: list[Measured] = []
        self.skipped: list[Skipped] = []

    def run(self) -> None:
        """Measure what fits; `measured` and `skipped` then say what was and what was not."""
        turns = sorted(
            (s.order > 0, size, number) for number, s in enumerate(self.series) for size in s.sizes
        )
        try:
            for _, size, number in turns:
                self._try(self.series[number], size)
                self._advance()
            self._take_turns(self.repetitions)
        finally:
            for running in self._running:
                running.worker.close()

    def _try(self, series: Series, size: int) -> None:
        """Begin a point, unless it is predicted not to fit."""
        cost = predicted(self._history[series.name], size, series.order)
        units = self._units(series, cost)
        reason = self._refusal(cost, units)
        if reason is not None and cost is not None and "memory" in reason and self._running:
            self._take_turns(FEWEST_REPETITIONS)  # these then give their memory back
            reason = self._refusal(cost, units)
        if reason is None:
            reason = self._begin(series, size, units)
        if reason is not None:
            self._skip(series, size, units, cost, reason)

    def _units(self, series: Series, cost: Cost | None) -> int:
        """Steps of a pass: all, or as many as time and memory allow."""
        if not series.flexible:
            return series.units
        if cost is None:
            return min(series.units, FIRST_STEPS)
        by_time = PASS_SHARE * self.budget.limit / max(cost.unit, 1e-9)
        by_memory = SPARE * self._memory() / (RESIDENT * max(cost.bytes, 1.0))
        return int(max(min(series.units, by_time, by_memory), FEWEST_STEPS))

    def _refusal(self, cost: Cost | None, units: int) -> str | None:
        """Why a point would not fit; None if it would."""
        if cost is None:
            return None if self.budget.left > 0 else "the budget is spent"
        needed = cost.bytes * units * RESIDENT + PROCESS_BYTES
        there = self._memory()
        if needed > SPARE * there:
            return f"needs {show_bytes(needed)} of memory, {show_bytes(there)} are available"
        turns = sum(running.repetition for running in self._running) + cost.unit * units
        start = self._imports + cost.start
        if start + FEWEST_REPETITIONS * turns > self.budget.left:
            return (
                f"would take {show_seconds(start + FEWEST_REPETITIONS * cost.unit * units)},"
                f" with the others' turns more than the {max(self.budget.left, 0):.0f} s left"
            )
        return None

    def _begin(self, series: Series, size: int, units: int) -> str | None:
        """Start a point's process and measure once; why it failed, or None."""
        begun = self.budget.spent
        try:
            worker = self._start(series.point(size, units))
        except WorkerError as error:
            return str(error)
        running = Running(series, size, units, worker)
        try:
            running.begin(self.budget.left)
            running.repeat(self.budget.left)
        except WorkerError as error:
            running.worker.close()
            return str(error)
        start = running.figures.get("make_seconds", 0.0)
        took = self.budget.spent - begun - running.repetition
        self._imports = max(self._imports, took - start)
        cost = Cost(start, running.repetition / units, running.peak / units)
        self._history[series.name].append((size, cost))
        self._running.append(running)
        self._say(
            f"{series.name} N={size}: {show_seconds(cost.unit)} a"
            f" {'batch' if series.kind == 'bank' else 'step'}, peak {show_bytes(running.peak)}"
        )
        return None

    def _skip(self, series: Series, size: int, units: int, cost: Cost | None, reason: str) -> None:
        self.skipped.append(
            Skipped(
                kind=series.kind,
                name=series.name,
                size=size,
                reason=reason,
                predicted_seconds=None if cost is None else cost.unit,
                predicted_bytes=None if cost is None else cost.bytes * units,
            )
        )
        self._say(f"{series.name} N={size}: left out, {reason}")

    def _take_turns(self, repetitions: int) -> None:
        """Repeat all that are running, in turns, while the budget lasts; then end them."""
        for _ in range(repetitions - 1):  # the first was when they began
            for running in list(self._running):
                if running.repetition > self.budget.left:
                    continue
                try:
                    running.repeat(self.budget.left)
                except WorkerError as error:
                    self._say(f"{running.series.name} N={running.size}: {error}")
                    self._finish(running)
            self._advance()
        for running in list(self._running):
            self._finish(running)

    def _finish(self, running: Running) -> None:
        self._running.remove(running)
        self.measured.append(running.measured())
        running.worker.close()


def measure(
    groups: Sequence[list[Series]],
    shares: Sequence[float],
    budget: Budget,
    repetitions: int,
    start: Callable[[Point], Measurer],
    listener: Listener,
) -> tuple[list[Measured], list[Skipped]]:
    """Measure groups of series one after the other; each takes its share of what time is left."""
    sizes = sum(len(series.sizes) for group in groups for series in group)
    listener.total(sizes + len(groups) * (repetitions - 1))
    measured, skipped = [], []
    for group, share in zip(groups, shares, strict=True):
        schedule = Schedule(
            group,
            budget.part(share),
            repetitions,
            start=start,
            say=listener.say,
            advance=listener.advance,
        )
        schedule.run()
        measured += schedule.measured
        skipped += schedule.skipped
    return measured, skipped

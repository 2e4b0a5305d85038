"""How time and memory grow with memory size: models over slots, banks over rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sparsemem.bench.budget import Budget
from sparsemem.bench.fits import fitted
from sparsemem.bench.measuring import machine
from sparsemem.bench.points import (
    BATCHES,
    MODEL_ORDERS,
    BankKind,
    BankPoint,
    BankSettings,
    Count,
    ModelPoint,
    ModelSettings,
)
from sparsemem.bench.results import Fit, Measured, Result
from sparsemem.bench.schedule import Listener, Series, measure
from sparsemem.bench.workers import Point, Worker

MODEL_SHARE = 0.6  # of the budget, where there are banks too
BANK_SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
FACTOR = 4  # from size to size


class ScalingSettings(BaseModel):
    """What `sparsemem bench scaling` measures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = tuple(MODEL_ORDERS)
    sizes: tuple[int, ...] = ()
    banks: tuple[BankKind, ...] = ("exact", "ivf", "hnsw", "product-key")
    bank_sizes: tuple[int, ...] = BANK_SIZES
    budget_minutes: Annotated[float, Field(gt=0)] = 10.0
    repetitions: Count = 21
    threads: Count = 1
    model: ModelSettings = ModelSettings()
    bank: BankSettings = BankSettings()


def powers(minimum: int, maximum: int, factor: int = FACTOR) -> tuple[int, ...]:
    """minimum, minimum * factor, ... up to maximum."""
    sizes = []
    while minimum <= maximum:
        sizes.append(minimum)
        minimum *= factor
    return tuple(sizes)


def model_series(settings: ScalingSettings) -> list[Series]:
    """The models over numbers of slots; one without slots is measured once."""
    made = []
    for name in settings.models:
        order, sizes = MODEL_ORDERS[name], tuple(sorted(settings.sizes))
        made.append(
            Series(
                kind="model",
                name=name,
                sizes=sizes[:1] if name == "lstm" else sizes,
                order=order,
                units=settings.model.steps,
                flexible=order > 0,
                point=partial(_model_point, name, settings.model),
            )
        )
    return made


def _model_point(name: str, settings: ModelSettings, size: int, units: int) -> ModelPoint:
    return ModelPoint(name, size, units, settings)


def bank_series(settings: ScalingSettings) -> list[Series]:
    """The kinds of index over numbers of rows."""
    return [
        Series(
            kind="bank",
            name=kind,
            sizes=tuple(sorted(settings.bank_sizes)),
            order=1.0,
            units=BATCHES,
            flexible=False,
            point=partial(_bank_point, kind, settings.bank),
        )
        for kind in settings.banks
    ]


def _bank_point(kind: str, settings: BankSettings, size: int, units: int) -> BankPoint:
    return BankPoint(kind, size, settings)


def scaling(settings: ScalingSettings, listener: Listener) -> Result:
    """Measure, within the budget."""
    budget, started = Budget(60 * settings.budget_minutes), time.perf_counter()
    groups = [group for group in (model_series(settings), bank_series(settings)) if group]
    shares = [MODEL_SHARE, 1.0][2 - len(groups) :]
    start = partial(_worker, settings.threads)
    points, skipped = measure(groups, shares, budget, settings.repetitions, start, listener)
    return Result(
        benchmark="scaling",
        machine=machine(threads=settings.threads),
        settings=settings.model_dump(mode="json"),
        seconds=time.perf_counter() - started,
        points=sorted(points, key=lambda p: (p.kind != "model", p.name, p.size)),
        skipped=skipped,
        fits=fits(points),
    )


def _worker(threads: int, point: Point) -> Worker:
    return Worker(point, threads)


def bytes_a_step(point: Measured) -> float:
    """Peak of tensors by the steps of the pass."""
    return point.figures.get("peak_tensor_bytes", 0.0) / (point.steps or 1)


def step_seconds(point: Measured) -> float:
    """Median of a step."""
    return point.times["step"].median


def fits(points: Sequence[Measured]) -> list[Fit]:
    """Slopes of time and memory of each model, and of the reads of each bank."""
    found: list[Fit | None] = []
    for name in dict.fromkeys(p.name for p in points if p.kind == "model"):
        of = [p for p in points if p.kind == "model" and p.name == name]
        order = MODEL_ORDERS[name]
        found.append(fitted(of, "step_seconds", step_seconds, order))
        found.append(fitted(of, "bytes_a_step", bytes_a_step, order))
    for name in dict.fromkeys(p.name for p in points if p.kind == "bank"):
        of = [p for p in points if p.kind == "bank" and p.name == name]
        for work in ("read", "update"):
            found.append(fitted(of, f"{work}_seconds", partial(_batch_seconds, work), 1.0))
    return [fit for fit in found if fit is not None]


def _batch_seconds(work: str, point: Measured) -> float:
    return point.times[work].median

"""Figures of shards and of runs for Prometheus, by Ray's metrics.

Each node's agent serves them (ray[default]; at `ray start --metrics-export-port`), with `ray_`
before their names. It forgets a gauge that it is not told again within 20 seconds, so a thread
tells it every few seconds, also while nothing is called. Calls are counted as plain numbers in
between: less than a microsecond each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

EVERY_SECONDS = 5.0
# The end of a gauge's name: which of `MemoryBank.stats` it shows, and what that is.
SHARD_GAUGES = {
    "rows": ("num_rows", "Rows of the shard, live or not"),
    "rows_live": ("num_live", "Rows that can be found"),
    "rows_frozen": ("num_frozen", "Rows that take no gradient and do not give way"),
    "table_bytes": ("table_bytes", "Bytes of rows and book, if all of their pages were touched"),
    "index_bytes": ("bytes", "Bytes of the index"),
    "buffered": ("buffered", "Changed rows that the index has not absorbed"),
    "recall": ("recall", "Recall of the index, measured on live queries"),
    "imbalance": ("imbalance", "How unevenly the index's lists are filled; 1: all alike"),
    "rebuilds": ("rebuilds", "How often the index was built anew"),
}


class ShardMetrics:
    """What a shard holds, how often it is called, and for how long.

    Args:
        bank: the sharded bank's folder; with `shard` a tag of every figure.
        shard: the shard's number.
        stats: what the shard's bank says of itself.
    """

    def __init__(self, bank: str, shard: int, stats: Callable[[], Mapping[str, Any]]) -> None:
        tags, self._stats = {"bank": bank, "shard": str(shard)}, stats
        self._gauges = {
            key: _gauge(f"sparsemem_shard_{name}", what, tags)
            for name, (key, what) in SHARD_GAUGES.items()
        }
        calls = "sparsemem_shard_calls", "Calls answered"
        seconds = "sparsemem_shard_call_seconds", "Seconds spent on calls that were answered"
        self._calls, self._seconds = (
            Counter(*named, (*tags, "operation")).set_default_tags(tags)
            for named in (calls, seconds)
        )
        self._counted: dict[str, tuple[int, float]] = {}  # since the last report: calls, seconds
        self._lock = threading.Lock()
        repeat(self._report)

    def count(self, operation: str, seconds: float) -> None:
        """A call was answered."""
        with self._lock:
            calls, before = self._counted.get(operation, (0, 0.0))
            self._counted[operation] = calls + 1, before + seconds

    def _report(self) -> None:
        stats = self._stats()
        for key, gauge in self._gauges.items():
            gauge.set(stats[key])  # None, for what is not known yet, is left out
        with self._lock:
            counted, self._counted = self._counted, {}
        for operation, (calls, seconds) in counted.items():
            self._calls.inc(calls, {"operation": operation})
            self._seconds.inc(seconds, {"operation": operation})


class RunMetrics:
    """How far a run has got. For one process of it.

    Args:
        run: the run's folder; a tag of every figure.
    """

    def __init__(self, run: str) -> None:
        tags = {"run": run}
        self._step = _gauge("sparsemem_run_step", "Steps done", tags)
        self._loss = _gauge("sparsemem_run_loss", "Training loss, as the log has it", tags)
        self._last: tuple[int, float] | None = None
        repeat(self._tell)

    def report(self, step: int, loss: float) -> None:
        """What the log says."""
        self._last = step, loss
        self._tell()

    def _tell(self) -> None:
        if self._last is not None:
            step, loss = self._last
            self._step.set(step)
            self._loss.set(loss)


def repeat(report: Callable[[], None]) -> None:
    """Call it in the background, every few seconds for as long as the process lives."""

    def run() -> None:
        while True:
            report()
            time.sleep(EVERY_SECONDS)

    threading.Thread(target=run, daemon=True, name="metrics").start()


def _gauge(name: str, what: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(name, what, tuple(tags))
    gauge.set_default_tags(tags)
    return gauge

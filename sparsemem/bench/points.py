"""What is measured: a model at one memory size, a bank at one number of rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sparsemem.bench.measuring import process_bytes, reset_peak, tensor_peak
from sparsemem.bench.workers import Made
from sparsemem.models.base import MemoryModel
from sparsemem.models.registry import make_model, model_options

# How time and memory of a step grow with the number of slots, as an exponent.
MODEL_ORDERS = {"lstm": 0.0, "sam": 0.0, "sdnc": 0.0, "ntm": 1.0, "dnc": 2.0}
WARM_SLOTS, WARM_STEPS = 64, 2
CLUSTERS, SPREAD = 2_000, 0.5
ROWS_AT_ONCE = 65_536
TOP_K = 8
BATCHES = 10  # of queries, or of rows to write, in one repetition
LIVE_BATCHES = 8  # that an index is tuned for before it is measured
INDEX_WAIT = 0.02


Count = Annotated[int, Field(ge=1)]


class ModelSettings(BaseModel):
    """Sizes of the work of models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: Count = 8
    steps: Count = 100
    heads: Count = 4
    top_k: Count = 4
    width: Count = 32
    hidden: Count = 100
    inputs: Count = 8


class BankSettings(BaseModel):
    """Sizes of the work of banks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    queries: Count = 64
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.95


def benched_model(name: str, slots: int, settings: ModelSettings) -> MemoryModel:
    """A model of these sizes, as far as it has such an option."""
    sizes = {
        "input_size": settings.inputs,
        "output_size": settings.inputs,
        "hidden_size": settings.hidden,
        "num_slots": slots,
        "slot_dim": settings.width,
        "num_heads": settings.heads,
        "top_k": settings.top_k,
    }
    known = model_options(name)
    return make_model(name, **{key: value for key, value in sizes.items() if key in known})


def forward_backward(model: MemoryModel, settings: ModelSettings, steps: int) -> None:
    """One training step's work on random sequences, without the optimiser."""
    output, _ = model(torch.randn(settings.batch, steps, settings.inputs))
    output.square().mean().backward()


class ModelPoint(NamedTuple):
    """Forward and backward passes of a model with `slots` slots over `steps` steps."""

    model: str
    slots: int
    steps: int
    settings: ModelSettings

    def make(self) -> Made:
        """Build and warm up; figures: peak_tensor_bytes and peak_rss_bytes of one pass.

        Tensors: those alive at once beyond parameters and their gradients. Resident memory:
        beyond what a process holds that has run the same model with few slots.
        """
        small = benched_model(self.model, min(WARM_SLOTS, self.slots), self.settings)
        forward_backward(small, self.settings, WARM_STEPS)
        del small
        gc.collect()
        resident = process_bytes("VmRSS")
        reset_peak()
        model = benched_model(self.model, self.slots, self.settings)
        work = partial(forward_backward, model, self.settings, self.steps)
        work()
        rss = max(process_bytes("VmHWM") - resident, 0)
        figures = {"peak_tensor_bytes": float(tensor_peak(work)), "peak_rss_bytes": float(rss)}
        return Made(figures, {"pass": work})


BankKind = Literal["exact", "ivf", "hnsw", "product-key"]


def index_name(kind: str, rows: int) -> str:
    """The index of a kind for a number of rows: 4 sqrt(N) inverted lists, HNSW with 32 links."""
    if kind == "ivf":
        return f"IVF{max(1, 4 * isqrt(rows))},Flat"
    return "HNSW32" if kind == "hnsw" else kind


class BankPoint(NamedTuple):
    """Reads and updates of a bank with `rows` live rows; BATCHES of each in a repetition."""

    kind: str
    rows: int
    settings: BankSettings

    @property
    def num_rows(self) -> int:
        """The rows it has: with product keys, the square next below `rows`."""
        return isqrt(self.rows) ** 2 if self.kind == "product-key" else self.rows

    def make(self) -> Made:
        """Fill the bank, wait for its index, and tune it; figures: recall, memory, what it built.

        peak_rss_bytes is beyond a process that has used a small bank.
        """
        from sparsemem import MemoryBank  # imports FAISS

        small = MemoryBank(WARM_SLOTS, self.settings.width)
        small.append(torch.randn(WARM_SLOTS, self.settings.width))
        small.read(torch.randn(self.settings.queries, self.settings.width), TOP_K)
        resident, start = process_bytes("VmRSS"), time.perf_counter()
        reset_peak()
        bank, near = self._filled(MemoryBank)
        while getattr(bank.index, "current", bank) is None:
            if self.num_rows < getattr(bank.index, "exact_below", 0):
                break  # so few rows are scanned, there is no index to wait for
            time.sleep(INDEX_WAIT)
        queries = partial(queries_near, near, self.settings.queries, _generator(1))
        for _ in range(LIVE_BATCHES):
            bank.read(queries(), TOP_K)
        built = time.perf_counter() - start
        figures = {
            "build_seconds": built,
            "recall": recall(bank, queries()),
            "peak_rss_bytes": float(max(process_bytes("VmHWM") - resident, 0)),
        }
        return Made(figures, {"read": self._read(bank, queries), "update": self._update(bank)})

    def _filled(self, bank_type: Any) -> tuple[Any, Tensor]:
        """The bank, and some of its rows, which queries are drawn near to."""
        settings = self.settings
        if self.kind == "product-key":
            bank = bank_type(
                self.num_rows,
                settings.width,
                settings.width,
                index=self.kind,
                metric="ip",  # what product keys can be compared by
                initial="normal",
            )
            ids = torch.randint(self.num_rows, (4096,), generator=_generator(2))
            return bank, bank.gather(ids).detach()
        bank = bank_type(
            self.num_rows,
            settings.width,
            index=index_name(self.kind, self.num_rows),
            min_recall=settings.min_recall,
        )
        rows = clustered(self.num_rows, settings.width)
        bank.write(torch.arange(self.num_rows), rows)
        return bank, rows[:: max(1, len(rows) // 4096)].clone()

    def _read(self, bank: Any, queries: Callable[[], Tensor]) -> Callable[[], object]:
        def work() -> None:
            for _ in range(BATCHES):
                bank.read(queries(), TOP_K)

        return work

    def _update(self, bank: Any) -> Callable[[], object]:
        """Overwrite as many random rows as there are queries in a batch."""
        generator, count = _generator(3), self.settings.queries

        def work() -> None:
            for _ in range(BATCHES):
                ids = torch.unique(torch.randint(self.num_rows, (count,), generator=generator))
                rows = torch.randn(len(ids), self.settings.width, generator=generator)
                bank.write(ids, *((None, rows) if self.kind == "product-key" else (rows, None)))

        return work


def recall(bank: Any, queries: Float[Tensor, "Q W"]) -> float:
    """The share of the best rows, by a scan of all rows, that a read finds."""
    from sparsemem.indexes.exact import scan

    with torch.no_grad():
        found = bank.read(queries, TOP_K).ids
        with bank.table.lock.read():
            truth = scan(bank.table, bank.metric, queries, TOP_K).ids
    same = (found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-1)
    return float(same.float().mean())


def clustered(count: int, width: int, seed: int = 0) -> Float[Tensor, "count W"]:
    """Rows of normal noise around 2,000 normal centres: clustered, as learned embeddings are."""
    generator = _generator(seed)
    centres = torch.randn(CLUSTERS, width, generator=generator)
    rows = torch.randn(count, width, generator=generator).mul_(SPREAD)
    # In place and in parts: the benchmarks are to fit into memory.
    for start in range(0, count, ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        part += centres[torch.randint(CLUSTERS, (len(part),), generator=generator)]
    return rows


def queries_near(
    rows: Float[Tensor, "n W"], count: int, generator: torch.Generator
) -> Float[Tensor, "count W"]:
    """A batch of queries, each near one of the rows."""
    near = rows[torch.randint(len(rows), (count,), generator=generator)]
    return near + 0.1 * torch.randn(near.shape, generator=generator)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

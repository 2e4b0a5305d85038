"""FAISS over tensors where they are: the one place that talks to FAISS GPU.

Vectors and results are handed over by address, so that nothing passes through the host but the
sample that lists are trained on. FAISS GPU can add and search, and neither update nor remove; it
ignores selectors silently, and takes at most 2,048 as k or as nprobe.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.kinds import (
    Knob,
    faiss_module,
    is_quantised,
    knob_of,
    new_faiss_index,
    search_parameters,
)
from sparsemem.indexes.metrics import Metric

MOST = 2_048  # k, and nprobe
TEMPORARY_BYTES = 2**28  # FAISS's own choice would be 1.5 GiB an index
PARTS = {
    1,
    2,
    3,
    4,
    8,
    12,
    16,
    20,
    24,
    28,
    32,
    40,
    48,
    56,
    64,
}  # codes a row that PQ has kernels for
KNOWN = re.compile(r"Flat|IVF\d+,(Flat|SQ8|SQfp16|PQ(?P<parts>\d+)(x8)?(np)?)")
SERVED = "'Flat' and 'IVFn' with 'Flat', 'SQ8', 'SQfp16' or 'PQm'"


class Engine:
    """A FAISS index that is trained on, filled with and asked by tensors of one device.

    Every vector that is added has a *label*, by number, of which none is given twice, whatever
    fails. Vectors are contiguous float32 (`kinds.comparable`). Calls may come from any thread.
    This class itself is FAISS on a CPU.
    """

    def __init__(self, name: str, width: int, metric: Metric, device: torch.device) -> None:
        self.device = device
        self.metric = metric
        self.next_label = 0
        self._model = new_faiss_index(name, width, metric)  # trained, on the CPU, always empty
        self._index: Any = None  # what is filled and searched
        self._lock = threading.Lock()
        knob = knob_of(self._model)
        self.knob = Knob(knob.name, min(knob.limit, MOST))
        self.quantised = is_quantised(self._model)
        self._lists = faiss_module().try_extract_index_ivf(self._model)

    @staticmethod
    def there() -> bool:
        """Whether it can work on this machine."""
        return True

    @property
    def num_lists(self) -> int:
        """Inverted lists; 0 where there are none."""
        return 0 if self._lists is None else int(self._lists.nlist)

    def train(self, sample: Float[Tensor, "n W"]) -> Float[Tensor, "L W"] | None:
        """Find lists and codes that suit a sample; returns the lists' centroids, if any.

        The one thing that goes through the host: parts of the training are done there.
        """
        with self._turn():
            self._train(sample.cpu().numpy())
            self._index = self._placed()
        if self._lists is None:
            return None
        centroids = self._lists.quantizer.reconstruct_n(0, self.num_lists)
        return torch.from_numpy(centroids).to(self.device)

    def add(self, vectors: Float[Tensor, "n W"]) -> None:
        """Enter vectors; their labels are the next."""
        first, count = self.next_label, len(vectors)
        if not count:
            return
        with self._turn():
            if self._lists is None:
                self._index.add_c(count, _floats(vectors))  # labels are places: all or none
                self.next_label += count
            else:
                self.next_label += count  # first: a call that fails may leave some entries
                labels = torch.arange(first, first + count, device=self.device)
                self._index.add_with_ids_c(count, _floats(vectors), _numbers(labels))

    def search(
        self, queries: Float[Tensor, "Q W"], k: int, effort: int
    ) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
        """Scores and labels of the k best entries, best first; label -1 where there are no more.

        k is at most `MOST`. Nothing waits for the device.
        """
        scores = torch.empty(len(queries), k, device=self.device)
        labels = torch.empty(len(queries), k, device=self.device, dtype=torch.int64)
        wanted = search_parameters(self._model, effort)
        with self._turn():
            self._index.search_c(
                len(queries), _floats(queries), k, _floats(scores), _numbers(labels), wanted
            )
        return scores, labels

    def imbalance(self) -> float:
        """How uneven the lists are: 1 is even; n: a search takes about n times as long."""
        if self._lists is None or not self.next_label:
            return 1.0
        with self._turn():
            sizes = torch.tensor(self._sizes(), dtype=torch.float64)
        return float(len(sizes) * sizes.square().sum() / sizes.sum().square().clamp(min=1))

    def num_bytes(self) -> int:
        """Memory of the entries, about."""
        return self.next_label * (int(self._model.sa_code_size()) + 8)

    def _train(self, sample: Any) -> None:
        self._model.train(sample)

    def _placed(self) -> Any:
        """The trained model where it is to be filled."""
        return self._model

    def _sizes(self) -> list[int]:
        return [self._index.invlists.list_size(number) for number in range(self.num_lists)]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time."""
        with self._lock:
            yield


class GpuEngine(Engine):
    """FAISS on a GPU.

    Its resources (temporary memory, handles, a stream) are not for two threads at a time, and an
    index keeps those that it was made with. So each index has its own, and one thread at a time
    its turn; FAISS works on the stream that torch works on in that thread.
    """

    def __init__(self, name: str, width: int, metric: Metric, device: torch.device) -> None:
        super().__init__(name, width, metric, device)
        faiss = faiss_module()
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(TEMPORARY_BYTES)
        self._resources.setPinnedMemory(0)  # for pages of queries on the host
        self._options = faiss.GpuClonerOptions()
        self._options.indicesOptions = faiss.INDICES_64_BIT
        if hasattr(self._options, "use_cuvs"):
            self._options.use_cuvs = False  # other kernels, other rounding, other limits

    @staticmethod
    def there() -> bool:
        """Whether FAISS was built for GPUs and sees one."""
        faiss = faiss_module()
        return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0

    def num_bytes(self) -> int:
        """Memory of the entries, and what FAISS keeps to work with."""
        return super().num_bytes() + TEMPORARY_BYTES

    def _train(self, sample: Any) -> None:
        if self._lists is None:
            return super()._train(sample)
        faiss = faiss_module()
        flat = faiss.IndexFlat(self._model.d, self._model.metric_type)
        nearest = self._copied(flat)  # k-means asks it for the nearest centroids
        self._lists.clustering_index = nearest
        try:
            super()._train(sample)
        finally:
            self._lists.clustering_index = None
            nearest.this.own(True)  # the assignment above had given it away

    def _placed(self) -> Any:
        return self._copied(self._model)

    def _copied(self, index: Any) -> Any:
        number = self.device.index or 0
        copy = faiss_module().index_cpu_to_gpu
        return copy(self._resources, number, index, self._options)

    def _sizes(self) -> list[int]:
        return [self._index.getListLength(number) for number in range(self.num_lists)]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, on the stream that torch works on."""
        number = self.device.index or 0
        with self._lock, torch.cuda.device(number):
            stream = torch.cuda.current_stream(number).cuda_stream
            pointer = faiss_module().cast_integer_to_cudastream_t(stream)
            self._resources.setDefaultStream(number, pointer)
            yield


# By type of device. For others, and where FAISS has none, `Derived` does it on the host.
ENGINES: dict[str, type[Engine]] = {"cuda": GpuEngine}


def engine_for(name: str, device: torch.device) -> type[Engine] | None:
    """What keeps an index of this name on a device; None: FAISS on the host does.

    That is said once, where rows on a GPU are concerned, as every search then goes over the host.
    """
    engine = ENGINES.get(device.type)
    if engine is not None and engine.there():
        if is_served(name):
            return engine
        reason = f"FAISS knows {SERVED} on a GPU"
    else:
        reason = "this FAISS finds no GPU (sparsemem[gpu] brings one that does)"
    if device.type != "cpu":
        warnings.warn(
            f"index {name!r} of rows on {device} is searched on the host: {reason}", stacklevel=3
        )
    return None


def is_served(name: str) -> bool:
    """Whether FAISS has an index of this factory string on GPUs."""
    match = KNOWN.fullmatch(name)
    return match is not None and (match["parts"] is None or int(match["parts"]) in PARTS)


def _floats(tensor: Tensor) -> Any:
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return faiss_module().cast_integer_to_float_ptr(tensor.data_ptr())


def _numbers(tensor: Tensor) -> Any:
    assert tensor.dtype == torch.int64
    assert tensor.is_contiguous()
    return faiss_module().cast_integer_to_idx_t_ptr(tensor.data_ptr())

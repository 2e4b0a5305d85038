"""What FAISS has on GPUs, and how it is asked for it; without one."""

import contextlib
import types
import warnings

import pytest
import torch

from sparsemem.indexes import device_faiss
from sparsemem.indexes.derived import Derived
from sparsemem.indexes.device_faiss import Engine, GpuEngine, engine_for, is_served
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.fresh_index import W, clustered

faiss = pytest.importorskip("faiss")


def test_what_faiss_has_on_gpus():
    for name in ("Flat", "IVF4096,Flat", "IVF64,SQ8", "IVF64,SQfp16", "IVF64,PQ16", "IVF1,PQ8np"):
        assert is_served(name)
    for name in ("HNSW32", "LSH", "IVF64,PQ7", "IVF64,PQ16x4fs", "IVF64_HNSW32,Flat", "PCA4,Flat"):
        assert not is_served(name)


def index_on_cpu():
    rows = clustered()
    table = RowTable(rows, torch.ones(len(rows), dtype=torch.bool))
    return make_index("IVF16,Flat", table, Metric.cosine, background=False, exact_below=50)


def test_what_is_searched_on_the_host_says_so_once(monkeypatch):
    gpu = torch.device("cuda", 0)
    if not GpuEngine.there():
        with pytest.warns(
            UserWarning, match=r"'IVF4,Flat' of rows on cuda:0 is searched on the ho"
        ):
            assert engine_for("IVF4,Flat", gpu) is None
    monkeypatch.setattr(GpuEngine, "there", staticmethod(lambda: True))
    with pytest.warns(
        UserWarning, match=r"'HNSW8' .* searched on the host: FAISS knows 'Flat' and"
    ):
        assert engine_for("HNSW8", gpu) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine_for("IVF4,Flat", gpu) is GpuEngine
        assert engine_for("HNSW8", torch.device("cpu")) is None
        assert isinstance(index_on_cpu().current, Derived)


class Resources:
    """Stands for FAISS's resources of a GPU, and keeps what it is told."""

    made: list = []  # noqa: RUF012

    def __init__(self):
        self.calls = []
        Resources.made.append(self)

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


class Options:
    use_cuvs = True


@pytest.mark.parametrize("name", ["IVF16,Flat", "IVF16,SQ8", "Flat", "IVF16,PQ4np"])
def test_how_faiss_gpu_is_called(name, monkeypatch):
    """All but FAISS GPU itself."""
    copies = []

    def copied(resources, number, index, options):
        assert not options.use_cuvs
        assert options.indicesOptions == 3
        copies.append((resources, number, faiss.clone_index(index)))
        return copies[-1][2]

    monkeypatch.setattr(Resources, "made", [])
    for member, value in {
        "StandardGpuResources": Resources,
        "GpuClonerOptions": Options,
        "INDICES_64_BIT": 3,
        "index_cpu_to_gpu": copied,
        "cast_integer_to_cudastream_t": lambda number: f"stream {number}",
    }.items():
        monkeypatch.setattr(faiss, member, value, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: stream)
    rows = clustered(3000)
    engine = GpuEngine(name, W, Metric.l2, torch.device("cpu"))
    centroids = engine.train(rows)
    (resources,) = Resources.made
    assert resources.calls[:2] == [("setTempMemory", 2**28), ("setPinnedMemory", 0)]
    assert ("setDefaultStream", 0, "stream 7") in resources.calls
    assert len(copies) == (1 if name == "Flat" else 2)  # the one that is filled comes last
    assert all(copy[:2] == (resources, 0) for copy in copies)
    assert (centroids is None) == (name == "Flat")
    engine.add(rows[:2000])
    engine.add(rows[2000:])
    assert (engine.next_label, copies[-1][2].ntotal) == (3000, 3000)
    like = Engine(name, W, Metric.l2, torch.device("cpu"))
    like.train(rows)
    like.add(rows)
    for mine, theirs in zip(engine.search(rows, 5, 4), like.search(rows, 5, 4), strict=True):
        assert torch.equal(mine, theirs)
    assert engine.num_bytes() == like.num_bytes() + device_faiss.TEMPORARY_BYTES

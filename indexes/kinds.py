"""FAISS indices by factory string: how they are made, and the knob that trades time for recall."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsemem.indexes.compiling import COMPILED_DTYPES, loops_for
from sparsemem.indexes.metrics import Metric, inverse_norm

EXAMPLES = "'IVF4096,Flat', 'IVF4096,SQ8', 'IVF4096,PQ16np', 'HNSW32', 'LSH'"
TRAINING_POINTS = 32  # a centroid, at most
ITERATIONS = 6
FAST_COARSE = 1024  # lists from which on the nearest centroids are themselves looked for in lists
ASSIGNMENT_PROBES = 4  # finds the nearest of 4096 centroids for 97 % of rows, at an eighth the time
BUILD_PROBES = 8  # for 99.8 %, at a quarter
QUERY_PROBES = 8
THOROUGH_PROBES = 32  # of the few that seem far from all


class Knob(NamedTuple):
    """What trades time for recall: FAISS's name of it, and its greatest value."""

    name: str | None  # None: there is none
    limit: int


def faiss_module() -> Any:
    """FAISS; ImportError says how to install it."""
    try:
        import faiss  # after torch: they share one OpenMP pool
    except ImportError:
        raise ImportError(
            "this index needs FAISS: install sparsemem[cpu] or sparsemem[gpu]; index='exact' and"
            " index='product-key' do without"
        ) from None
    return faiss


def new_faiss_index(name: str, width: int, metric: Metric) -> Any:
    """An empty, untrained FAISS index; ValueError for a string that FAISS does not know."""
    faiss = faiss_module()
    measure = faiss.METRIC_INNER_PRODUCT
    if metric is Metric.l2 or (metric is Metric.cosine and name.startswith("LSH")):
        measure = faiss.METRIC_L2  # LSH knows no other; unit vectors are ordered alike by both
    try:
        index = faiss.index_factory(width, name, measure)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].split(": ")[-1]
        raise ValueError(
            f"index is {name!r}, expected 'exact', 'product-key' or a FAISS factory string that"
            f" suits rows of width {width}, such as {EXAMPLES} (FAISS: {reason})"
        ) from None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2) or "Dedup" in type(index).__name__:
        raise ValueError(
            f"index is {name!r}, expected one without IDMap and Dedup: rows have their own"
            f" numbers here; such as {EXAMPLES}"
        )
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.cp.niter = ITERATIONS
        lists.cp.max_points_per_centroid = TRAINING_POINTS
        lists.cp.min_points_per_centroid = 1
    return index


def num_lists(index: Any) -> int:
    """Inverted lists of a FAISS index; 0 where it has none."""
    lists = faiss_module().try_extract_index_ivf(index)
    return 0 if lists is None else int(lists.nlist)


def updates_in_place(index: Any) -> bool:
    """Whether a label's vector can be changed: plain inverted lists only."""
    # The packed blocks of fast-scan lists cannot take one vector's code.
    return isinstance(index, faiss_module().IndexIVF) and "FastScan" not in type(index).__name__


def encodes_quickly(index: Any) -> bool:
    """Whether vectors can be changed in place for less than it takes to look for their lists."""
    faiss = faiss_module()
    return isinstance(index, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer)


def enter_in_place(index: Any, labels: Any, vectors: Any, lists: Any = None) -> None:
    """Change the vectors [n, W] of labels [n]; `lists` [n], where known, are those they belong to.

    That is FAISS's `update_vectors` less the search for the lists, which takes most of its time.
    """
    faiss = faiss_module()
    if lists is None:
        index.update_vectors(labels, vectors)
        return
    pointer = faiss.swig_ptr
    codes = vectors.view(np.uint8)  # of lists of plain vectors
    if not isinstance(index, faiss.IndexIVFFlat):
        codes = np.empty((len(labels), index.code_size), np.uint8)
        index.encode_vectors(len(labels), pointer(vectors), pointer(lists), pointer(codes))
    index.direct_map.update_codes(
        index.invlists, len(labels), pointer(labels), pointer(lists), pointer(codes)
    )


def add_to_lists(index: Any, vectors: Any, lists: Any) -> None:
    """FAISS's `add` of vectors [n, W] whose lists [n] are known."""
    pointer = faiss_module().swig_ptr
    index.add_core(len(vectors), pointer(vectors), None, pointer(lists))


def is_quantised(index: Any) -> bool:
    """Whether the index scores something coarser than the rows, so that more are to be asked."""
    faiss = faiss_module()
    return not isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexHNSWFlat)


def knob_of(index: Any) -> Knob:
    """The knob of an index."""
    faiss = faiss_module()
    if num_lists(index):
        return Knob("nprobe", num_lists(index))
    if isinstance(index, faiss.IndexHNSW):
        return Knob("efSearch", 4096)
    return Knob(None, 1)


def search_parameters(index: Any, effort: int) -> Any:
    """FAISS's parameters of one search at a value of the knob; None: the index's own."""
    faiss = faiss_module()
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort)
    if isinstance(index, faiss.IndexIVF):
        coarse = None
        if isinstance(faiss.downcast_index(index.quantizer), faiss.IndexIVF):
            coarse = faiss.SearchParametersIVF(nprobe=max(QUERY_PROBES, 2 * effort))
        return faiss.SearchParametersIVF(nprobe=effort, quantizer_params=coarse)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(index.index), effort)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(faiss.downcast_index(index.base_index), effort)
        return inner and faiss.IndexRefineSearchParameters(
            base_index_params=inner, k_factor=index.k_factor
        )
    return None


def thorough_assignment(index: Any) -> Any:
    """Parameters for a more thorough look into the lists of `quicken`; None: it is exact."""
    faiss = faiss_module()
    if not isinstance(faiss.downcast_index(index.quantizer), faiss.IndexIVF):
        return None
    return faiss.SearchParametersIVF(nprobe=THOROUGH_PROBES)


def quicken(index: Any) -> tuple[Any, ...]:
    """Look for the nearest of many centroids in inverted lists over them; trained, still empty.

    A scan of 4096 centroids takes longer than the lists that a query then probes. The centroid
    found for a row is the nearest but one now and then, which costs a query that probes several
    lists next to nothing. Returns what has to live as long as the index.
    """
    faiss = faiss_module()
    if not isinstance(index, faiss.IndexIVF) or index.nlist < FAST_COARSE:
        return ()
    flat = faiss.downcast_index(index.quantizer)
    if not isinstance(flat, faiss.IndexFlat):
        return ()
    groups, metric = int(index.nlist**0.5), index.metric_type
    inner = faiss.IndexFlat(index.d, metric)
    coarse = faiss.IndexIVFFlat(inner, index.d, groups, metric)
    coarse.cp.min_points_per_centroid = 1
    centroids = flat.reconstruct_n(0, index.nlist)
    coarse.train(centroids)
    coarse.add(centroids)
    coarse.nprobe = BUILD_PROBES
    flat.this.own(True)  # it was the index's, which is not to free the new one
    index.own_fields = False
    index.quantizer = coarse
    return flat, inner, coarse


def comparable(vectors: Tensor, metric: Metric) -> Tensor:
    """Rows or queries [n, W] as FAISS is to see them: contiguous float32, for the cosine scaled.

    FAISS refuses NaN, and a diverged network is the training loop's to report: NaN becomes 0.
    """
    vectors = vectors.detach()
    if metric is Metric.cosine:
        vectors = vectors * inverse_norm(vectors).unsqueeze(-1)
    return vectors.float().nan_to_num(0.0, 0.0, 0.0).contiguous()


def to_faiss(vectors: Tensor, metric: Metric) -> Any:
    """The same as numpy."""
    if vectors.dtype in COMPILED_DTYPES and (loops := loops_for(vectors)) is not None:
        made = np.empty(vectors.shape, np.float32)
        loops.comparable(vectors.detach().contiguous().numpy(), metric is Metric.cosine, made)
        return made
    return comparable(vectors, metric).cpu().numpy()


def from_numpy(values: Any, like: Tensor) -> Tensor:
    """A tensor of numpy values on the device of `like`."""
    return torch.from_numpy(values).to(like.device)

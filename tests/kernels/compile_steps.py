"""Compiles the kernels of a step of SAM and of one of SDNC; see test_gpu_compile.py."""

import torch

from sparsemem import devices
from sparsemem.kernels.gpu import step
from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from tests.oracles.hopper import compiled_for_hopper


def compile_step(dtype, heads, top_k, width, linked):
    """What a step launches, but for SDNC's links."""
    sizes = step.Sizes(dtype, heads, 2 * width + (6 if linked else 3), width, top_k, linked)
    store = Episode.start(2, 1000, width, dtype=dtype)._store
    values = torch.zeros(2, heads * sizes.inputs, dtype=dtype)
    shape = (2, heads, sizes.read)
    last = Entries(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=dtype))
    written, write = step.write_step(sizes, store, values, last)
    keys = step.search_step(sizes, store, values, written)
    links = torch.zeros(2, heads, 2, top_k, sizes.read, dtype=dtype)
    of = torch.zeros(2, heads, 2, top_k, dtype=torch.int64)
    taken = step.read_step(sizes, store, values, last, write, keys, of, links)
    saved = (last.weights, write.ids, taken.read.ids, links, taken.rows, taken.read.weights)
    taken.backward(store.rows, values, *saved, None, None)


if __name__ == "__main__":
    devices.is_device = lambda tensor: True
    with compiled_for_hopper() as made:
        compile_step(torch.float32, 4, 4, 32, False)
        compile_step(torch.float64, 2, 3, 5, True)
    for compiled in made:
        print(compiled.name, "cubin" in compiled.asm)

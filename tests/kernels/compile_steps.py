"""Compiles the kernels of a step of SAM, with its LSTM, and of one of SDNC; see
test_gpu_compile.py.
"""

import torch

from sparsemem import devices
from sparsemem.kernels.gpu import sequence, step
from sparsemem.kernels.sequence import Layers
from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from sparsemem.memory.links import TemporalLinks
from tests.oracles.hopper import compiled_for_hopper


def compile_step(dtype, heads, top_k, width, linked):
    """What a step launches."""
    sizes = step.Sizes(dtype, heads, 2 * width + (6 if linked else 3), width, top_k, linked)
    store = Episode.start(2, 1000, width, dtype=dtype)._store
    values = torch.zeros(2, heads * sizes.inputs, dtype=dtype)
    shape = (2, heads, sizes.read)
    last = Entries(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=dtype))
    write, read = sizes.room_to_write(last), sizes.room_to_read(last)
    step.write_step(sizes, store, values, last, write, torch.empty_like(store.touched))
    keys = step.search_step(sizes, store, values, store.touched)
    links = TemporalLinks.start(2, heads, 8, values)
    linked, of = step.links_step(sizes, store, links, write, last)
    step.read_step(sizes, store, values, last, write, read, keys, linked, of)
    saved = (last.weights, write.ids, read.ids, of, read.rows, read.weights)
    step.device_backward(sizes, store.rows, values, *saved, None, None)


def compile_sequence(dtype, heads, top_k, width, hidden):
    """What a sequence of one step launches, forward and backward."""
    store = Episode.start(2, 1000, width, dtype=dtype)._store
    inputs, features = heads * (2 * width + 3), hidden + heads * width
    like = torch.zeros(0, dtype=dtype)
    gates, carried = like.new_zeros(1, 2, 4 * hidden), like.new_zeros(2, features)
    last = Entries(torch.zeros(2, heads, 0, dtype=torch.int64), like.new_zeros(2, heads, 0))
    weights = (like.new_zeros(4 * hidden, features), like.new_zeros(inputs, hidden))
    layers = Layers(*weights, like.new_zeros(inputs))
    given = (gates, carried, gates[0, :, :hidden], last, top_k, layers)
    with torch.no_grad():
        made = sequence.device_sequence(store, *given)
    saved = (made.gates, made.cells, made.values, made.write_ids, made.ids, made.weights, made.rows)
    flows = (made.carried, made.cells[0], made.weights, made.gates, made.values)
    made.backward(made.sizes, store.rows, *layers[:2], *saved, *flows)


if __name__ == "__main__":
    devices.is_device = lambda tensor: True
    with compiled_for_hopper() as made:
        compile_sequence(torch.float32, 4, 4, 32, 100)
        compile_step(torch.float64, 2, 3, 5, True)
    for compiled in made:
        print(compiled.name, "cubin" in compiled.asm)

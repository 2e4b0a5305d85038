"""Products and comparisons on vectors, and the nearest members of nodes, against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

numba = pytest.importorskip("numba")

from sparsemem.kernels import codes, lanes, nearest, tree  # noqa: E402

NODES, BLOCKS = 5, 2
SEEDS = st.integers(0, 2**32 - 1)


@numba.njit
def on_vectors(block, query, least, products):
    """Products; which are at least so much; the places of these."""
    lanes.multiply(block.ctypes.data, len(query), query.ctypes.data, products.ctypes.data)
    bits = lanes.at_least(products.ctypes.data, least)
    places, rest = [-1], bits
    while rest:
        places.append(lanes.lowest(rest))
        rest &= rest - 1
    return bits, places[1:]


@numba.njit
def scanned(level, nodes, query, room, kept):
    """What `scan` makes of its arguments, and the margin."""
    best, scores = np.empty(room, np.int64), np.empty((len(nodes), 128), np.int16)
    nearest.scan(level, nodes, query, best, kept, scores)
    return best, np.int64(codes.MARGIN * codes.LENGTH * codes.query_length(len(query)))


@given(SEEDS, st.sampled_from([1, 2, 7, 32]))
@settings(max_examples=50, deadline=None)
def test_products_and_bits_are_those_of_numpy(seed, width):
    random = np.random.default_rng(seed)
    block = random.integers(-127, 128, (width, lanes.LANES), dtype=np.int8)
    query = random.integers(-200, 201, width, dtype=np.int16)
    expected = (query.astype(np.int64) @ block).astype(np.int16)  # what overflows comes back
    products = np.empty(lanes.LANES, np.int16)
    for least in (int(random.choice(expected)), -(2**15), int(expected.max()) + 1):
        if least >= 2**15:
            continue
        bits, places = on_vectors(block, query, least, products)
        assert (products == expected).all()
        assert places == [place for place in range(lanes.LANES) if expected[place] >= least]
        assert bits & (2**64 - 1) == sum(1 << place for place in places)


def level_of(random, width, spread):
    """Nodes of codes that point the same way but for `spread`; what is behind them is garbage."""
    counts = random.integers(0, BLOCKS * lanes.LANES + 1, NODES)
    centre = random.normal(size=width)
    directions = centre + spread * random.normal(size=(NODES, BLOCKS * lanes.LANES, width))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    rounded = np.rint(codes.LENGTH * directions).astype(np.int8)
    for node, count in enumerate(counts):
        rounded[node, count:] = 127
    blocks = rounded.reshape(NODES, BLOCKS, lanes.LANES, width).swapaxes(2, 3)
    members = random.permutation(NODES * BLOCKS * lanes.LANES).reshape(NODES, -1)
    places, state = np.empty(0, np.int64), np.zeros(2, np.int64)
    return tree.Level(np.ascontiguousarray(blocks), members, counts, places, state), rounded


@given(
    SEEDS,
    st.sampled_from([0.0, 0.03, 0.1, 0.3, 3.0]),
    st.sampled_from([(1, 1), (4, 4), (2, 20), (2, 60)]),
)
@settings(max_examples=200, deadline=None)
def test_a_scan_finds_the_nearest_and_what_comes_within_the_margin(seed, spread, sizes):
    random, (kept, room), width = np.random.default_rng(seed), sizes, 6
    level, rounded = level_of(random, width, spread)
    nodes = random.permutation([*range(NODES - 1), nearest.NONE])
    query = np.rint(200 * random.normal(size=width) / np.sqrt(width)).clip(-98, 98).astype(np.int16)
    found, margin = scanned(level, nodes, query, room, kept)
    members = [
        (-int(score), int(member))
        for node in nodes
        if node != nearest.NONE
        for score, member in zip(
            rounded[node, : level.counts[node]] @ query.astype(np.int64),
            level.members[node, : level.counts[node]],
            strict=True,
        )
    ]
    best = sorted(members)[:room]
    if room > kept and len(best) >= kept:
        best = [entry for entry in best if entry[0] <= best[kept - 1][0] + margin]
    expected = [member for _, member in best]
    assert sorted(found[: len(expected)]) == sorted(expected)
    assert (found[len(expected) :] == nearest.NONE).all()
    if room == kept:
        assert found[: len(expected)].tolist() == expected, "best first"

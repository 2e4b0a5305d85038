from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.distributed.cluster import ClusterError, Group, Resources, check_fits, total

GIB = 2**30


def of(*sizes):
    return Resources(*map(float, sizes))


def nodes(*each):
    return [of(*sizes) for sizes in each]


def fits(free, groups):
    try:
        check_fits(free, groups, "here")
    except ClusterError:
        return False
    return True


def test_processes_are_spread_over_nodes():
    groups = [Group("shard", 4, of(1, 0, 3)), Group("worker", 2, of(1, 1, 1))]
    assert fits(nodes((3, 1, 7), (3, 1, 7)), groups)
    assert not fits(nodes((3, 1, 7), (3, 0, 7)), groups)  # a GPU is missing
    assert not fits(nodes((3, 1, 14)), groups)  # CPUs are


def test_each_process_needs_one_node():
    groups = [Group("shard", 1, of(1, 0, 8))]
    assert not fits(nodes((4, 0, 5), (4, 0, 5)), groups)
    assert fits(nodes((4, 0, 5), (4, 0, 8)), groups)


def test_the_sum_is_told():
    groups = [
        Group("shard", 4, of(1, 0, 2 * GIB)),
        Group("worker", 1, of(1, 0, GIB / 2)),
    ]
    with pytest.raises(ClusterError) as found:
        check_fits(nodes((2, 0, 4 * GIB), (2, 0, 3 * GIB)), groups, "the cluster at auto")
    assert str(found.value) == (
        "the run does not fit: 4 shards of 1 CPU, 2 GiB memory and 1 worker of 1 CPU, 512 MiB"
        " memory need 5 CPUs, 8.5 GiB memory; the cluster at auto has 4 CPUs, 7 GiB memory free on"
        " 2 nodes, of which each process needs one"
    )


def possible(free, groups):
    """Whether some way to place all processes is right, by trying all of them."""
    each = [group.each for group in groups for _ in range(group.number)]
    for places in product(range(len(free)), repeat=len(each)):
        taken = [
            total(e for e, at in zip(each, places, strict=True) if at == place)
            for place in range(len(free))
        ]
        if all(node.holds(use) for node, use in zip(free, taken, strict=True)):
            return True
    return False


sizes = st.integers(0, 3)


@given(
    st.lists(st.tuples(sizes, st.just(0), sizes), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_what_is_let_through_can_be_placed(free, shards, workers, memory):
    groups = [
        Group("shard", shards, of(1, 0, memory)),
        Group("worker", workers, of(1, 0, 1)),
    ]
    found = fits(nodes(*free), groups)
    if found:
        assert possible(nodes(*free), groups)
    if memory == 1:  # all alike: nothing is refused that could be placed
        assert found == possible(nodes(*free), groups)

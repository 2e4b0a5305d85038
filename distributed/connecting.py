"""A Ray cluster to run on: one that is started here, and ends with this process, or another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node

from sparsemem.distributed.cluster import ClusterError, Group, Resources, total

OBJECT_STORE_BYTES = 2**29  # calls and answers pass through it, if they are large
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
# Of Ray Train, which this process hands on: how often it looks whether trainers are well.
TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
HERE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextmanager
def connected(address: str | None, groups: Sequence[Group]) -> Iterator[str]:
    """Connect to a cluster for the block; gives its name.

    Where this process is connected already, it stays so. None starts Ray on this machine: on its
    loopback address, with a token unless RAY_AUTH_MODE says otherwise, without a dashboard, and
    with as many logical CPUs as the groups ask for, however many the machine has.
    """
    for name, value in TRAIN.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield "the cluster"
        return
    try:
        if address is None:
            start_here(int(total(group.total for group in groups).cpus))
        else:
            ray.init(address=address, **QUIET)
    except Exception as error:  # Ray raises some that are of no class of their own
        where = "start Ray here" if address is None else f"connect to a Ray cluster at {address}"
        raise ClusterError(f"cannot {where}: {str(error).splitlines()[0]}") from None
    try:
        yield "this machine" if address is None else f"the cluster at {address}"
    finally:
        ray.shutdown()


def start_here(cpus: int) -> None:
    """Start Ray on this machine's loopback address.

    By itself Ray takes the machine's own address on Linux, and listens on all that it has. With
    clusters of several machines ruled out it keeps to loopback, as it does on other systems.
    """
    for name, value in HERE.items():
        os.environ.setdefault(name, value)
    before, name = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    given = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **QUIET,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if given is not None:
            os.environ[name] = given


def free_nodes() -> list[Resources]:
    """What is free on each node."""
    nodes = available_resources_per_node()  # type: ignore[no-untyped-call]
    names = ("CPU", "GPU", "memory")
    return [Resources(*(node.get(name, 0.0) for name in names)) for node in nodes.values()]

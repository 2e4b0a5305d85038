"""What a sharded run takes of a cluster, and whether the cluster has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sparsemem.errors import UserError
from sparsemem.training.plan import show_bytes


class ClusterError(UserError):
    """There is no such cluster, or a run does not fit into it."""


class Wanted(NamedTuple):
    """What a run is to be spread over."""

    shards: int
    workers: int = 1
    address: str | None = None  # of a cluster that is there; None: one is started on this machine


class Resources(NamedTuple):
    """Of a node, or of one process that runs on one."""

    cpus: float
    gpus: float
    memory: float  # bytes

    def holds(self, other: Resources) -> bool:
        """Whether there is room for another's."""
        return all(mine >= needed for mine, needed in zip(self, other, strict=True))

    def less(self, other: Resources) -> Resources:
        """What is left."""
        return Resources(*(mine - taken for mine, taken in zip(self, other, strict=True)))

    def show(self) -> str:
        """2 CPUs, 1 GPU, 1.2 GiB memory."""
        parts = [counted(self.cpus, "CPU"), counted(self.gpus, "GPU")][: 2 if self.gpus else 1]
        return ", ".join([*parts, f"{show_bytes(self.memory)} memory"])


NOTHING = Resources(0.0, 0.0, 0.0)


class Group(NamedTuple):
    """Processes of one kind."""

    name: str  # "shard"
    number: int
    each: Resources

    @property
    def total(self) -> Resources:
        """Of all of them."""
        return Resources(*(self.number * part for part in self.each))


def counted(count: float | int, what: str) -> str:
    """2 shards."""
    return f"{count:g} {what}{'' if count == 1 else 's'}"


def check_fits(nodes: Sequence[Resources], groups: Sequence[Group], where: str) -> None:
    """ClusterError, with the sums, where the groups do not fit on the nodes.

    Each process has to fit on one node; they are placed largest first, each where most is left.
    """
    left = list(nodes)
    for group in sorted(groups, key=lambda group: group.each.memory, reverse=True):
        for _ in range(group.number):
            roomy = [place for place, node in enumerate(left) if node.holds(group.each)]
            if not roomy:
                raise ClusterError(f"the run does not fit: {sums(nodes, groups, where)}")
            best = max(roomy, key=lambda place: left[place].memory)
            left[best] = left[best].less(group.each)


def sums(nodes: Sequence[Resources], groups: Sequence[Group], where: str) -> str:
    """What there is, and what is needed."""
    needed = total(group.total for group in groups)
    parts = " and ".join(
        f"{counted(group.number, group.name)} of {group.each.show()}" for group in groups
    )
    there = total(nodes).show()
    on = "" if len(nodes) == 1 else f" on {len(nodes)} nodes, of which each process needs one"
    return f"{parts} need {needed.show()}; {where} has {there} free{on}"


def total(all_of_them: Iterable[Resources]) -> Resources:
    """The sum of some resources."""
    return Resources(*(sum(part) for part in zip(NOTHING, *all_of_them, strict=True)))

"""A tree that the rows of a long episode are found by, and that grows with them; compiled.

Rows that point the same way lie together in a *list*, lists in a *group*, groups in the root: each
is a node, which holds directions side by side, with the member that each stands for: a row, or a
list or a group, by the mean direction of what is in it. A node that is full is split in two; a
list that few rows are left in is given up, its rows go to others; rows of a list that a new row
splits move to lists that are nearer by now. So entering or moving a row takes the same time
however many there are, and nothing is ever built anew. (Split, give up, reassign: as SPFresh, Xu
et al. 2023, arXiv 2410.14452, but in memory and at once.)

Directions are codes (codes.py). Their products are off by MARGIN at most, nearly always: rows that
come as near to the k-th best are proposed, and scored from the rows by the caller. `codes` of a
node are [blocks, W, LANES], the code of a member [W].

Functions are for one element of the batch, but for those with ENTRIES. Shape letters beside those
of steps.py: S members that a node has room for.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparsemem.kernels.codes import (
    LENGTH,
    PART,
    code_at,
    divide,
    encode,
    query_length,
)
from sparsemem.kernels.compiled import (
    array_at,
    assign,
    fetch_rows,
    inverse_norm,
    kernel,
    part,
)
from sparsemem.kernels.lanes import LANES
from sparsemem.kernels.nearest import NONE, scan

TURNS = 8  # of small changes of a row, in one its list is looked for again
HOMES = 3  # groups in which the list for a row is looked for
FEW = 16  # a list with less than a sixteenth of the rows that it has room for is given up


class Level(NamedTuple):
    """Nodes of one kind; which are free begins in `state`, and goes on by `counts`."""

    codes: Any  # [nodes, blocks, W, LANES]
    members: Any  # [nodes, S]
    counts: Any  # members of each node
    places: Any  # of each member: node * S + its place there; NONE: not in the tree
    state: Any  # how many nodes were ever in use; the first of those that are free again


class Tree(NamedTuple):
    """What an element's rows are found by."""

    rows: Level  # its nodes are the lists
    lists: Level  # its nodes are the groups
    groups: Level  # its one node is the root
    entered: Any  # [1]: rows 0 .. entered - 1 are in the tree


@part
def propose(tree, query, groups, lists, best, k):
    """Rows among which the k best for the code of a query should be: of the nearest of the lists
    of the nearest groups, as many of these as the arguments say.
    """
    scores, of_root = scores_of(tree.rows, max(groups, lists)), scores_of(tree.groups, 1)
    near_groups, near_lists = np.empty(groups, np.int64), np.empty(lists, np.int64)
    scan(tree.groups, np.zeros(1, np.int64), query, near_groups, groups, of_root)
    scan(tree.lists, near_groups, query, near_lists, lists, scores)
    scan(tree.rows, near_lists, query, best, k, scores)
    return best


@part
def propose_ahead(tree, queries, width, groups, lists, k, rows, norms, best, code):
    """Rows `best` [H, C] for queries [H, ..]; they are on their way from memory then."""
    for head in range(len(queries)):
        query = queries[head, :width]
        encode(query, inverse_norm(query), query_length(width), code)
        propose(tree, code, groups, lists, best[head], k)
        fetch_rows(rows, best[head])
        fetch_rows(norms.reshape(-1, 1), best[head])


@part
def scores_of(level, nodes):
    """Room for the scores of some nodes of a level."""
    return np.empty((nodes, level.codes.shape[1] * LANES), np.int16)


@part
def code_of(level):
    """Room for a code."""
    return np.empty(level.codes.shape[2], np.int16)


@part
def append(level, node, member, code):
    """Add a member to a node."""
    place = level.counts[node]
    assign(code_at(level.codes[node], place), code)
    level.members[node, place] = member
    level.places[member] = node * level.members.shape[1] + place
    level.counts[node] = place + 1


@part
def take_out(level, member):
    """Remove a member from its node, whose last one takes its place. The node."""
    size = level.members.shape[1]
    node, place = level.places[member] // size, level.places[member] % size
    last = level.counts[node] - 1
    assign(code_at(level.codes[node], place), code_at(level.codes[node], last))
    level.members[node, place] = level.members[node, last]
    level.places[level.members[node, place]] = node * size + place
    level.places[member] = NONE
    level.counts[node] = last
    return node


@part
def new_node(level):
    """An empty node: one that was given up, or one that never was in use."""
    node = level.state[1]
    if node == NONE:
        node = level.state[0]
        level.state[0] += 1
    else:
        level.state[1] = level.counts[node]
    level.counts[node] = 0
    return node


@part
def give_up(level, node):
    """Make a node free."""
    level.counts[node] = level.state[1]
    level.state[1] = node


@part
def split(level, node, above):
    """Move a part of a node's members to a new one, which the node above gets. Both of these."""
    count, code = level.counts[node], code_of(level)
    sides, means = np.empty(count, np.int64), np.empty((2, len(code)))
    divide(level.codes[node], sides, means)
    new = new_node(level)
    for place in range(count - 1, -1, -1):  # what takes a place has been looked at
        if sides[place]:
            member = level.members[node, place]
            assign(code, code_at(level.codes[node], place))
            take_out(level, member)
            append(level, new, member, code)
    size = above.members.shape[1]
    parent, place = above.places[node] // size, above.places[node] % size
    encode(means[0], 1 / LENGTH, LENGTH, code)
    assign(code_at(above.codes[parent], place), code)
    encode(means[1], 1 / LENGTH, LENGTH, code)
    append(above, parent, new, code)
    return new, parent


@part
def home(tree, code):
    """The list for a code: the nearest one of the nearest groups."""
    groups, chosen = np.empty(HOMES, np.int64), np.empty(1, np.int64)
    of_root, of_groups = scores_of(tree.groups, 1), scores_of(tree.lists, HOMES)
    scan(tree.groups, np.zeros(1, np.int64), code, groups, len(groups), of_root)
    scan(tree.lists, groups, code, chosen, len(chosen), of_groups)
    return chosen[0]


@part
def add(tree, node, row, code):
    """Add a row to a list; split what is full then. The list that is new, or NONE."""
    append(tree.rows, node, row, code)
    if tree.rows.counts[node] < tree.rows.members.shape[1]:
        return NONE
    new, group = split(tree.rows, node, tree.lists)
    if tree.lists.counts[group] == tree.lists.members.shape[1]:
        split(tree.lists, group, tree.groups)
    return new


@part
def settle(tree, node, code):
    """Move rows of a list that was split to lists that are nearer by now. Not to those that are as
    full as a split leaves a list at most: they would be split too soon. `code` is overwritten.
    """
    size = tree.rows.members.shape[1]
    full = size - size // PART
    for place in range(tree.rows.counts[node] - 1, -1, -1):  # what takes a place has been looked at
        if tree.rows.counts[node] <= size // FEW:
            break
        assign(code, code_at(tree.rows.codes[node], place))
        chosen = home(tree, code)
        if chosen != node and tree.rows.counts[chosen] < full:
            row = tree.rows.members[node, place]
            take_out(tree.rows, row)
            append(tree.rows, chosen, row, code)


@part
def scatter(tree, node):
    """Give up a list and add its rows to others, if there are others. These are split, but not
    settled, as in `put`.
    """
    group = tree.lists.places[node] // tree.lists.members.shape[1]
    if tree.lists.counts[group] == 1:
        if tree.groups.counts[0] == 1:
            return
        take_out(tree.groups, group)
        take_out(tree.lists, node)
        give_up(tree.lists, group)
    else:
        take_out(tree.lists, node)
    code = code_of(tree.rows)
    for place in range(tree.rows.counts[node]):
        assign(code, code_at(tree.rows.codes[node], place))
        add(tree, home(tree, code), tree.rows.members[node, place], code)
    give_up(tree.rows, node)


@part
def is_near(codes, place, code):
    """Whether a code may stay in its list: no number changed by more than one, and it is not its
    turn to look for a list again, as every eighth of such changes is, more or less.
    """
    total, before = 0, code_at(codes, place)
    for j in range(len(code)):
        total += code[j]
        if abs(np.int64(code[j]) - before[j]) > 1:
            return False
    return total % TURNS != 0


@part
def put(tree, row, code):
    """Enter a row by its code, or tell where one that is in the tree points now. `code` is
    overwritten.
    """
    if tree.groups.counts[0] == 0:
        group, chosen = new_node(tree.lists), new_node(tree.rows)
        append(tree.groups, 0, group, code)
        append(tree.lists, group, chosen, code)
    size, place = tree.rows.members.shape[1], tree.rows.places[row]
    if place != NONE and is_near(tree.rows.codes[place // size], place % size, code):
        assign(code_at(tree.rows.codes[place // size], place % size), code)
        return
    chosen, left = home(tree, code), NONE
    if place != NONE and place // size == chosen:
        assign(code_at(tree.rows.codes[chosen], place % size), code)
        return
    if place != NONE:
        left = take_out(tree.rows, row)
    new = add(tree, chosen, row, code)
    if new != NONE and left == NONE:  # a row that only moves should not move hundreds
        settle(tree, chosen, code)
        settle(tree, new, code)
    if left != NONE and tree.rows.counts[left] < size // FEW:
        scatter(tree, left)


@part
def update(tree, ids, touched, rows, norms, code):
    """Tell a tree of rows at ids that have changed, and of all that were touched since."""
    entered = tree.entered[0]
    known = ids.flat
    for i in range(len(known) + max(touched - entered, 0)):
        id = known[i] if i < len(known) else entered + i - len(known)
        if i >= len(known) or id < entered:
            encode(rows[id], norms[id], LENGTH, code)
            put(tree, id, code)
    tree.entered[0] = max(entered, touched)


@part
def has_room(tree, entering, moving):
    """Whether there are nodes enough to enter so many rows, and to move so many.

    An entered row splits one list at most. One that was split takes S / PART rows until it is
    again; each that is there may take fewer, once.
    """
    size, used = tree.rows.members.shape[1], tree.rows.state[0]
    lists, groups = len(tree.rows.counts) - used, len(tree.lists.counts) - tree.lists.state[0]
    splits = min(entering, used + PART * entering // size) + moving * (1 + size // FEW)
    return min(lists, groups) >= 2 + splits


@part
def trees_at(sizes, addresses):
    """The trees of all elements, each array with the batch in front."""
    batch, width, capacity, size, lists, groups = sizes
    whole, byte = np.empty(0, np.int64), np.empty(0, np.int8)
    blocks, of_root = -(-size // LANES), -(-groups // LANES)
    rows = Level(
        array_at(addresses[0], byte, (batch, lists, blocks, width, LANES)),
        array_at(addresses[1], whole, (batch, lists, size)),
        array_at(addresses[2], whole, (batch, lists)),
        array_at(addresses[3], whole, (batch, capacity)),
        array_at(addresses[4], whole, (batch, 2)),
    )
    middle = Level(
        array_at(addresses[5], byte, (batch, groups, blocks, width, LANES)),
        array_at(addresses[6], whole, (batch, groups, size)),
        array_at(addresses[7], whole, (batch, groups)),
        array_at(addresses[8], whole, (batch, lists)),
        array_at(addresses[9], whole, (batch, 2)),
    )
    top = Level(
        array_at(addresses[10], byte, (batch, 1, of_root, width, LANES)),
        array_at(addresses[11], whole, (batch, 1, groups)),
        array_at(addresses[12], whole, (batch, 1)),
        array_at(addresses[13], whole, (batch, groups)),
        array_at(addresses[14], whole, (batch, 2)),
    )
    return Tree(rows, middle, top, array_at(addresses[15], whole, (batch, 1)))


@part
def level_of(level, b):
    """An element's part of a level."""
    return Level(level.codes[b], level.members[b], level.counts[b], level.places[b], level.state[b])


@part
def tree_of(trees, b):
    """An element's tree."""
    rows, lists, groups = level_of(trees.rows, b), level_of(trees.lists, b), trees.groups
    return Tree(rows, lists, level_of(groups, b), trees.entered[b])


@kernel
def enter_rows(like, sizes, addresses):
    """Enter rows ids [B, n] with their directions [B, n, W], or tell where they point."""
    (batch, width), count = sizes[:2], sizes[6]
    trees, code = trees_at(sizes[:6], addresses[:16]), np.empty(width, np.int16)
    ids = array_at(addresses[16], np.empty(0, np.int64), (batch, count))
    vectors = array_at(addresses[17], like, (batch, count, width))
    for b in range(batch):
        for i in range(count):
            if ids[b, i] != NONE:
                encode(vectors[b, i], 1, LENGTH, code)
                put(tree_of(trees, b), ids[b, i], code)


@kernel
def propose_rows(like, sizes, addresses):
    """Rows [B, H, C] for queries [B, H, W] of length 1; NONE where a tree has fewer."""
    batch, width = sizes[:2]
    heads, k, proposed, groups, lists = sizes[6:]
    trees, code = trees_at(sizes[:6], addresses[:16]), np.empty(width, np.int16)
    queries = array_at(addresses[16], like, (batch, heads, width))
    ids = array_at(addresses[17], np.empty(0, np.int64), (batch, heads, proposed))
    for b in range(batch):
        for head in range(heads):
            encode(queries[b, head], 1, query_length(width), code)
            propose(tree_of(trees, b), code, groups, lists, ids[b, head], k)


ENTRIES = {enter_rows: (7, 18), propose_rows: (11, 18)}  # sizes and addresses

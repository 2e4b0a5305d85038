"""Operations on a bank that is killed: what they are, what they lead to, and who runs them.

`python -m tests.oracles.killed_bank` reads lines `FOLDER FIRST SEED` and answers each with the
process id of a fork that loads the bank and runs operations from number FIRST on, without end,
acknowledging each in the file FOLDER.acks; then, when that is dead, with how it ended.
"""

import os
import random
import struct
import sys
import warnings

import torch

from sparsemem.bank import MemoryBank, folder, shards
from sparsemem.indexes.compiling import loops_for

NUM_ROWS, WIDTH, VALUE_WIDTH = 1500, 4, 2
SHARD_ROWS = 512  # small, so that the bank has several shards
ACK = struct.Struct("<Q")
OPTIONS = {
    "index": "IVF4,Flat",
    "metric": "l2",  # rows of one number each: the nearest is of the same number
    "min_recall": None,
    "exact_below": 64,
    "buffer_rows": 32,
}


def small_shards():
    """Shards of a few rows, in this process."""
    shards.SHARD_ROWS = folder.SHARD_ROWS = SHARD_ROWS


def operation(seed, number, rows, used):
    """The operation of a number on a bank with these rows: its name, and ids or a count.

    rows: {id: (number of the operation that wrote it, frozen)}; used: ids ever written.
    """
    draw = random.Random(f"{seed}-{number}")
    name = draw.choices(
        ["append", "write", "remove", "freeze", "unfreeze", "save", "rebuild", "read"],
        [34, 27, 12, 5, 5, 3, 3, 11],
    )[0]
    if name == "append":
        count = draw.randint(1, 30)
        return (name, count) if len(rows) + count <= NUM_ROWS else ("remove", sorted(rows)[::2])
    known = sorted(rows)
    if name == "write":
        return name, sorted(draw.sample(range(NUM_ROWS), draw.randint(1, 30)))
    if name in ("remove", "freeze", "unfreeze"):
        return name, sorted(draw.sample(known, min(len(known), draw.randint(1, 30))))
    return name, None


def foresee(seed, number, rows, used):
    """What rows and used ids are after an operation."""
    name, what = operation(seed, number, rows, used)
    rows, used = dict(rows), set(used)
    if name == "append":
        unused = [row for row in range(NUM_ROWS) if row not in used]
        removed = sorted(used - rows.keys())
        what = (unused + removed)[:what]
    if name in ("append", "write"):
        for row in what:
            rows[row] = (number, name == "write" and row in rows and rows[row][1])
            used.add(row)
    elif name == "remove":
        for row in what:
            del rows[row]
    elif name in ("freeze", "unfreeze"):
        for row in what:
            rows[row] = (rows[row][0], name == "freeze")
    return rows, used


def perform(bank, seed, number, rows, used):
    """The same on the bank itself. All numbers in a row say which operation wrote it."""
    name, what = operation(seed, number, rows, used)

    def filled(count, width):
        return torch.full((count, width), float(number))

    if name == "append":
        bank.append(filled(what, WIDTH), filled(what, VALUE_WIDTH))
    elif name == "write":
        bank.write(torch.tensor(what), filled(len(what), WIDTH), filled(len(what), VALUE_WIDTH))
    elif name in ("remove", "freeze", "unfreeze"):
        getattr(bank, name)(torch.tensor(what, dtype=torch.int64))
    elif name == "save":
        bank.save()
    elif name == "rebuild":
        bank.index.rebuild()
    else:
        bank.read(torch.randn(8, WIDTH), 4)


def contents(bank):
    """{id: (number of the operation that wrote it, frozen)}; a row that is torn is refused."""
    ids = bank.book.live.nonzero().squeeze(1)
    table = torch.cat([bank.keys.detach()[ids], bank.values.detach()[ids]], 1)
    torn = ids[(table != table[:, :1]).any(1)]
    assert not len(torn), f"rows {torn.tolist()} are torn"
    columns = (ids.tolist(), table[:, 0].long().tolist(), bank.book.frozen[ids].tolist())
    return {row: (number, frozen) for row, number, frozen in zip(*columns, strict=True)}


def run(path, first, seed):
    """Load the bank and run operations from a number on, until killed."""
    warnings.simplefilter("ignore")
    acks = os.open(f"{path}.acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    bank = MemoryBank.load(path)
    rows = contents(bank)
    used = set((bank.book.live | bank.book.last_access.ne(0)).nonzero().squeeze(1).tolist())
    number = first
    while True:
        perform(bank, seed, number, rows, used)
        os.write(acks, ACK.pack(number))
        rows, used = foresee(seed, number, rows, used)
        number += 1


def main():
    """Serve forks: importing torch takes seconds, forking does not."""
    torch.set_num_threads(1)  # nothing to fork but this thread
    small_shards()
    loops_for(torch.zeros(1))  # compiled or loaded here: no fork lives for so long
    for line in sys.stdin:
        path, first, seed = line.split()
        child = os.fork()
        if not child:
            try:
                run(path, int(first), seed)
            finally:
                os._exit(1)  # only an error ends it
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

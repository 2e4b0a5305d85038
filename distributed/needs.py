"""What a run over shards takes: memory of each process, and bytes that a step sends."""

from __future__ import annotations

from sparsemem.distributed.cluster import Group, Resources, Wanted
from sparsemem.indexes.factory import EXACT
from sparsemem.training.banks import make_bank
from sparsemem.training.config import Config
from sparsemem.training.optimisers import make_row_optimiser
from sparsemem.training.plan import plan_memory, process_bytes
from sparsemem.training.setup import device_of

SAMPLE_ROWS = 1024  # of a bank, to see what a row takes
INDEX_ROW_BYTES = 32  # of a FAISS index beside a row's numbers: ids, places, its list


def groups_of(config: Config, wanted: Wanted) -> list[Group]:
    """The processes of a run, shards first, with what each takes. A resolved config."""
    shard = Resources(1, 0, float(shard_bytes(config, wanted.shards)))
    gpus = float(device_of(config).type == "cuda")
    worker = Resources(config.training.threads, gpus, float(worker_bytes(config, wanted.workers)))
    return [Group("shard", wanted.shards, shard), Group("worker", wanted.workers, worker)]


def shard_bytes(config: Config, num_shards: int) -> int:
    """Memory of a shard's process: rows, what is known of each, optimiser state, index; libraries.

    An index that is trained anew is there twice.
    """
    assert config.bank is not None
    rows = -(-config.bank.num_rows // num_shards)
    index = 0
    if config.bank.index != EXACT:
        index = 2 * (4 * config.bank.width + INDEX_ROW_BYTES)
    return int(rows * (row_bytes(config) + index)) + process_bytes()


def row_bytes(config: Config) -> float:
    """Memory of a row with what is known of it and the optimiser's state."""
    assert config.bank is not None
    bank = make_bank(config, num_rows=SAMPLE_ROWS, index=EXACT, initial="empty")
    optimiser = make_row_optimiser(config.bank.optimizer, bank.tables)
    (group,) = optimiser.param_groups
    states = [optimiser._zero_state(table, True, group) for table in bank.tables]
    taken = sum(value.nbytes for state in states for value in state.values())
    return (int(bank.stats()["table_bytes"]) + taken) / SAMPLE_ROWS


def worker_bytes(config: Config, num_workers: int) -> int:
    """Memory of a worker's process at the peak of a training step, as `sparsemem plan` has it.

    Of its share of the batch, and with next to no rows: they are in the shards.
    """
    assert config.bank is not None
    training = config.training
    share = training.model_copy(update={"batch_size": training.batch_size // num_workers})
    few = config.bank.model_copy(update={"num_rows": min(config.bank.num_rows, SAMPLE_ROWS)})
    alone = config.model_copy(update={"training": share, "bank": few})
    return plan_memory(alone).plan.memory.process

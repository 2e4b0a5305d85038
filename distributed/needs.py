"""What a run over shards takes: memory of each process, and bytes that a step sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel

from sparsemem.distributed.cluster import Group, Resources, Wanted, counted
from sparsemem.distributed.subkeys import of_values
from sparsemem.distributed.traffic import StepBytes, wire_bytes
from sparsemem.distributed.trying import check_wanted, on_device
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY
from sparsemem.layers import MemoryLayer
from sparsemem.training.bankplan import FEW_ROWS, bank_bytes, sub_key_bytes
from sparsemem.training.config import Bank, Config
from sparsemem.training.plan import (
    Memory,
    Planned,
    empty_model,
    plan_memory,
    process_bytes,
    show_bytes,
)


class SpreadPlan(BaseModel):
    """What a config takes over shards. Bytes; of a step those of one worker."""

    shards: int
    workers: int
    shard_memory: int
    worker_memory: int
    rows_sent: int  # to all shards
    rows_received: int
    gradients_sent: int  # to other workers, and as many received

    @property
    def step_bytes(self) -> int:
        """What all workers send and receive in a step, each byte once."""
        return self.workers * (self.rows_sent + self.rows_received + self.gradients_sent)


def plan_spread(config: Config, wanted: Wanted) -> SpreadPlan:
    """Plan a config over shards. ConfigError where it is wrong, or cannot be shared out so."""
    check_wanted(config, wanted)
    planned = worker_plan(config, wanted.workers)
    sent, received = reading_bytes(planned, wanted.shards, wanted.workers)
    dense = planned.plan.memory.gradients  # sub-keys among them
    return SpreadPlan(
        shards=wanted.shards,
        workers=wanted.workers,
        shard_memory=shard_bytes(config, wanted.shards),
        worker_memory=planned.plan.memory.process,
        rows_sent=sent,
        rows_received=received,
        gradients_sent=2 * (wanted.workers - 1) * dense // wanted.workers,  # in a ring
    )


def groups_of(config: Config, wanted: Wanted) -> list[Group]:
    """The processes of a run, shards first, with what each takes. A resolved config.

    Of a worker with a GPU its memory on the host is counted as if it had none.
    """
    gpus = float(torch.device(config.training.device).type == "cuda")
    memory = float(worker_plan(config, wanted.workers).plan.memory.process)
    worker = Resources(float(config.training.threads), gpus, memory)
    shard = Resources(1.0, 0.0, float(shard_bytes(config, wanted.shards)))
    return [Group("shard", wanted.shards, shard), Group("worker", wanted.workers, worker)]


def shard_bytes(config: Config, num_shards: int) -> int:
    """Memory of a shard's process: its rows with all that belongs to them, and libraries."""
    assert config.bank is not None
    rows = -(-config.bank.num_rows // num_shards)
    own = bank_bytes(with_bank(config, **shards_arguments(config.bank) | {"num_rows": rows}))
    return own.rows + own.derived + own.optimiser + own.saving + process_bytes()


def worker_plan(config: Config, num_workers: int) -> Planned:
    """The plan of a worker alone: its share of the batch, on the host.

    With next to no rows, but all sub-keys.
    """
    assert config.bank is not None
    share = {"batch_size": config.training.batch_size // num_workers}
    training = on_device(config, "cpu").training.model_copy(update=share)
    few = with_bank(config, num_rows=min(config.bank.num_rows, FEW_ROWS))
    planned = plan_memory(few.model_copy(update={"training": training}))
    memory = with_sub_keys(planned.plan.memory, few, config)
    return planned._replace(plan=planned.plan.model_copy(update={"memory": memory}))


def with_sub_keys(memory: Memory, few: Config, config: Config) -> Memory:
    """The memory of a worker that has the sub-keys of `config`, from that of one with a few."""
    counted, all_of_them = sub_key_bytes(few), sub_key_bytes(config)
    keys = all_of_them.keys - counted.keys
    state = all_of_them.optimiser - counted.optimiser
    more = {
        "bank": keys,
        "row_optimiser": state,
        "gradients": all_of_them.keys,  # as of other dense parameters, which workers average
        "evaluation": keys + state,
        "saving": 4 * (keys + state),  # a copy, and the file in memory, twice
    }
    return memory.model_copy(
        update={name: getattr(memory, name) + size for name, size in more.items()}
    )


def with_bank(config: Config, **changes: Any) -> Config:
    """A config with some values of its section `bank` changed."""
    assert config.bank is not None
    bank: Bank = config.bank.model_copy(update=changes)
    return config.model_copy(update={"bank": bank})


def shards_arguments(bank: Bank) -> dict[str, Any]:
    """What the shards' banks are made with: of product keys they hold the values."""
    given = dict(bank)
    return of_values(given) if bank.index == PRODUCT_KEY else given


def reading_bytes(planned: Planned, num_shards: int, num_workers: int) -> StepBytes:
    """Bytes of a training step between one worker and the shards, on sequences of mean length.

    At most: rows that are read more than once in a step are counted as often.
    """
    config, task, lengths, _ = planned
    assert config.bank is not None
    model = empty_model(config, task)
    positions = round(config.training.batch_size * lengths.mean)
    shards = with_bank(config, **shards_arguments(config.bank)).bank
    assert shards is not None
    number = 8 if config.bank.dtype == "float64" else 4
    row = getattr(torch, config.bank.dtype or config.training.dtype).itemsize
    each = [
        wire_bytes(
            num_shards,
            positions * layer.num_heads,
            layer.top_k,
            shards.width,
            shards.value_width,
            row_bytes=row,
            gradient_bytes=number,
            number_bytes=number,
            exact=shards.index == EXACT,
            pushed=num_workers > 1,
            by_sub_keys=config.bank.index == PRODUCT_KEY,
        )
        for layer in model.modules()
        if isinstance(layer, MemoryLayer)
    ]
    return StepBytes(sum(part.sent for part in each), sum(part.received for part in each))


def lines(plan: SpreadPlan) -> Iterable[str]:
    """The plan for people."""
    shards, workers = counted(plan.shards, "shard"), counted(plan.workers, "worker")
    memory = plan.shards * plan.shard_memory + plan.workers * plan.worker_memory
    yield f"memory    {show_bytes(memory)} in all"
    yield f"  {shards:<12} {show_bytes(plan.shard_memory)} each: rows, optimiser, index, libraries"
    yield f"  {workers:<12} {show_bytes(plan.worker_memory)} each: the model, its share of a batch"
    yield f"network   {show_bytes(plan.step_bytes)} a step"
    to_shards = f"{show_bytes(plan.rows_sent)} to the shards, {show_bytes(plan.rows_received)} back"
    yield f"  each worker  {to_shards}, {show_bytes(plan.gradients_sent)} to other workers"

"""What a config will take, before anything of its size is allocated: memory, disk, network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel

from sparsemem.models.base import MemoryModel
from sparsemem.models.registry import make_model
from sparsemem.models.sam import SAMCell
from sparsemem.tasks import Task
from sparsemem.training.bankplan import PROBE_ROWS, BankBytes, bank_bytes, probe_bank
from sparsemem.training.banks import check_bank_section, dense_parameters
from sparsemem.training.config import Config
from sparsemem.training.curriculum import make_curriculum
from sparsemem.training.dryrun import (
    StepBytes,
    StepSizes,
    is_sparse,
    linear,
    optimiser_bytes,
    step_bytes,
)
from sparsemem.training.errors import ConfigError, section_errors
from sparsemem.training.machine import Where, kib, machine_bytes, taken_bytes, where_of
from sparsemem.training.optimisers import make_optimiser
from sparsemem.training.setup import build_task, device_of, dtype_of, placed, resolve

STATUS = Path("/proc/self/status")
LOW_LEVELS = (64, 128)  # beyond them lengths are extrapolated: sequences may be longer than memory
DRAWS, BATCHES = 32, 4
MANIFEST_BYTES, RANDOM_STATE_BYTES, RECORD_BYTES = 8_192, 5_056, 256
PROBE_HIDDEN = (128, 256)  # of sparse models that have more: activations are linear in it
SIZES_OF_BANK = {"num_slots": "num_rows", "slot_dim": "width"}  # that a model has from its bank
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Lengths(NamedTuple):
    """Steps of the sequences of a run, at the end of its curriculum."""

    longest: int
    mean: float
    evaluation: int


class Memory(BaseModel):
    """Bytes at the peak of a training step, by what takes them, and at other times.

    `step` is what torch's profiler counts of tensors, parameters included; `process` what the
    process takes: Python and the libraries, and the most of `step`, an evaluation, and the copies
    that saving a checkpoint makes. All of it is on the device: for a GPU, the libraries are what is
    taken there already (0: the GPU is not here), and the copies, which are on the host, are left
    out.
    """

    parameters: int
    gradients: int
    optimiser: int
    memory: int  # of the slots touched by sparse models, with the buffer of their gradient
    bank: int = 0  # rows, what is known of each, and the index where it lies with them
    row_optimiser: int = 0  # state of what steps the rows
    activations: int
    graphs: int  # what CUDA graphs keep for themselves, beside what sequences take that run plainly
    data: int
    evaluation: int
    saving: int
    libraries: int

    @property
    def step(self) -> int:
        """Tensors at the peak of a training step."""
        held = self.parameters + self.gradients + self.optimiser + self.bank + self.row_optimiser
        return held + self.memory + self.activations + self.graphs + self.data

    @property
    def process(self) -> int:
        """The whole process at its peak."""
        return self.libraries + max(self.step, self.evaluation, self.saving)

    def sum(self) -> str:
        """The peak of a training step as a sum, largest first, without what is nothing."""
        held = ("parameters", "gradients", "optimiser", "memory", "bank", "row_optimiser")
        names = (*held, "activations", "graphs", "data")
        parts = sorted(((getattr(self, name), name) for name in names), reverse=True)
        sizes = ((name.replace("_", " "), show_bytes(size)) for size, name in parts if size)
        shown = " + ".join(f"{name} {size}" for name, size in sizes)
        return f"{show_bytes(self.step)} = {shown}"


class Disk(BaseModel):
    """Bytes that a run leaves on the disk, and at most while it writes a checkpoint."""

    checkpoint: int
    kept: int  # checkpoints
    metrics: int

    @property
    def total(self) -> int:
        """With the one that is being written."""
        return (self.kept + 1) * self.checkpoint + self.metrics


class Network(BaseModel):
    """Bytes that a training step sends: none, as long as a memory is on one machine."""

    workers: int = 1
    bytes_a_step: int = 0


class Seconds(BaseModel):
    """Time of a training step, and of all of them without validation and checkpoints."""

    step: float
    total: float


class Plan(BaseModel):
    """What a config will take."""

    memory: Memory
    disk: Disk
    network: Network
    longest_sequence: int
    machine_bytes: int | None
    device_here: bool = True  # else there is nothing to compare memory with, nor to take times on
    notes: tuple[str, ...] = ()  # on what the figures leave out
    seconds: Seconds | None = None

    @property
    def fits(self) -> bool:
        """Whether the machine has that much memory at all; True where that is not known."""
        return self.machine_bytes is None or self.memory.process <= self.machine_bytes


class Planned(NamedTuple):
    """A config as resolved, what it names without data, and the plan of it."""

    config: Config
    task: Task
    lengths: Lengths
    plan: Plan


def plan_memory(config: Config) -> Planned:
    """Plan everything but time. ConfigError where the config is wrong, or too large to add up.

    A GPU need not be here: what a sparse model takes is then found on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        check_bank_section(config)
        where = where_of(config)
        task = build_task(config, config.training.batch_size)
        model = empty_model(config, task)
        config = resolve(config, task)
        lengths = lengths_of(config, task)
        rows = bank_bytes(config, where.device.type, where.here)
        memory, state = _memory(config, task, model, lengths, rows)
    plan = Plan(
        memory=memory,
        disk=_disk(config, memory.parameters + state + rows.optimiser, rows.snapshot),
        network=Network(),
        longest_sequence=lengths.longest,
        machine_bytes=machine_bytes(where.device) if where.here else None,
        device_here=where.here,
        notes=tuple(_notes(config, where, rows, is_sparse(model.cell))),
    )
    return Planned(config, task, lengths, plan)


def check_fits(config: Config) -> None:
    """ConfigError, with the sum, if the config cannot fit into the machine's memory.

    Or if the machine does not have its device.
    """
    device_of(config)
    plan = plan_memory(config).plan
    if not plan.fits:
        assert plan.machine_bytes is not None
        raise ConfigError(
            f"the config does not fit in memory: a training step needs {plan.memory.sum()};"
            f" the process {show_bytes(plan.memory.process)}, the machine has"
            f" {show_bytes(plan.machine_bytes)}"
        )


def _notes(config: Config, where: Where, rows: BankBytes, sparse: bool) -> Iterator[str]:
    """What the figures of a plan leave out."""
    if not where.here:
        yield (
            f"{where.missing}: memory is not compared with the device's, and is without what the"
            " libraries take there; time is not predicted"
        )
        if sparse:
            yield f"model {config.model.name!r} was tried on the CPU: activations may differ"
    name = "" if config.bank is None else config.bank.index
    if rows.on_host:
        yield f"index {name!r} is kept on the host: its {show_bytes(rows.on_host)} are not counted"
    elif rows.derived and where.device.type == "cuda":
        yield (
            f"index {name!r} is counted without what FAISS keeps free in its lists on a GPU, and as"
            " if a quarter of the rows, at most, changed while lists are trained"
        )


def empty_model(config: Config, task: Task) -> MemoryModel:
    """The config's model on the meta device: shapes without data."""
    return model_on(torch.device("meta"), config, task)


def model_on(
    device: torch.device, config: Config, task: Task, indexed: bool = False, **changes: int
) -> MemoryModel:
    """The config's model on a device, with some of its options changed.

    Over a bank of few rows (`probe_bank`), as many as `num_slots` says if that is changed.
    """
    sizes = {"input_size": task.input_size, "output_size": task.output_size}
    options = {**config.model.options, **changes}
    bank = probe_bank(config, changes.get("num_slots", PROBE_ROWS), device, indexed)
    if bank is not None:
        options = {key: value for key, value in options.items() if key not in SIZES_OF_BANK}
        given = config.model.options
        options |= {key: getattr(bank, of) for key, of in SIZES_OF_BANK.items() if key in given}
    with section_errors("model"), device:
        model = make_model(config.model.name, bank, **sizes, **options)
    return placed(model, bank, device, dtype_of(config))


# Sequences -----------------------------------------------------------------------------


def lengths_of(config: Config, task: Task) -> Lengths:
    """Longest and mean sequences at the end of the curriculum, and those of the evaluation."""
    curriculum = config.curriculum
    assert curriculum.maximum is not None
    assert config.evaluation.level is not None
    drawn = make_curriculum(
        curriculum.model_copy(update={"initial": None, "name": "fixed"}), config.training.seed
    )
    with section_errors(None):
        mean = sum(_length(task, drawn.level(step)) for step in range(DRAWS)) / DRAWS
        longest = _length(task, curriculum.maximum)
        evaluation = _length(task, config.evaluation.level)
    return Lengths(int(longest), mean, int(evaluation))


def _length(task: Task, level: int) -> float:
    """Steps of the longest sequence of a few batches at a level."""

    def steps(level: int) -> int:
        return max(task.batch(index, level).input.shape[1] for index in range(BATCHES))

    if level <= LOW_LEVELS[1] or task.max_level <= LOW_LEVELS[1]:
        return float(steps(level))
    low, high = LOW_LEVELS
    return linear(LOW_LEVELS, (float(steps(low)), float(steps(high))), level)


# Memory --------------------------------------------------------------------------------


def _memory(
    config: Config, task: Task, model: MemoryModel, lengths: Lengths, rows: BankBytes
) -> tuple[Memory, int]:
    """The parts of a training step's peak, and the bytes of the dense optimiser's state."""
    training = config.training
    parameters = dense_parameters(model)
    held = sum(parameter.nbytes for parameter in parameters)
    optimiser = make_optimiser(training.optimizer, parameters)
    state, temporary = optimiser_bytes(optimiser, model)
    chunk = min(lengths.longest, training.truncate or lengths.longest)
    sizes = StepSizes(training.batch_size, chunk, lengths.longest)
    found = _pass_bytes(config, task, model, sizes)
    evaluated = StepSizes(config.evaluation.batch_size, lengths.evaluation, lengths.evaluation)
    where = where_of(config)
    on_gpu = where.device.type == "cuda"
    # The optimiser's temporaries come when the activations are gone.
    activations = int(max(found.rest - held, temporary - found.memory))
    of_bank = rows.rows + rows.derived
    kept = held + state + rows.optimiser
    whole = config.bank is None and chunk == lengths.longest
    captured = on_gpu and training.capture == "auto" and whole
    memory = Memory(
        parameters=held,
        gradients=held,
        optimiser=state,
        memory=int(found.memory),
        bank=of_bank,
        row_optimiser=rows.optimiser,
        activations=activations,
        graphs=activations + int(found.memory) if captured else 0,
        data=_data_bytes(config, task, sizes),
        evaluation=int(kept + of_bank + sum(_pass_bytes(config, task, model, evaluated, False))),
        # On the host all of it, a copy, and the file in memory, twice.
        saving=int((1 if on_gpu else 4) * kept + of_bank + rows.saving),
        libraries=_library_bytes(where),
    )
    return memory, state


def _pass_bytes(
    config: Config, task: Task, model: MemoryModel, sizes: StepSizes, training: bool = True
) -> StepBytes:
    """`step_bytes` of the config's model, or of a narrower one where that is sparse and wide."""
    if not is_sparse(model.cell):
        return step_bytes(model, sizes, training)
    where, hidden = where_of(config), model.cell.hidden_size
    held = sum(parameter.nbytes for parameter in dense_parameters(model)) if training else 0

    def beyond(width: int) -> StepBytes:
        """With a controller of a width, without gradients."""
        probe = model_on(where.trial, config, task, hidden_size=width)
        if where.device.type == "cuda" and isinstance(probe.cell, SAMCell):
            probe.cell.index_after = None  # touched rows are scanned there
        gradients = sum(p.nbytes for p in dense_parameters(probe)) if training else 0
        found = step_bytes(probe, sizes, training)
        return found._replace(rest=found.rest - gradients)

    if hidden <= PROBE_HIDDEN[1]:
        found = beyond(hidden)
        return found._replace(rest=found.rest + held)
    narrow, wide = (beyond(width) for width in PROBE_HIDDEN)
    rest = linear(PROBE_HIDDEN, (narrow.rest, wide.rest), hidden)
    return StepBytes(wide.memory, rest + held)


def _data_bytes(config: Config, task: Task, sizes: StepSizes) -> int:
    """A batch (inputs, targets, mask) and the outputs of all its chunks."""
    number = torch.empty(0, dtype=dtype_of(config)).element_size()
    step = number * (2 * task.output_size) + 1
    # The input of one chunk counts with its activations; here is that of the others.
    rest = number * task.input_size * (sizes.steps - sizes.chunk)
    return sizes.batch * (step * sizes.steps + rest)


def _disk(config: Config, tensors: int, snapshot: int) -> Disk:
    training = config.training
    records = training.steps // training.log_every
    if training.evaluate_every is not None:
        records += training.steps // training.evaluate_every
    best = training.evaluate_every is not None  # kept beside the last ones
    saved = 1 + training.steps // training.checkpoint_every
    return Disk(
        checkpoint=tensors + snapshot + RANDOM_STATE_BYTES + MANIFEST_BYTES,
        kept=min(training.keep_checkpoints + best, saved),
        metrics=records * RECORD_BYTES,
    )


# The machine ---------------------------------------------------------------------------


def _library_bytes(where: Where) -> int:
    """What is taken, before there is anything of the config; 0: the device is not here."""
    if where.device.type != "cuda":
        return process_bytes()
    return taken_bytes(where.device) if where.here else 0


def process_bytes() -> int:
    """What this process, with Python and the libraries, has in memory now."""
    return kib(STATUS, "VmRSS") if STATUS.exists() else 0


def show_bytes(value: int | float) -> str:
    """1.23 MiB."""
    for unit in UNITS:
        if abs(value) < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def lines(plan: Plan) -> list[str]:
    """The plan for people."""
    memory, disk = plan.memory, plan.disk
    there = "" if plan.machine_bytes is None else f" of {show_bytes(plan.machine_bytes)}"
    found = [
        f"memory    {show_bytes(memory.process)}{there}{'' if plan.fits else ': DOES NOT FIT'}",
        f"  training step  {memory.sum()} (sequences of up to {plan.longest_sequence} steps)",
        f"  evaluation     {show_bytes(memory.evaluation)}",
        f"  saving         {show_bytes(memory.saving)}",
        f"  libraries      {show_bytes(memory.libraries) if plan.device_here else 'not known'}",
        f"disk      {show_bytes(disk.total)}: {disk.kept} checkpoints of"
        f" {show_bytes(disk.checkpoint)}, one being written, metrics",
        f"network   {plan.network.bytes_a_step} bytes a step, {plan.network.workers} worker",
    ]
    if plan.seconds is not None:
        step, total = plan.seconds.step, plan.seconds.total
        found.append(
            f"time      {step * 1e3:.3g} ms a training step, {total / 60:.3g} minutes in all"
        )
    return found + [f"note      {note}" for note in plan.notes]

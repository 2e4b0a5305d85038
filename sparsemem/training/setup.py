"""From a config to what it names: the task, the model, and a description of both."""

from __future__ import annotations

import inspect
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsemem.bank.contract import Bank
from sparsemem.models.base import MemoryModel
from sparsemem.models.captured import Captured, captured
from sparsemem.models.registry import bank_argument, find_model, make_model, model_options
from sparsemem.tasks import Task, make_task, task_options
from sparsemem.training import config as configs
from sparsemem.training.banks import (
    Keeper,
    check_bank_section,
    dense_parameters,
    dense_state,
    keeper_of,
    make_bank,
)
from sparsemem.training.checkpoint import Checkpoint, check_tensors
from sparsemem.training.config import Config, make_config
from sparsemem.training.errors import CheckpointError, ConfigError, section_errors

_ELSEWHERE = {
    "seed": "say training.seed",
    "batch_size": "say training.batch_size or evaluation.batch_size",
    "dtype": "say training.dtype",
    "split": "training, validation and evaluation each take their own",
}

PATHS = {"path", "qa3_path"}  # options of tasks that name files


class Setup(NamedTuple):
    """A config as resolved, and what it names."""

    config: Config
    task: Task
    evaluation_task: Task
    model: MemoryModel
    bank: Bank | None = None  # that the model reads


def prepare(config: Config, bank: Bank | None = None) -> Setup:
    """Make what a config names, and write its defaults out.

    The model starts from `training.seed`. It reads `bank`, or else the one that the section `bank`
    describes, which is made here. ConfigError says which section was refused.
    """
    check_bank_section(config)
    task = build_task(config, config.training.batch_size)
    if config.bank is not None and bank is None:
        bank = make_bank(config, device=device_of(config))
    model = build_model(config, task, bank)
    resolved = resolve(config, task)
    evaluation_task = build_task(config, config.evaluation.batch_size)
    return Setup(resolved, task, evaluation_task, model, bank)


def check_split(setup: Setup, split: str) -> None:
    """ConfigError if there is nothing to evaluate on in a split, before hours of training."""
    wanted = setup.config.evaluation
    with section_errors(None):
        next(iter(setup.evaluation_task.evaluation_batches(split, 1, wanted.level)))


def build_task(config: Config, batch_size: int) -> Task:
    """The config's task, giving batches of `batch_size`."""
    given = {
        "seed": config.training.seed,
        "batch_size": batch_size,
        "dtype": config.training.dtype,
        "split": "train",
    }
    for key in given:
        if key in config.task.options:
            raise ConfigError(f"task.{key} is not an option here: {_ELSEWHERE[key]}")
    with section_errors("task"):
        return make_task(config.task.name, **given, **config.task.options)


def build_model(config: Config, task: Task, bank: Bank | None = None) -> MemoryModel:
    """The config's model with the task's sizes, freshly initialised from the config's seed.

    The bank stays as it is and where it is.
    """
    sizes = {"input_size": task.input_size, "output_size": task.output_size}
    for key in sizes:
        if key in config.model.options:
            raise ConfigError(f"model.{key} is given by the task ({sizes[key]}): leave it out")
    device = device_of(config)
    with section_errors("model"):
        torch.manual_seed(config.training.seed)
        model = make_model(config.model.name, bank, **sizes, **config.model.options)
    model = placed(model, bank, device, dtype_of(config))
    _check_computed_alike(config)
    return model


def _check_computed_alike(config: Config) -> None:
    """An episode computes in its bank's precision: ConfigError if that is not the model's."""
    if config.bank is None or bank_argument(config.model.name) != "memory":
        return
    dtype, wanted = config.bank.dtype or config.training.dtype, config.training.dtype
    if ("float64" if dtype == "float64" else "float32") != wanted:
        raise ConfigError(
            f"bank.dtype is {dtype!r}, expected one that is computed in training.dtype = {wanted}:"
            f" model {config.model.name!r} copies its rows"
        )


def placed(
    model: MemoryModel, bank: Bank | None, device: torch.device, dtype: torch.dtype
) -> MemoryModel:
    """The model itself, on a device and of a dtype, but for the bank that it reads."""
    left: list[nn.Module] = list(bank.modules()) if isinstance(bank, nn.Module) else []

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    for module in model.modules():
        if not any(module is other for other in left):
            module._apply(move, recurse=False)  # type: ignore[no-untyped-call]
    return model


def as_trained(config: Config, model: MemoryModel) -> MemoryModel | Captured:
    """What training calls: the model itself, or on a GPU its whole sequences as CUDA graphs.

    Where batches come in chunks, or shapes vary a lot, the model itself is run even so.
    """
    if device_of(config).type != "cuda" or config.training.capture == "off":
        return model
    return captured(model)


def load_model(setup: Setup, checkpoint: Checkpoint, keeper: Keeper | None = None) -> None:
    """Give the model the parameters of a checkpoint, once they are known to be its own.

    And its bank the rows, as the keeper has them (None: the one that suits the bank).

    CheckpointError if they are of another model, or of a task whose inputs and outputs mean
    something else, such as other words.
    """
    config, model, task = setup.config, setup.model, setup.task
    name = checkpoint.manifest["model"]["name"]
    if name.lower() != config.model.name.lower():
        raise CheckpointError(
            f"{checkpoint.path} is of model {name!r}, expected {config.model.name!r}"
        )
    tensors = checkpoint.part("model")
    own = dense_state(model, setup.bank)
    check_tensors(tensors, own, checkpoint.path, config.model.name)
    identity = checkpoint.manifest["task"]["identity"]
    if identity != task.identity:
        raise CheckpointError(
            f"{checkpoint.path} was trained on inputs of another meaning: identity of its task"
            f" {identity[:12] or 'none'}, of task {config.task.name} as configured"
            f" {task.identity[:12] or 'none'} (for babi: the vocabulary, given by tasks and path;"
            " for facts: map_seed, key_bits and value_bits)"
        )
    (keeper or keeper_of(setup.bank)).restore(checkpoint)
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


def resolve(config: Config, task: Task) -> Config:
    """The config with the defaults of its model and task written out, and paths absolute.

    So a run keeps its meaning when defaults change later, and in other folders. The
    curriculum's minimum is the task's, or less if the levels given are all below it.
    """
    defaults = {
        key: value
        for key, value in model_options(config.model.name).items()
        if value is not inspect.Parameter.empty
    }
    tree = config.model_dump()
    if config.bank is not None:
        _resolve_bank(config, tree["bank"], defaults)
    tree["model"] = {**tree["model"], **defaults, **config.model.options}
    tree["task"] |= _task_defaults(config.task.name) | config.task.options
    for key in PATHS & tree["task"].keys():
        if tree["task"][key] is not None:
            tree["task"][key] = str(Path(tree["task"][key]).absolute())
    curriculum, evaluation = tree["curriculum"], tree["evaluation"]
    highest = [curriculum[key] for key in ("initial", "maximum") if curriculum[key] is not None]
    for key, level in (
        ("minimum", min([task.min_level, *highest[:1]])),
        ("maximum", task.max_level),
    ):
        if curriculum[key] is None:
            curriculum[key] = level
    if evaluation["level"] is None:
        evaluation["level"] = curriculum["maximum"]
    resolved = make_config(tree)
    for path in ("curriculum.minimum", "curriculum.maximum", "evaluation.level"):
        section, key = path.split(".")
        with section_errors(None):
            task.check_level(tree[section][key], path)
    return resolved


def _resolve_bank(config: Config, bank: dict[str, Any], model_defaults: dict[str, Any]) -> None:
    """Write out a bank's defaults, and the sizes that a model has from its bank."""
    for key, value in (("dtype", config.training.dtype), ("seed", config.training.seed)):
        if bank[key] is None:
            bank[key] = value
    for key, size in (("num_slots", "num_rows"), ("slot_dim", "width")):
        if key in model_defaults:
            model_defaults[key] = bank[size]


def _task_defaults(name: str) -> dict[str, Any]:
    """Defaults of a task's own options, as a config file has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in task_options(name).items()
        if key not in _ELSEWHERE and value is not inspect.Parameter.empty
    }


def device_of(config: Config) -> torch.device:
    """The device that the config names, if this machine has it."""
    name = config.training.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"training.device is {name!r}, not usable here: {reason}") from None
    if device.type == "meta":
        raise ConfigError("training.device is 'meta', which holds no values: expected another")
    return device


def dtype_of(config: Config) -> torch.dtype:
    """The torch dtype that the config names."""
    return {"float32": torch.float32, "float64": torch.float64}[config.training.dtype]


def describe(config: Config, model: MemoryModel) -> str:
    """What is about to run, for the first lines of a log."""
    count = sum(parameter.numel() for parameter in dense_parameters(model))
    options = config.model.options
    memory = f", {options['num_slots']:,} slots" if options.get("num_slots") else ""
    memory += f" of width {options['slot_dim']}" if memory and options.get("slot_dim") else ""
    if config.bank is not None:
        memory = f", a bank of {_shown(config.bank)}"
    training = config.training
    threads = f"{training.threads} thread{'s' if training.threads > 1 else ''}"
    return (
        f"model {find_model(config.model.name).__name__}, {count:,} parameters{memory};"
        f" task {config.task.name}\n"
        f"{training.device}, {threads}, {training.dtype}; sparsemem {package_version()},"
        f" torch {torch.__version__}, python {platform.python_version()}"
    )


def _shown(bank: configs.Bank) -> str:
    """A bank in a few words."""
    widths = f"width {bank.width}"
    if bank.value_width is not None:
        widths += f" and values of {bank.value_width}"
    return f"{bank.num_rows:,} rows of {widths}, index {bank.index}, {bank.optimizer.name}"


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("sparsemem")
    except PackageNotFoundError:
        return "(not installed)"


def differing_keys(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Dotted paths whose values differ between two nested mappings."""
    paths = []
    for key in [*old, *(key for key in new if key not in old)]:
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            paths += differing_keys(one, other, f"{path}{key}.")
        elif one != other:
            paths.append(f"{path}{key}")
    return paths

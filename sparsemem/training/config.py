"""The config of a run: what may be said in it, its defaults, and errors that name the place.

A config is YAML of five sections, or six. `model` and `task` name a model and a task and hold
their options; what those may be is known to `sparsemem.models.registry` and
`sparsemem.tasks`. The others are declared here; `bank` is for models that read one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sparsemem.checks import nearest
from sparsemem.training.errors import ConfigError


def _refuse_bool(value: Any) -> Any:
    # pydantic reads true as 1: `gradient_clip: true` would clip at norm 1 without a word.
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def _off(value: Any) -> Any:
    # YAML 1.1 reads off as false.
    return "off" if value is False else value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1)]
Natural = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Rate = Annotated[Float, Field(gt=0, le=1e30)]  # a float32 holds it


class Section(BaseModel):
    """Part of a config: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Named(BaseModel):
    """A name and the options of what it names, which whoever makes it checks."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything in the section but the name."""
        return dict(self.model_extra or {})


class Optimizer(Named):
    """A torch optimiser: its name, the learning rate at the start, its other options."""

    name: str = "adam"
    learning_rate: Rate = 1e-3


class Schedule(Section):
    """The learning rate over a run, as a factor of `training.optimizer.learning_rate`."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Natural = 0
    final: Annotated[Float, Field(ge=0, le=1)] = 0.0


class Training(Section):
    """How long, with what, and what is kept."""

    steps: Count = 10_000
    batch_size: Count = 16
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    gradient_clip: Positive | None = 10.0
    truncate: Count | None = None
    stop_below: Annotated[Float, Field(ge=0)] | None = None
    seed: Annotated[Natural, Field(lt=2**63)] = 0  # what torch takes
    threads: Annotated[Count, Field(le=1024)] = 1
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    capture: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    log_every: Count = 50
    evaluate_every: Count | None = 500
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _stop_needs_evaluation(self) -> Training:
        if self.stop_below is not None and self.evaluate_every is None:
            raise ValueError("stop_below needs evaluate_every: it looks at the validation metric")
        return self


class Curriculum(Section):
    """Difficulty over a run; see `sparsemem.training.curriculum`.

    `minimum` and `maximum` null are the task's own, `initial` null is `minimum`.
    """

    name: Literal["fixed", "exponential"] = "fixed"
    minimum: Count | None = None
    initial: Count | None = None
    maximum: Count | None = None
    threshold: Positive = 0.01
    window: Count = 100

    @model_validator(mode="after")
    def _levels_in_order(self) -> Curriculum:
        if self.initial is not None and self.name == "fixed":
            raise ValueError(
                "initial is for the exponential curriculum; fixed has minimum, maximum"
            )
        names = ("minimum", "initial", "maximum")
        given = [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
        for (low_name, low), (high_name, high) in pairwise(given):
            if low > high:
                raise ValueError(f"{low_name} is {low}, expected at most {high_name} = {high}")
        return self


class Evaluation(Section):
    """What validation and `sparsemem eval` look at; `level` null is the curriculum's maximum,
    `batches` null what the task takes (all of a data set, a few of an endless one).
    """

    batches: Count | None = None
    batch_size: Count = 32
    level: Count | None = None


class RowOptimizer(Named):
    """A row optimiser of `sparsemem.optim`: as `Optimizer`."""

    name: str = "adam"
    learning_rate: Rate = 1e-3


class Bank(Section):
    """The bank that the model reads: arguments of `MemoryBank`, and what steps its rows.

    `dtype` null is `training.dtype`, `seed` null `training.seed`. `background`, `buffer_rows` and
    `exact_below` are for FAISS indices (`FreshIndex`); null is the index's own default.
    """

    num_rows: Count
    width: Count
    value_width: Count | None = None
    index: str = "exact"
    metric: str = "cosine"
    min_recall: Annotated[Float, Field(ge=0, le=1)] | None = 0.95
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    initial: Literal["normal", "empty"] = "normal"
    seed: Annotated[Natural, Field(lt=2**63)] | None = None
    background: bool | None = None
    buffer_rows: Count | None = None
    exact_below: Count | None = None
    optimizer: RowOptimizer = Field(default_factory=RowOptimizer)


class Config(Section):
    """A run, whole."""

    model: Named
    task: Named
    bank: Bank | None = None
    training: Training = Field(default_factory=Training)
    curriculum: Curriculum = Field(default_factory=Curriculum)
    evaluation: Evaluation = Field(default_factory=Evaluation)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in 1e-3 and takes it for a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; `where` names it in errors."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{place}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deep") from None
    except (ValueError, TypeError) as error:  # a date of month 13, a list as a key
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `key=value` overrides, and check the whole."""
    return make_config(override(read_tree(path), overrides))


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a config file, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read config {path}: expected text in UTF-8") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected sections ({', '.join(Config.model_fields)}), found {tree!r:.60}"
        )
    return tree


def override(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with each `a.b=value` set; values are YAML."""
    result = copy.deepcopy(dict(tree))
    for setting in overrides:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {setting}: expected key=value, such as training.steps=1000")
        place = result
        for depth, key in enumerate(keys[:-1]):
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                raise ConfigError(f"--set {setting}: {'.'.join(keys[: depth + 1])} has no keys")
        place[keys[-1]] = parse_yaml(text, f"--set {path}")
    return result


def make_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping; every problem is a line of the error."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None


def dump_config(config: Config) -> str:
    """The config as YAML, which `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(detail: ErrorDetails) -> str:
    """One line: dotted path, value, what was expected."""
    keys = [str(key) for key in detail["loc"]]
    path = ".".join(keys)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path}: {nearest(keys[-1], _known_keys(keys[:-1]))}"
    if detail["type"] == "missing":
        return f"{path} is missing"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        return f"{path}: {message}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        message = "expected a section with keys of its own"
    return f"{path} is {detail['input']!r}, {_lower_first(message)}"


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]


def _known_keys(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for key in path:
        kind = section.model_fields[key].annotation
        section = next((part for part in get_args(kind) if part is not type(None)), kind)
    return list(section.model_fields)

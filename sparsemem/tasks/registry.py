"""Tasks by name, for configs and the command line."""

from __future__ import annotations

import inspect
from typing import Any

from sparsemem.checks import nearest
from sparsemem.tasks.babi import BabiTask
from sparsemem.tasks.base import Task
from sparsemem.tasks.copying import CopyTask, RepeatCopyTask
from sparsemem.tasks.facts import FactsTask
from sparsemem.tasks.ngrams import NGramsTask
from sparsemem.tasks.recall import AssociativeRecallTask
from sparsemem.tasks.sorting import PrioritySortTask

TASKS: dict[str, type[Task]] = {
    "copy": CopyTask,
    "repeat-copy": RepeatCopyTask,
    "associative-recall": AssociativeRecallTask,
    "priority-sort": PrioritySortTask,
    "ngrams": NGramsTask,
    "babi": BabiTask,
    "facts": FactsTask,
}


def find_task(name: str) -> type[Task]:
    """The class of a task; ValueError for an unknown name names the nearest known one."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    return TASKS[name]


def task_options(name: str) -> dict[str, Any]:
    """All options of a task with their defaults; `inspect.Parameter.empty` if required."""
    options: dict[str, Any] = {}
    # Base classes first, so that a subclass's own default wins.
    for kind in reversed(find_task(name).__mro__):
        if not issubclass(kind, Task) or "__init__" not in vars(kind):
            continue
        for parameter in inspect.signature(kind.__init__).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                options[parameter.name] = parameter.default
    return options


def make_task(name: str, **options: Any) -> Task:
    """Build a task: `make_task("copy", seed=1, batch_size=16, max_level=20)`.

    ValueError for an unknown name or option names the nearest known one and lists them
    all; what a value of an option may be, the task itself says.
    """
    known = task_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"unknown option {option!r} of task {name!r}: {nearest(option, known)}"
            )
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"task {name!r} needs the option {option!r}")
    return find_task(name)(**options)

"""Tasks: endless data sets of ready batches, each with a loss and a metric."""

from sparsemem.tasks.babi import BabiTask
from sparsemem.tasks.base import SPLITS, Batch, Task
from sparsemem.tasks.bits import BitTask
from sparsemem.tasks.copying import CopyTask, RepeatCopyTask
from sparsemem.tasks.facts import FactsTask
from sparsemem.tasks.ngrams import NGramsTask
from sparsemem.tasks.recall import AssociativeRecallTask
from sparsemem.tasks.registry import TASKS, find_task, make_task, task_options
from sparsemem.tasks.sorting import PrioritySortTask

__all__ = [
    "SPLITS",
    "TASKS",
    "AssociativeRecallTask",
    "BabiTask",
    "Batch",
    "BitTask",
    "CopyTask",
    "FactsTask",
    "NGramsTask",
    "PrioritySortTask",
    "RepeatCopyTask",
    "Task",
    "find_task",
    "make_task",
    "task_options",
]

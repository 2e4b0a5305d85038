"""The bAbI question-answering tasks 1-20 (Weston et al. 2015, arXiv 1502.05698).

Shape letters: B batch, T steps, V words of the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsemem.checks import check_fraction, check_size
from sparsemem.tasks.babi_files import (
    ANSWER,
    PARTS,
    VARIANTS,
    Story,
    TextFile,
    parse_stories,
    read_files,
    read_text_file,
)
from sparsemem.tasks.base import SPLITS, Batch, Task, check_choice, check_split

ALL_TASKS = tuple(range(1, 21))
POOL_BATCHES = 16  # stories of so many batches are sorted by length together


class BabiTask(Task):
    """Read stories word by word and answer the questions in them.

    As in Graves et al. 2016 (DNC, Methods): a story with all its questions is one
    sequence of lower-case words and the marks '.' and '?', one-hot; after a question, a
    '-' is shown for each word of its answer, and there the output counts. A question is
    right only if all words of its answer are. X = Y = V.

    Attributes: `vocabulary` (sorted words of train and test of the chosen tasks),
    `stories` (by split), `skipped` (by split, stories over `max_sentences` or
    `max_words`), `sources` (the files read).

    The level is the number of questions of a story that are shown: it is cut behind the
    answer to its level-th. `max_level` shows all stories whole, and is the only level drawn
    unless a curriculum asks for less.
    """

    metric_name = "error rate"

    def __init__(
        self,
        *,
        path: str | PathLike[str],
        tasks: Sequence[int] | int = ALL_TASKS,
        variant: str = "en-10k",
        qa3_path: str | PathLike[str] | None = None,
        validation_fraction: float = 0.1,
        max_sentences: int | None = None,
        max_words: int | None = None,
        **common: Any,
    ) -> None:
        """Read and parse the train and test files of `tasks`.

        `path`: the original archive, or a folder that holds it or its content. `qa3_path`:
        a training file to take for task 3 (`.txt` or `.txt.xz`), where the archive lacks it.
        `validation_fraction` of each task's training stories is set apart, always the same.

        Raises FileNotFoundError for a missing path or file, ValueError for a line that does
        not parse (with file and line number) and for an option out of range.
        """
        super().__init__(**common)
        self.tasks = check_tasks(tasks)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.validation_fraction = check_fraction("validation_fraction", validation_fraction)
        limits = {"max_sentences": max_sentences, "max_words": max_words}
        for name, limit in limits.items():
            if limit is not None:
                check_size(name, limit)
        folder = check_path("path", path, "the path of the bAbI archive or folder")
        if qa3_path is not None:
            qa3_path = check_path("qa3_path", qa3_path, "the path of a training file")
        files = find_files(folder, variant, self.tasks, qa3_path)
        self.sources = [file.name for file in files.values()]
        parsed = {key: parse_stories(key[0], file) for key, file in files.items()}
        self.vocabulary = build_vocabulary(parsed.values())
        self.word_ids = {word: index for index, word in enumerate(self.vocabulary)}
        self.input_size = self.output_size = len(self.vocabulary)
        self.stories = split_stories(parsed, validation_fraction)
        self.skipped = dict.fromkeys(SPLITS, 0)
        self._skip_long(limits)
        longest = max(len(s.answers) for stories in self.stories.values() for s in stories)
        self.level = self.min_level = self.max_level = longest
        self._plan: tuple[tuple[str, int], list[np.ndarray]] | None = None

    def _skip_long(self, limits: dict[str, int | None]) -> None:
        sentences, words = (limit or math.inf for limit in limits.values())
        for split, stories in self.stories.items():
            kept = [s for s in stories if s.sentences <= sentences and len(s.words) <= words]
            self.skipped[split] = len(stories) - len(kept)
            self.stories[split] = kept
        if not self.stories["train"] or not self.stories["test"]:
            raise ValueError(
                f"no story is left to train or to test on, with {limits} and"
                f" validation_fraction = {self.validation_fraction}"
            )
        if any(self.skipped.values()):
            counts = ", ".join(f"{number} {split}" for split, number in self.skipped.items())
            warnings.warn(f"bAbI stories skipped for {limits}: {counts}", stacklevel=3)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that hold each story of the current split once; the last may be smaller."""
        return math.ceil(len(self._stories_of(self.split)) / self.batch_size)

    def _stories_of(self, split: str) -> list[Story]:
        if not self.stories[check_split(split)]:
            raise ValueError(
                f"split is {split!r}, which has no stories"
                f" (validation_fraction is {self.validation_fraction})"
            )
        return self.stories[split]

    def make_batch(self, index: int, level: int) -> Batch:
        """Batch number `index`: an epoch is a permutation given by (seed, split, epoch)."""
        stories = self._stories_of(self.split)
        epoch, place = divmod(index, self.batches_per_epoch)
        if self._plan is None or self._plan[0] != (self.split, epoch):
            rng = np.random.default_rng([self.seed, SPLITS.index(self.split), epoch])
            lengths = np.array([len(story.words) for story in stories])
            self._plan = (self.split, epoch), plan_epoch(lengths, self.batch_size, rng)
        return self.encode([stories[i].cut(level) for i in self._plan[1][place]])

    def evaluation_batches(
        self, split: str = "test", count: int | None = None, level: int | None = None
    ) -> Iterator[Batch]:
        """All stories of `split` once, in an order that does not depend on the seed.

        With `count`, only so many batches of it: a sample of the stories. With `level`, only so
        many questions of each.
        """
        level = self.level if level is None else self.check_level(level)
        if count is not None:
            check_size("count", count)
        return self._batches([story.cut(level) for story in self._stories_of(split)], count)

    def _batches(self, stories: list[Story], count: int | None = None) -> Iterator[Batch]:
        lengths = np.array([len(story.words) for story in stories])
        plan = plan_epoch(lengths, self.batch_size, np.random.default_rng(0))
        return (self.encode([stories[i] for i in rows]) for rows in plan[:count])

    def encode(self, stories: list[Story]) -> Batch:
        """Stories as a batch as long as the longest of them; nothing counts in the padding."""
        shape = len(stories), max(len(story.words) for story in stories)
        input = torch.zeros(*shape, self.input_size, dtype=self.dtype)
        target = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, story in enumerate(stories):
            ids = torch.tensor([self.word_ids[word] for word in story.words])
            input[row, torch.arange(len(ids)), ids] = 1
            asked = [start + i for start, words in story.answers for i in range(len(words))]
            mask[row, asked] = True
            target[row, asked] = torch.tensor(
                [self.word_ids[word] for _, words in story.answers for word in words]
            )
        return Batch(input, target, mask)

    def normaliser(self, batch: Batch) -> Int[Tensor, ""]:
        """The number of answer words."""
        return batch.mask.sum()

    def summed_loss(self, output: Float[Tensor, "B T V"], batch: Batch) -> Float[Tensor, ""]:
        """Cross-entropy of the logits `output`, in nats, summed over the answer words."""
        return cross_entropy(output[batch.mask], batch.target[batch.mask], reduction="sum")

    def score(
        self, output: Float[Tensor, "B T V"], batch: Batch
    ) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
        """(questions answered wrongly, questions)."""
        mask = batch.mask
        begins = mask.clone()
        begins[:, 1:] &= ~mask[:, :-1]  # answers are apart: another question lies between
        question = begins.flatten().cumsum(0).view_as(mask)
        wrong = mask & (output.argmax(2) != batch.target)
        return torch.bincount(question[wrong]).count_nonzero(), begins.sum()

    @property
    def identity(self) -> str:
        """sha256 of the vocabulary: which word each id of inputs and outputs stands for."""
        return hashlib.sha256(" ".join(self.vocabulary).encode()).hexdigest()

    def parts(self) -> dict[str, Task]:
        """Each chosen task alone, with the vocabulary and the levels of all of them."""
        return {f"task {number}": self._only(number) for number in self.tasks}

    def has(self, split: str) -> bool:
        """Whether there are stories in a split."""
        return bool(self.stories[check_split(split)])

    def _only(self, number: int) -> BabiTask:
        other = copy.copy(self)
        other.tasks = (number,)
        other.stories = {
            split: [story for story in stories if story.task == number]
            for split, stories in self.stories.items()
        }
        other._plan = None
        return other


def check_tasks(tasks: Sequence[int] | int) -> tuple[int, ...]:
    """The chosen task numbers in order, if they are different numbers from 1 to 20."""
    numbers = tuple(tasks) if isinstance(tasks, Sequence) else (tasks,)
    integers = all(type(number) is int for number in numbers)
    if not integers or not numbers or len(set(numbers) & set(ALL_TASKS)) != len(numbers):
        raise ValueError(f"tasks is {tasks!r}, expected different numbers from 1 to 20")
    return tuple(sorted(numbers))


def check_path(name: str, path: str | PathLike[str], expected: str) -> Path:
    """Return `path` as a Path if it is one, or a text."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{name} is {path!r}, expected {expected}")
    return Path(path)


def find_files(
    path: Path, variant: str, tasks: tuple[int, ...], qa3_path: Path | None
) -> dict[tuple[int, str], TextFile]:
    """The train and test file of each task, by (task, part), in that order."""
    wanted = [(task, part) for task in tasks for part in PARTS]
    given = {}
    if qa3_path is not None and 3 in tasks:
        given[3, "train"] = read_text_file(qa3_path)
    files = read_files(path, variant, set(wanted) - set(given)) | given
    missing = [key for key in wanted if key not in files]
    if missing:
        names = ", ".join(f"{variant}/qa{task}_*_{part}.txt" for task, part in missing)
        hint = "; qa3_path can supply another file to train task 3 on"
        raise FileNotFoundError(
            f"path is '{path}', which lacks {names}{hint if (3, 'train') in missing else ''}"
        )
    return {key: files[key] for key in wanted}


def build_vocabulary(files: Iterable[list[Story]]) -> tuple[str, ...]:
    """All words and marks of all stories and answers, sorted."""
    words = {ANSWER}
    for stories in files:
        for story in stories:
            words.update(story.words)
            words.update(*(answer for _, answer in story.answers))
    return tuple(sorted(words))


def split_stories(
    parsed: dict[tuple[int, str], list[Story]], fraction: float
) -> dict[str, list[Story]]:
    """Stories by split. The validation part of a task's train file depends on nothing else."""
    stories: dict[str, list[Story]] = {split: [] for split in SPLITS}
    for (task, part), found in parsed.items():
        if part == "test":
            stories["test"] += found
            continue
        order = np.random.default_rng(task).permutation(len(found))
        apart = set(order[: round(fraction * len(found))].tolist())
        for number, story in enumerate(found):
            stories["validation" if number in apart else "train"].append(story)
    return stories


def plan_epoch(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every story once, in batches of stories of similar length, both in random order."""
    order = rng.permutation(len(lengths))
    size = POOL_BATCHES * batch_size
    pools = [order[start : start + size] for start in range(0, len(order), size)]
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]

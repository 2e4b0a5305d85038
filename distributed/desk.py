"""Where a team of trainers and the process that started them leave word for one another.

The desk is an actor of its own, which outlives the trainers. Member 0 leaves what a person would be
shown; the driver fetches it and shows it, and leaves word there when it is asked to stop.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sparsemem.training.progress import Progress, Silent
from sparsemem.training.signals import Stop

EVERY_SECONDS = 0.2  # between two words about steps
CLOSE_SECONDS = 10.0  # for the last word to arrive

Answer = Callable[[float], bool | None]


class Word(NamedTuple):
    """Something to show, as a method of `Shown` and its arguments."""

    method: str  # "at", "log" or "say"
    arguments: tuple[Any, ...]


class Desk:
    """The actor."""

    def __init__(self) -> None:
        self._words: list[Word] = []
        self._is_stopping = False
        self._starts = 0

    def begin(self) -> int:
        """A team starts; returns how many have before."""
        self._starts += 1
        return self._starts - 1

    def leave(self, words: list[Word]) -> bool:
        """What happened, in order; returns whether the team is to stop."""
        self._words += words
        return self._is_stopping

    def fetch(self) -> list[Word]:
        """What has been left since the last time."""
        words, self._words = self._words, []
        return words

    def stop(self) -> None:
        """The team is to stop."""
        self._is_stopping = True


class Reporter(Silent):
    """What member 0 has for a `Progress`: leaves word, and hears whether to stop.

    Args:
        leave: hands words to the desk, and returns a function of seconds to wait, which has the
            desk's answer, or None if there is none in that time.
        step: steps done.
    """

    def __init__(self, leave: Callable[[list[Word]], Answer], step: int) -> None:
        super().__init__()
        self.stop = Stop()  # gets a number once the team is to stop
        self._leave, self._step = leave, step
        self._answer: Answer | None = None
        self._due = 0.0

    def step(self, values: dict[str, float]) -> None:
        """A step is done. Of those between two words only the last is told."""
        self._step += 1
        if time.monotonic() >= self._due:
            self._tell(Word("at", (self._step, values)))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Values that were recorded."""
        self._tell(Word("log", (step, values)))

    def say(self, line: str) -> None:
        """A line that stays."""
        self._tell(Word("say", (line,)))

    def close(self) -> None:
        """Wait until the last word has arrived."""
        self._hear(CLOSE_SECONDS)

    def _tell(self, word: Word) -> None:
        self._due = time.monotonic() + EVERY_SECONDS
        self._hear(0.0)
        self._answer = self._leave([word])

    def _hear(self, patience: float) -> None:
        """The answer to the last word, if there is one within some seconds."""
        if self._answer is not None and self._answer(patience):
            self.stop.number = signal.SIGINT


class Shown(Progress):
    """What the driver shows: progress that may jump."""

    def at(self, step: int, values: dict[str, float]) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(values), refresh=False)
            self._bar.update(step - self._bar.n)


def show(words: Iterable[Word], progress: Shown) -> None:
    """Show what was left."""
    for method, arguments in words:
        getattr(progress, method)(*arguments)

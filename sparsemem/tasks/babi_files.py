"""Reading the bAbI tasks (Weston et al. 2015, arXiv 1502.05698), version 1.2.

Reads the original archive (any tar, compressed or not, never unpacked to disk) or an
unpacked folder. A line is `NUMBER SENTENCE.` or `NUMBER QUESTION?<tab>ANSWER<tab>SUPPORTS`;
the number 1 begins a new story.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

VARIANTS = ("en-10k", "en")
PARTS = ("train", "test")
ANSWER = "-"  # the word that asks the network for one word of an answer

_FILE = re.compile(r"qa(\d+)_(?:.*_)?(train|test)\.txt")
_ARCHIVE = re.compile(r".*(babi|tasks_1-20).*\.(tar(\.\w+)?|tgz|txz|tbz2?)", re.IGNORECASE)
_TORN = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)

FileKey = tuple[int, str]  # (task number, part)


class TextFile(NamedTuple):
    """A file's name for messages, and its content."""

    name: str
    content: bytes


class Sentence(NamedTuple):
    """A line without its number. `answer` is empty unless it is a question.

    `words` ends with one `ANSWER` for each word of the answer.
    """

    words: list[str]
    answer: tuple[str, ...]
    last_support: int  # the largest of the numbers of the supporting facts, or 0


@dataclass(slots=True)
class Story:
    """A story with its questions as one sequence of words.

    `words` holds one `ANSWER` for each word of an answer; `answers` holds, for each
    question, the position of its first one and the words of the answer.
    """

    task: int
    sentences: int
    words: list[str]
    answers: list[tuple[int, tuple[str, ...]]]

    def cut(self, questions: int) -> Story:
        """The story up to the answer of its question number `questions` (from 1)."""
        if questions >= len(self.answers):
            return self
        start, words = self.answers[questions - 1]
        return replace(
            self, words=self.words[: start + len(words)], answers=self.answers[:questions]
        )


def read_files(path: Path, variant: str, wanted: set[FileKey]) -> dict[FileKey, TextFile]:
    """The wanted files of an archive, or of a folder that holds the files or an archive.

    Files that are not there are left out. FileNotFoundError for a path that does not exist or
    holds no bAbI files; ValueError for a file that is not a readable archive.
    """
    if not path.exists():
        raise FileNotFoundError(f"path is '{path}', which does not exist")
    if path.is_dir():
        folders = [path] if path.name == variant else []
        folders += [path / variant, *sorted(path.glob(f"*/{variant}"))]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is not None:
            return _read_folder(folder, wanted)
        path = _only_archive(path, variant)
    try:
        return dict(_scan_archive(path, variant, wanted))
    except _TORN as error:
        raise ValueError(f"path is '{path}', which is no readable tar archive: {error}") from error


def read_text_file(path: Path) -> TextFile:
    """A single file, `.txt` or `.txt.xz`."""
    if not path.is_file():
        raise FileNotFoundError(f"qa3_path is '{path}', which is no file")
    if path.suffix != ".xz":
        return TextFile(str(path), path.read_bytes())
    try:
        return TextFile(str(path), lzma.decompress(path.read_bytes()))
    except lzma.LZMAError as error:
        raise ValueError(f"qa3_path is '{path}', which is no readable xz file: {error}") from error


def _key_of(name: str) -> FileKey | None:
    match = _FILE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def _read_folder(folder: Path, wanted: set[FileKey]) -> dict[FileKey, TextFile]:
    found = {_key_of(file.name): file for file in sorted(folder.iterdir())}
    return {
        key: TextFile(str(file), file.read_bytes())
        for key, file in found.items()
        if key is not None and key in wanted
    }


def _only_archive(folder: Path, variant: str) -> Path:
    archives = sorted(file for file in folder.iterdir() if _ARCHIVE.fullmatch(file.name))
    if len(archives) != 1:
        found = ", ".join(file.name for file in archives) or "none"
        raise FileNotFoundError(
            f"path is '{folder}', expected a folder that holds '{variant}/' or one bAbI archive"
            f" (archives found: {found})"
        )
    return archives[0]


def _scan_archive(
    path: Path, variant: str, wanted: set[FileKey]
) -> Iterator[tuple[FileKey, TextFile]]:
    """Read through the archive once, only as far as the last wanted file."""
    missing = set(wanted)
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            *folders, name = member.name.split("/")
            key = _key_of(name)
            if key not in missing or folders[-1:] != [variant]:
                continue
            stream = archive.extractfile(member)
            if key is None or stream is None:  # a folder or link of that name
                continue
            yield key, TextFile(f"{path}: {member.name}", stream.read())
            missing.discard(key)
            if not missing:
                return


def parse_stories(task: int, file: TextFile) -> list[Story]:
    """All stories of a file, words in lower case.

    ValueError names the file and the number of a line that does not parse.
    """
    stories: list[Story] = []
    known: dict[str, Sentence] = {}  # sentences repeat a lot
    for row, line in enumerate(_lines(file), 1):
        # A hot loop, 800,000 lines for all tasks: it calls nothing of ours for a known sentence.
        label, _, text = line.partition(" ")
        try:
            if not label.isdecimal() or not text.strip():
                raise ValueError(f"{line!r} is not 'NUMBER SENTENCE'")
            if label == "1":
                _check_answered(stories)
                stories.append(Story(task, 0, [], []))
            if not stories or int(label) != stories[-1].sentences + 1:
                expected = f"{stories[-1].sentences + 1} or 1" if stories else "1"
                raise ValueError(f"sentence number is {label}, expected {expected}")
            if text not in known:
                known[text] = parse_sentence(text)
            words, answer, last_support = known[text]
            if last_support >= int(label):
                raise ValueError(f"supporting fact is {last_support}, expected below {label}")
        except ValueError as error:
            raise ValueError(f"{file.name}, line {row}: {error}") from None
        story = stories[-1]
        story.sentences += 1
        story.words += words
        if answer:
            story.answers.append((len(story.words) - len(answer), answer))
    if not stories:
        raise ValueError(f"{file.name} is empty, expected at least one story")
    if not stories[-1].answers:
        raise ValueError(f"{file.name}, at its end: the last story has no question")
    return stories


def _lines(file: TextFile) -> list[str]:
    try:
        text = file.content.decode()
    except UnicodeDecodeError as error:
        number = file.content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file.name}, line {number}: not UTF-8 text") from None
    # Not splitlines(), which also splits at characters that editors do not count as lines.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _check_answered(stories: list[Story]) -> None:
    if stories and not stories[-1].answers:
        raise ValueError("a new story begins, but the story before it has no question")


def parse_sentence(text: str) -> Sentence:
    """A statement, or a question with its answer and its supporting facts.

    ValueError says what is wrong with it. The supporting facts are not used otherwise.
    """
    if "\t" not in text:
        return Sentence(_words(text, "."), (), 0)
    question, answer, *supports = text.split("\t")
    if len(supports) > 1:
        raise ValueError(f"{len(supports) + 2} fields, expected question, answer, supports")
    words = tuple(answer.strip().lower().split(","))
    if not all(re.fullmatch(r"[^\s.?]+", word) and word != ANSWER for word in words):
        raise ValueError(f"answer is {answer!r}, expected words joined by commas")
    facts = supports[0].split() if supports else []
    for fact in facts:
        if not fact.isdecimal() or int(fact) == 0:
            raise ValueError(f"supporting fact is {fact!r}, expected the number of a sentence")
    last = max(map(int, facts), default=0)
    return Sentence(_words(question, "?") + [ANSWER] * len(words), words, last)


def _words(text: str, end: str) -> list[str]:
    """The words of a statement or question and its closing mark."""
    body = text.strip().lower()
    words = body[:-1].split()
    if body[-1:] != end or not words:
        raise ValueError(f"{text!r} does not end with {end!r}")
    if any(word == ANSWER or "." in word or "?" in word for word in words):
        raise ValueError(f"{text!r} has a mark inside: '.', '?' or a single '{ANSWER}'")
    return [*words, end]

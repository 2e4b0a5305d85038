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


class Story(NamedTuple):
    """A story with its questions as one sequence of words.

    `words` holds one `ANSWER` for each word of an answer; `answers` holds, for each
    question, the position of its first one and the words of the answer.
    """

    task: int
    sentences: int
    words: list[str]
    answers: list[tuple[int, tuple[str, ...]]]


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
    parser = _Parser(task)
    for number, line in enumerate(_lines(file), 1):
        try:
            parser.add(line)
        except ValueError as error:
            raise ValueError(f"{file.name}, line {number}: {error}") from None
    if not parser.stories:
        raise ValueError(f"{file.name} is empty, expected at least one story")
    if not parser.stories[-1].answers:
        raise ValueError(f"{file.name}, at its end: the last story has no question")
    return parser.stories


def _lines(file: TextFile) -> list[str]:
    try:
        text = file.content.decode()
    except UnicodeDecodeError as error:
        number = file.content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file.name}, line {number}: not UTF-8 text") from None
    # Not splitlines(), which also splits at characters that editors do not count as lines.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


class _Parser:
    """Collects stories line by line. Sentences repeat a lot, so their words are kept."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.stories: list[Story] = []
        self.known: dict[str, list[str]] = {}

    def add(self, line: str) -> None:
        number, _, text = line.partition(" ")
        if not number.isdecimal() or not text.strip():
            raise ValueError(f"{line!r} is not 'NUMBER SENTENCE'")
        self._begin_or_go_on(int(number))
        story = self.stories[-1]
        if "\t" not in text:
            story.words.extend(self._words(text, "."))
            return
        question, answer, *supports = text.split("\t")
        words = _answer_words(answer)
        _check_supports(supports, int(number))
        story.words.extend(self._words(question, "?"))
        story.answers.append((len(story.words), words))
        story.words.extend([ANSWER] * len(words))

    def _begin_or_go_on(self, number: int) -> None:
        last = self.stories[-1].sentences if self.stories else 0
        if number == 1:
            if self.stories and not self.stories[-1].answers:
                raise ValueError("a new story begins, but the story before it has no question")
            self.stories.append(Story(self.task, 1, [], []))
        elif number == last + 1:
            self.stories[-1] = self.stories[-1]._replace(sentences=number)
        else:
            raise ValueError(f"sentence number is {number}, expected {last + 1} or 1")

    def _words(self, text: str, end: str) -> list[str]:
        """The words of a sentence or question and its closing mark."""
        key = text + end
        if key not in self.known:
            body = text.strip().lower()
            words = body[:-1].split()
            if body[-1:] != end or not words:
                raise ValueError(f"{text!r} does not end with {end!r}")
            if any(word == ANSWER or "." in word or "?" in word for word in words):
                raise ValueError(f"{text!r} has a mark inside: '.', '?' or a single '{ANSWER}'")
            self.known[key] = [*words, end]
        return self.known[key]


def _answer_words(answer: str) -> tuple[str, ...]:
    words = tuple(answer.strip().lower().split(","))
    if not all(re.fullmatch(r"[^\s.?]+", word) and word != ANSWER for word in words):
        raise ValueError(f"answer is {answer!r}, expected words joined by commas")
    return words


def _check_supports(supports: list[str], number: int) -> None:
    """The supporting facts are not used; they must be numbers of earlier sentences."""
    if len(supports) > 1:
        raise ValueError(f"{len(supports) + 2} fields, expected question, answer, supports")
    for support in supports[0].split() if supports else []:
        if not support.isdecimal() or not 0 < int(support) < number:
            raise ValueError(f"supporting fact is {support!r}, expected a number below {number}")

import io
import lzma
import tarfile

import pytest

from sparsemem.tasks.babi_files import (
    Story,
    TextFile,
    parse_stories,
    read_files,
    read_text_file,
)

TEXT = (
    "1 Mary moved to the bathroom.\n"
    "2 John went to the hallway.\n"
    "3 Where is Mary? \tbathroom\t1\n"
    "4 How do you go there?\tS,e\t1 2\n"
    "1 Jason is thirsty.\n"
    "2 Where will jason go?\tkitchen\n"
)
FIRST = (
    "mary moved to the bathroom . john went to the hallway . where is mary ? - "
    "how do you go there ? - -"
)
SECOND = "jason is thirsty . where will jason go ? -"
STORIES = [
    Story(1, 4, FIRST.split(), [(16, ("bathroom",)), (23, ("s", "e"))]),
    Story(1, 2, SECOND.split(), [(9, ("kitchen",))]),
]


def parse(text):
    content = text if isinstance(text, bytes) else text.encode()
    return parse_stories(1, TextFile("file.txt", content))


@pytest.mark.parametrize("text", [TEXT, TEXT.rstrip("\n"), TEXT.replace("\n", "\r\n")])
def test_parse(text):
    assert parse(text) == STORIES


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "'' is not 'NUMBER SENTENCE'"),
        ("3", "'3' is not 'NUMBER SENTENCE'"),
        ("Where is Mary? \tbathroom\t1", "'Where is Mary.*' is not 'NUMBER SENTENCE'"),
        ("-3 Mary left.", "'-3 Mary left.' is not 'NUMBER SENTENCE'"),
        ("4 Mary left.", "sentence number is 4, expected 3 or 1"),
        ("0 Mary left.", "sentence number is 0, expected 3 or 1"),
        ("1 Mary left.", "a new story begins, but the story before it has no question"),
        ("3 Mary left", r"'Mary left' does not end with '\.'"),
        ("3 Where is Mary?", r"'Where is Mary\?' does not end with '\.'"),
        ("3 .", r"'\.' does not end with '\.'"),
        ("3 Where is Mary.\tbathroom\t1", r"'Where is Mary\.' does not end with '\?'"),
        ("3 Mary left. John.", "'Mary left. John.' has a mark inside"),
        ("3 Mary - left.", "'Mary - left.' has a mark inside"),
        ("3 Where is Mary?\t\t1", "answer is '', expected words joined by commas"),
        ("3 Where is Mary?\tthe bathroom\t1", "answer is 'the bathroom', expected words"),
        ("3 Where is Mary?\tmilk,\t1", "answer is 'milk,', expected words"),
        ("3 Where is Mary?\t-\t1", "answer is '-', expected words"),
        ("3 Where is Mary?\tbathroom\tx", "supporting fact is 'x', expected the number of a"),
        ("3 Where is Mary?\tbathroom\t3", "supporting fact is 3, expected below 3"),
        ("3 Where is Mary?\tbathroom\t0", "supporting fact is '0', expected the number of a"),
        ("3 Where is Mary?\tbathroom\t1\t2", "4 fields, expected question, answer, supports"),
        (b"3 Mary \xff left.", "not UTF-8 text"),
    ],
)
def test_a_line_that_does_not_parse(line, message):
    raw = line if isinstance(line, bytes) else line.encode()
    text = b"1 Mary moved.\n2 John moved.\n" + raw + b"\n4 Where is Mary?\tbathroom\t1\n"
    with pytest.raises(ValueError, match=f"^file.txt, line 3: {message}"):
        parse(text)


def test_a_file_without_its_end():
    with pytest.raises(ValueError, match=r"file.txt, at its end: the last story has no question"):
        parse("1 Mary moved.\n")
    with pytest.raises(ValueError, match=r"file.txt is empty, expected at least one story"):
        parse("")
    with pytest.raises(ValueError, match=r"file.txt, line 1: sentence number is 2, expected 1$"):
        parse("2 Mary moved.\n")


def write_archive(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


FILES = {
    "tasks_1-20_v1-2/en-valid-10k/qa1_train.txt": "of another variant",
    "tasks_1-20_v1-2/en/qa1_single-supporting-fact_train.txt": "train 1",
    "tasks_1-20_v1-2/en/qa1_single-supporting-fact_test.txt": "test 1",
    "tasks_1-20_v1-2/en/qa11_basic-coreference_train.txt": "train 11",
    "tasks_1-20_v1-2/en/._qa1_single-supporting-fact_train.txt": "a Mac's hidden file",
    "tasks_1-20_v1-2/en-10k/qa1_single-supporting-fact_train.txt": "train 1, 10k",
}
WANTED = {(1, "train"), (1, "test"), (2, "train")}


def contents(path, variant="en"):
    return {key: file.content for key, file in read_files(path, variant, WANTED).items()}


def unpack(folder):
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tgz"])
def test_archive_and_the_folder_that_holds_it(tmp_path, suffix):
    mode = {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix[4:]}")
    archive = write_archive(tmp_path / f"tasks_1-20_v1-2.{suffix}", FILES, mode)
    expected = {(1, "train"): b"train 1", (1, "test"): b"test 1"}
    assert contents(archive) == contents(tmp_path) == expected
    assert contents(archive, "en-10k") == {(1, "train"): b"train 1, 10k"}
    assert [file.name for file in tmp_path.iterdir()] == [archive.name]  # nothing unpacked


@pytest.mark.parametrize("inside", [".", "tasks_1-20_v1-2", "tasks_1-20_v1-2/en"])
def test_unpacked_folder_from_each_level(tmp_path, inside):
    unpack(tmp_path)
    assert contents(tmp_path / inside) == {(1, "train"): b"train 1", (1, "test"): b"test 1"}


def test_a_folder_of_another_variant_is_not_taken(tmp_path):
    unpack(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder that holds 'en-10k/' or one"):
        contents(tmp_path / "tasks_1-20_v1-2/en", "en-10k")


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path is '.*nowhere', which does not exist"):
        contents(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds 'en/' or one bAbI archive .* none"):
        contents(tmp_path)
    for name in ("babi.tar", "babi.tgz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(FileNotFoundError, match=r"archives found: babi.tar, babi.tgz"):
        contents(tmp_path)


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_torn_or_foreign_archive(tmp_path, suffix):
    path = write_archive(
        tmp_path / f"babi.tar.{suffix}", {**FILES, "x": "y" * 10**6}, f"w:{suffix}"
    )
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an archive" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path is '.*', which is no readable tar archive"):
            contents(path)


def test_text_file(tmp_path):
    plain, packed = tmp_path / "qa3.txt", tmp_path / "qa3.txt.xz"
    plain.write_text("text")
    packed.write_bytes(lzma.compress(b"text"))
    assert read_text_file(plain).content == read_text_file(packed).content == b"text"
    packed.write_text("text")
    with pytest.raises(
        ValueError, match=r"qa3_path is '.*qa3.txt.xz', which is no readable xz file"
    ):
        read_text_file(packed)
    with pytest.raises(FileNotFoundError, match=r"qa3_path is '.*none.txt', which is no file"):
        read_text_file(tmp_path / "none.txt")

"""Files and folders that appear whole or not at all."""

import os

import pytest

from sparsemem.files import new_file, new_folder, place_folder, replace_file


def test_a_file_takes_the_place_of_another_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    with new_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def interrupted():
        with new_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_with_all_its_files(tmp_path):
    (tmp_path / ".folder.part").mkdir()  # what a crash left
    (tmp_path / ".folder.part" / "rest").write_text("x")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("one")
        assert not (tmp_path / "folder").exists()
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["file"]


def test_a_folder_that_was_not_finished_never_appears(tmp_path):
    def stopped():
        with new_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("one")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stopped()
    assert os.listdir(tmp_path) == []


def test_a_folder_takes_an_empty_place_and_no_other(tmp_path):
    (tmp_path / "folder").mkdir()
    place_folder(tmp_path / "folder", {"file": b"one"})
    with pytest.raises(OSError, match="not empty"):
        place_folder(tmp_path / "folder", {"file": b"two"})
    assert (tmp_path / "folder" / "file").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["folder"]

import json

import pytest

from sparsemem.bench.errors import BenchError
from sparsemem.bench.measuring import Summary
from sparsemem.bench.results import (
    Measured,
    Result,
    as_csv,
    as_json,
    check_folder,
    read_result,
    show_bytes,
    show_seconds,
    show_size,
    write_files,
)

# Plain numbers: an int serves as a float.
pytestmark = pytest.mark.usefixtures("plain_errors")


@pytest.fixture
def result():
    point = Measured(
        kind="bank",
        name="ivf",
        size=1000,
        times={"read": Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])},
        figures={"recall": 0.5},
    )
    return Result(benchmark="scaling", machine={"cpu": "x"}, settings={}, seconds=1, points=[point])


def test_a_result_is_read_back_as_it_was(result, tmp_path):
    write_files(tmp_path / "new" / "folder", {"a.json": as_json(result)})
    assert read_result(tmp_path / "new" / "folder" / "a.json") == result


def test_the_csv_has_medians_and_quartiles(result):
    assert as_csv(result).decode().splitlines() == [
        "kind,name,size,steps,measure,median,lower_quartile,upper_quartile,repetitions",
        "bank,ivf,1000,,read_seconds,3.0,2.0,4.0,5",
        "bank,ivf,1000,,recall,0.5,,,",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[1]", "is not a result of sparsemem bench"),
        ('{"step": 3}', "is not a result of sparsemem bench"),
        (json.dumps({"format": "sparsemem bench result"}), "is damaged: benchmark: "),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchError, match=message):
        read_result(path)


def test_a_folder_with_foreign_files_of_the_same_name_is_refused(result, tmp_path):
    names = ("r.json", "table.md")
    check_folder(tmp_path / "not there yet", "r.json", names)
    (tmp_path / "other.txt").write_text("mine")
    check_folder(tmp_path, "r.json", names)
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(BenchError, match=r"has a file table.md and no earlier result in r.json"):
        check_folder(tmp_path, "r.json", names)
    write_files(tmp_path, {"r.json": as_json(result)})
    check_folder(tmp_path, "r.json", names)
    with pytest.raises(BenchError, match="is a file, expected a folder"):
        check_folder(tmp_path / "r.json", "r.json", names)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match=r"cannot write .*file"):
        write_files(tmp_path / "file" / "folder", {"a": b""})


def test_figures_are_shown_in_units_that_people_read():
    assert [show_seconds(x) for x in (2.5, 0.0123, 4e-6)] == ["2.5 s", "12.3 ms", "4 us"]
    assert [show_bytes(x) for x in (10, 2048, 3 * 2**30)] == ["10 B", "2 KiB", "3 GiB"]
    assert [show_size(x) for x in (100, 1024, 2**30, 10_000_000)] == [
        "100",
        "2^10",
        "2^30",
        "1e+07",
    ]
